"""Ray Serve: two replicas behind the same routes; one is killed in mid-clip, and its clips end elsewhere."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

# A busy machine starts and answers slowly. Read when Ray Serve is imported.
for _check in ("READY", "HEALTH"):
    os.environ.setdefault(f"RAY_SERVE_PROXY_{_check}_CHECK_TIMEOUT_S", "60")

ray = pytest.importorskip("ray", reason="the ray extra is not installed")
serve = pytest.importorskip("ray.serve", reason="the ray extra is not installed")

import httpx  # noqa: E402
import openai  # noqa: E402

from pylumiere.errors import InvalidRequest  # noqa: E402
from pylumiere.media.inputs import request_fields  # noqa: E402

from .conftest import wait_until  # noqa: E402
from .test_applications import CLIP, MASK, OTHER, STILL  # noqa: E402
from .test_applications import url as data_url  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PORT = 18_734


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    from pylumiere.serve.ray_app import build

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    arguments = {"model": str(model), "data": str(tmp_path_factory.mktemp("data")), "min_replicas": "2",
                 "num_cpus": "0.5", "precision": "fp32"}  # fmt: skip
    serve.run(build(arguments), name="pylumiere")
    yield f"http://127.0.0.1:{PORT}"
    serve.shutdown()
    ray.shutdown()


def replicas(application="pylumiere"):
    """Process ids of the engine replicas; a replica names its process."""
    name = f"ray::ServeReplica:{application}:engine"
    found = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if file.read_bytes().decode(errors="replace").startswith(name):
                found.add(int(file.parent.name))
        except OSError:  # it has just ended
            pass
    return found


def fingerprints():
    handle = serve.get_deployment_handle("engine", app_name="pylumiere")
    found = {}
    end = time.monotonic() + 60
    while len(found) < 2 and time.monotonic() < end:
        one = handle.fingerprint.remote().result(timeout_s=30)
        found[one["pid"]] = one
    return found


def test_a_clip_over_ray_has_the_engine_s_bytes(url, engine, tmp_path):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
    video = client.videos.create_and_poll(prompt="a red circle", extra_body={"seed": 7})
    assert video.status == "completed"
    (tmp_path / "clip.mp4").write_bytes(client.videos.download_content(video.id).read())
    engine.generate("a red circle", seed=7).save(tmp_path / "expected.mp4")
    assert (tmp_path / "clip.mp4").read_bytes() == (tmp_path / "expected.mp4").read_bytes()
    with pytest.raises(openai.BadRequestError):
        client.videos.create(prompt="a", size="33x33")


def test_replicas_agree(url):
    found = list(fingerprints().values())
    assert len(found) == 2
    own = [{name: value for name, value in one.items() if name != "pid"} for one in found]
    assert own[0] == own[1] and own[0]["threads"] == 1


def test_applications_and_deadlines_over_ray(url, engine, tmp_path):
    """Pictures, clips and masks travel to the replica; a clip that takes too long fails there."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
    expand = {"left": 8}
    for fields, given, same in [
        ({"input_reference": ("x", CLIP), "extra_body": {"mask": data_url(MASK)}}, {"video": CLIP, "mask": MASK}, {}),
        ({"extra_body": {"keyframes": {"5": data_url(OTHER)}}}, {"keyframes": {5: OTHER}}, {}),
        ({"input_reference": ("x", STILL), "extra_body": {"expand": expand}}, {"image": STILL}, {"expand": expand}),
        ({"extra_body": {"style": "bold"}}, {}, {"style": "bold"}),
    ]:
        fields["extra_body"]["seed"] = 7
        video = client.videos.create_and_poll(prompt="a", **fields)
        assert video.status == "completed", video.error
        engine.generate("a", seed=7, **request_fields(**given), **same).save(tmp_path / "expected.mp4")
        assert client.videos.download_content(video.id).read() == (tmp_path / "expected.mp4").read_bytes()
    with pytest.raises(openai.BadRequestError, match="this model has bold"):
        client.videos.create(prompt="a", extra_body={"style": "/etc/passwd"})
    late = client.videos.create_and_poll(prompt="a", extra_body={"num_inference_steps": 1000, "timeout": 1})
    assert (late.status, late.error.code) == ("failed", "deadline_exceeded")


def test_clips_survive_the_death_of_a_replica(url, engine, tmp_path):
    victim = min(replicas())
    with httpx.Client(base_url=url, timeout=30) as http:
        steps = {"num_inference_steps": 400}
        ids = {
            seed: http.post("/v1/videos", json={"prompt": "a", "seed": seed, **steps}).json()["id"] for seed in range(5)
        }
        status = lambda id: http.get(f"/v1/videos/{id}").json()  # noqa: E731
        # Four run at once and a replica takes two: each of the two replicas has some.
        wait_until(lambda: sum(0 < status(id)["progress"] < 90 for id in ids.values()) == 4, 60)
        os.kill(victim, signal.SIGKILL)
        end = time.monotonic() + 300  # a busy machine starts a replica slowly
        while any(status(id)["status"] in ("queued", "in_progress") for id in ids.values()) and time.monotonic() < end:
            time.sleep(0.2)
        found = [(one["status"], one["progress"], one["error"]) for one in map(status, ids.values())]
        assert [one[0] for one in found] == ["completed"] * 5, found
        lost = [line for line in http.get("/metrics").text.splitlines() if 'outcome="worker_lost"' in line]
        assert lost and float(lost[0].split()[-1]) >= 1  # a clip was running on the replica that died
        for seed, id in ids.items():
            (tmp_path / f"{seed}.mp4").write_bytes(http.get(f"/v1/videos/{id}/content").content)
            engine.generate("a", seed=seed, **steps).save(tmp_path / "expected.mp4")
            assert (tmp_path / f"{seed}.mp4").read_bytes() == (tmp_path / "expected.mp4").read_bytes()


def test_cancel_reaches_the_replica(url):
    with httpx.Client(base_url=url, timeout=30) as http:
        slow = {"prompt": "a", "num_inference_steps": 1000}
        ids = [http.post("/v1/videos", json=slow).json()["id"] for _ in range(4)]
        wait_until(lambda: all(http.get(f"/v1/videos/{id}").json()["status"] == "in_progress" for id in ids), 60)
        for id in ids:
            assert http.delete(f"/v1/videos/{id}").status_code == 200
        begun = time.monotonic()
        id = http.post("/v1/videos", json={"prompt": "a"}).json()["id"]
        wait_until(lambda: http.get(f"/v1/videos/{id}").json()["status"] == "completed", 30)
        assert time.monotonic() - begun < 15


def test_a_long_queue_brings_a_replica(url, model, tmp_path):
    """In an application of its own, which begins with one engine and may have two."""
    from pylumiere.serve.ray_app import build

    arguments = {"model": str(model), "data": str(tmp_path / "data"), "replicas": "2", "clips_per_replica": "1",
                 "num_cpus": "0.2", "precision": "fp32"}  # fmt: skip
    serve.run(build(arguments), name="growing", route_prefix="/growing")
    try:
        assert len(replicas("growing")) == 1
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}/growing", timeout=30) as http:
            slow = {"prompt": "a", "num_inference_steps": 1000}
            ids = [http.post("/v1/videos", json=slow).json()["id"] for _ in range(6)]
            wait_until(lambda: len(replicas("growing")) == 2, 90)
            for id in ids:
                http.delete(f"/v1/videos/{id}")
    finally:
        serve.delete("growing")


def test_windows_of_one_clip_are_spread(url, model, engine, tmp_path):
    """In an application of its own: one engine, two further replicas for its windows, one of which dies."""
    from pylumiere.serve.ray_app import build

    arguments = {"model": str(model), "data": str(tmp_path / "data"), "replicas": "1", "windows": "2",
                 "num_cpus": "0.2", "precision": "fp32"}  # fmt: skip
    serve.run(build(arguments), name="spread", route_prefix="/spread")
    try:
        fields = {"seed": 7, "window_frames": 2, "window_overlap": 1}
        expected = engine.generate("a", **fields).frames.tobytes()
        handle = serve.get_deployment_handle("engine", app_name="spread")

        def frames():
            messages = handle.options(stream=True).generate.remote({"prompt": "a", **fields})
            return b"".join(message[2].tobytes() for message in messages if message[0] == "frames")

        assert frames() == expected
        computed = handle.fingerprint.remote().result(timeout_s=30)["computed"]
        assert computed["away"] > 0 and computed["again"] == 0
    finally:
        serve.delete("spread")


def test_a_folder_with_the_shift_and_loras_over_ray(url, sd_folder, shift_engine, loras, tmp_path):
    """In an application of its own. A LoRA's name becomes a file in the replica."""
    from pylumiere.serve.ray_app import build

    arguments = {"model": str(sd_folder), "data": str(tmp_path / "data"), "replicas": "1", "num_cpus": "0.2",
                 "precision": "fp32", "temporal_shift": "8", "loras": str(loras)}  # fmt: skip
    serve.run(build(arguments), name="folder", route_prefix="/folder")
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/folder/v1", api_key="any")
        assert client.models.list().data[0].loras == ["Ink wash.v2", "look", "other"]
        fields = {"num_frames": 3, "num_inference_steps": 2, "seed": 7}
        video = client.videos.create_and_poll(prompt="a dog", extra_body={"lora": "look:0.5", **fields})
        assert video.status == "completed", video.error
        shift_engine.generate("a dog", lora=f"{loras / 'look.safetensors'}:0.5", **fields).save(tmp_path / "a.mp4")
        assert client.videos.download_content(video.id).read() == (tmp_path / "a.mp4").read_bytes()
        with pytest.raises(openai.BadRequestError, match="this server has Ink wash.v2, look, other"):
            client.videos.create(prompt="a dog", extra_body={"lora": "/etc/passwd"})
        other = client.videos.create_and_poll(prompt="a dog", extra_body={"lora": "other", **fields})
        assert other.status == "failed" and other.error.message.startswith("lora='other' was made for another model")
    finally:
        serve.delete("folder")


def test_arguments_are_checked():
    from pylumiere.serve.ray_app import RayOptions

    with pytest.raises(InvalidRequest, match="unknown argument 'modle'"):
        RayOptions.parse({"modle": "demo"})
    with pytest.raises(InvalidRequest, match="number"):
        RayOptions.parse({"replicas": "many"})
    assert RayOptions.parse({"replicas": "3", "num_cpus": "0.5"}).replicas == 3
    assert RayOptions.parse({"temporal_shift": "8"}).temporal_shift == 8
