"""OpenAI's video API: the official client unchanged, and every shape, limit and error beside it."""

from __future__ import annotations

import base64
import io
import json
import re
import time
import warnings

import numpy as np
import openai
import pytest
from PIL import Image

from pylumiere.errors import InvalidRequest
from pylumiere.media.video import read_video
from pylumiere.serve import media
from pylumiere.serve.app import Limits
from pylumiere.serve.schema import frames_for

from .conftest import SLOW, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")


def picture(format="PNG", size=(40, 30), **options):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, format, **options)
    return file.getvalue()


def decoded(data, tmp_path, name="clip.mp4"):
    (tmp_path / name).write_bytes(data)
    return read_video(tmp_path / name).frames


# ---- the official client --------------------------------------------------------------------------------------------


def test_official_client(server, engine, tmp_path):
    client = server.openai()
    extra = {"num_inference_steps": 3, "guidance_scale": 1.5, "seed": 7, "sampler": "ddim", "num_frames": 6,
             "negative_prompt": "blur"}  # fmt: skip
    video = client.videos.create(prompt="a red circle", extra_body=extra)
    assert video.object == "video" and video.status in ("queued", "in_progress") and video.model == "tiny"
    assert video.progress == 0 and video.error is None and abs(video.created_at - time.time()) < 60
    assert (video.size, video.seconds, video.prompt) == ("32x32", "0.375", "a red circle")
    for name, value in extra.items():
        assert getattr(video, name) == value, name

    done = client.videos.poll(video.id)
    assert done.status == "completed" and done.progress == 100 and done.completed_at >= done.created_at
    assert client.videos.retrieve(video.id) == done

    frames = decoded(client.videos.download_content(video.id).read(), tmp_path)
    expected = engine.generate("a red circle", **extra)
    expected.save(tmp_path / "expected.mp4")
    assert frames.tobytes() == read_video(tmp_path / "expected.mp4").frames.tobytes()
    thumbnail = client.videos.download_content(video.id, variant="thumbnail").read()
    assert Image.open(io.BytesIO(thumbnail)).size == (32, 32)
    sheet = client.videos.download_content(video.id, variant="spritesheet").read()
    assert Image.open(io.BytesIO(sheet)).size == (5 * 32, 2 * 32)

    assert client.videos.delete(video.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_create_and_poll_with_a_picture_size_and_seconds(server, engine, tmp_path):
    client = server.openai()
    request = {"prompt": "a", "seconds": "0.25", "size": "48x32", "extra_body": {"seed": 3}}
    video = client.videos.create_and_poll(input_reference=("a.png", picture()), **request)
    assert video.status == "completed" and video.size == "48x32" and video.num_frames == 4
    frames = decoded(client.videos.download_content(video.id).read(), tmp_path)
    assert frames.shape == (4, 32, 48, 3)
    image = np.full((30, 40, 3), (255, 0, 0), np.uint8)
    engine.generate("a", seed=3, num_frames=4, width=48, height=32, image=image).save(tmp_path / "expected.mp4")
    assert frames.tobytes() == read_video(tmp_path / "expected.mp4").frames.tobytes()
    without = client.videos.create_and_poll(**request)
    assert not np.array_equal(frames, decoded(client.videos.download_content(without.id).read(), tmp_path))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_picture_as_a_data_url(server, format):
    url = f"data:image/{format.lower()};base64,{base64.b64encode(picture(format)).decode()}"
    body = {"prompt": "a", "input_reference": {"image_url": url}}
    assert server.http.post("/v1/videos", json=body).status_code == 200
    form = {"prompt": (None, "a"), "input_reference[image_url]": (None, url)}
    assert server.http.post("/v1/videos", files=form).status_code == 200


def test_list_pages(server):
    client = server.openai()
    ids = [server.create(num_frames=2, seed=i) for i in range(5)]
    assert [v.id for v in client.videos.list(limit=2)] == ids[::-1]  # the client asks for page after page
    assert [v.id for v in client.videos.list(limit=2, order="asc")] == ids
    page = client.videos.list(limit=2, after=ids[3])
    assert [v.id for v in page.data] == [ids[2], ids[1]] and page.has_more and page.last_id == ids[1]
    assert not client.videos.list(after=ids[1], limit=1).has_more
    with pytest.raises(openai.BadRequestError, match="after"):
        client.videos.list(after="video_" + "0" * 32)


def test_remix(server):
    client = server.openai()
    source = client.videos.create_and_poll(prompt="a", input_reference=("a.png", picture()), extra_body={"seed": 5})
    remix = client.videos.remix(source.id, prompt="a blue square")
    assert remix.remixed_from_video_id == source.id and remix.prompt == "a blue square"
    assert (remix.seed, remix.size, remix.num_frames) == (5, source.size, source.num_frames)
    client.videos.delete(source.id)  # the remix has a picture of its own
    assert client.videos.poll(remix.id).status == "completed"
    slow = client.videos.create(prompt="a", extra_body=SLOW)
    with pytest.raises(openai.BadRequestError, match="only completed"):
        client.videos.remix(slow.id, prompt="b")


def test_what_is_not_supported_says_so(server):
    client = server.openai()
    calls = {
        "character": lambda: client.videos.create_character(name="a", video=b"mp4"),
        "a character": lambda: client.videos.get_character("a"),
    }
    for text, call in calls.items():
        with pytest.raises(openai.BadRequestError, match=text) as info:
            call()
        assert info.value.code == "unsupported"


def test_models(server):
    client = server.openai()
    [model] = client.models.list().data
    assert model.id == "tiny" and model.defaults["num_frames"] == 8 and model.decoder is None
    assert model.stages == [{"name": "base", "family": "stunet"}, {"name": "ssr", "family": "stunet"}]
    assert model.limits["num_frames"] == {"most": 64, "step": 1} and model.styles == ["bold"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("sora-2")


# ---- cancel ----------------------------------------------------------------------------------------------------------


def test_delete_cancels_what_runs_and_what_waits(server):
    running = [server.create(**SLOW) for _ in range(2)]
    waiting = server.create(**SLOW)
    for id in running:
        server.wait(id, "in_progress")
    wait_until(lambda: server.http.get(f"/v1/videos/{running[0]}").json()["progress"] > 0)
    assert server.http.get(f"/v1/videos/{waiting}").json()["status"] == "queued"
    assert server.http.delete(f"/v1/videos/{waiting}").status_code == 200
    begun = time.monotonic()
    for id in running:
        assert server.http.delete(f"/v1/videos/{id}").status_code == 200
    wait_until(lambda: server.service.runner.num_running == 0)
    assert time.monotonic() - begun < 2
    assert server.wait(server.create(num_frames=2))["status"] == "completed"
    folders = server.service.store.folder
    assert not list((folders / "work").iterdir())


def test_a_file_that_is_being_read_outlives_its_video(server):
    id = server.create()
    server.wait(id)
    store = server.service.store
    path = store.lease(id, "", "video.mp4")
    assert server.http.delete(f"/v1/videos/{id}").status_code == 200
    assert path.exists() and server.http.get(f"/v1/videos/{id}/content").status_code == 404
    store.release(id)
    assert not path.exists()


# ---- content ---------------------------------------------------------------------------------------------------------


def test_content_takes_ranges(server):
    id = server.create()
    server.wait(id)
    whole = server.http.get(f"/v1/videos/{id}/content")
    assert whole.headers["content-type"] == "video/mp4" and whole.headers["x-content-type-options"] == "nosniff"
    part = server.http.get(f"/v1/videos/{id}/content", headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == whole.content[10:20]
    assert server.http.get(f"/v1/videos/{id}/content", headers={"Range": "bytes=999999999-"}).status_code == 416
    assert server.http.get(f"/v1/videos/{id}/content?variant=../jobs.sqlite3").status_code == 400


def test_content_before_the_end_is_not_found(server):
    id = server.create(**SLOW)
    answer = server.http.get(f"/v1/videos/{id}/content")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "video_not_ready"


# ---- events ----------------------------------------------------------------------------------------------------------


def read_events(server, id, *, until=None):
    events = []
    with server.http.stream("GET", f"/v1/videos/{id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = None
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                events.append((name, json.loads(line[6:])))
                if until is not None and until(*events[-1]):
                    break
    return events


def test_events_show_progress_and_final_frames(server, engine):
    blocker = [server.create(**SLOW) for _ in range(2)]  # so that listening begins before the job
    id = server.create(seed=7)

    def unblock(name, data):
        for other in blocker:
            server.http.delete(f"/v1/videos/{other}")
        return False

    events = read_events(server, id, until=unblock)
    names = [name for name, _ in events]
    assert events[0] == ("status", events[0][1]) and events[0][1]["status"] == "queued"
    assert names[-1] == "completed" and events[-1][1]["progress"] == 100
    progress = [data for name, data in events if name == "progress"]
    assert {p["stage"] for p in progress} == {"base", "ssr"}
    percents = [p["percent"] for p in progress]
    assert percents == sorted(percents) and percents[-1] <= 99
    previews = [data for name, data in events if name == "preview"]
    assert [p["frame"] for p in previews] == list(range(8))
    frames = engine.generate("a red circle", seed=7).frames
    for preview in previews:  # they are the clip's own frames
        assert preview["image"] == media.preview_url(frames[preview["frame"]])
        head, data = preview["image"].split(",")
        assert head == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (32, 32)


def test_events_of_what_has_ended_or_is_deleted(server):
    id = server.create()
    server.wait(id)
    assert [name for name, _ in read_events(server, id)] == ["completed"]
    slow = server.create(**SLOW)
    server.wait(slow, "in_progress")
    events = read_events(server, slow, until=lambda *_: server.http.delete(f"/v1/videos/{slow}") is None)
    assert events[-1] == ("deleted", {"id": slow})
    assert server.http.get(f"/v1/videos/{slow}/events").status_code == 404
    wait_until(lambda: server.service.hub.num_listeners == 0)


def test_a_listener_that_leaves_is_forgotten(server):
    id = server.create(**SLOW)
    read_events(server, id, until=lambda *_: True)
    server.http.get("/healthz")
    wait_until(lambda: server.service.hub.num_listeners == 0, 20)


# ---- what is refused -------------------------------------------------------------------------------------------------

BAD = {
    "no prompt": ({}, "prompt"),
    "empty prompt": ({"prompt": ""}, "prompt"),
    "blank prompt": ({"prompt": "  "}, "prompt"),
    "long prompt": ({"prompt": "x" * 20_001}, "prompt"),
    "seconds too long": ({"seconds": "8"}, "seconds"),
    "seconds no number": ({"seconds": "four"}, "seconds"),
    "seconds infinite": ({"seconds": "inf"}, "seconds"),
    "seconds zero": ({"seconds": 0}, "seconds"),
    "seconds and frames": ({"seconds": "0.5", "num_frames": 4}, "seconds"),
    "size of no shape": ({"size": "big"}, "size"),
    "size zero": ({"size": "0x32"}, "size"),
    "size not divided": ({"size": "33x32"}, "size"),
    "size too large": ({"size": "1280x720"}, "size"),
    "too many frames": ({"num_frames": 65}, "num_frames"),
    "frames as text": ({"num_frames": "4"}, "num_frames"),
    "frames as truth": ({"num_frames": True}, "num_frames"),
    "steps": ({"num_inference_steps": 1001}, "num_inference_steps"),
    "guidance": ({"guidance_scale": -1}, "guidance_scale"),
    "seed": ({"seed": 2**64}, "seed"),
    "sampler": ({"sampler": "magic"}, "sampler"),
    "model": ({"model": "sora-2"}, "model"),
    "window": ({"window_frames": 4, "window_overlap": 4}, "window_overlap"),
    "unknown field": ({"response_format": "path"}, "response_format"),
    "picture by URL": ({"input_reference": {"image_url": "http://10.0.0.1/a.png"}}, "input_reference"),
    "picture by file": ({"input_reference": {"image_url": "file:///etc/passwd"}}, "input_reference"),
    "picture by id": ({"input_reference": {"file_id": "x"}}, "input_reference"),
    "picture is none": ({"input_reference": {"image_url": "data:image/png;base64,AAAA"}}, "input_reference"),
    "base64 is none": ({"input_reference": {"image_url": "data:image/png;base64,A*"}}, "input_reference"),
}


@pytest.mark.parametrize("fields, param", BAD.values(), ids=BAD)
def test_bad_values_are_named(server, fields, param):
    prompt = {} if "prompt" in fields or param == "prompt" else {"prompt": "a"}
    answer = server.http.post("/v1/videos", json={**prompt, **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param, answer.text
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 500 and "\n" not in error["message"]


def test_bad_bodies(server):
    post = server.http.post
    texts = [b"", b"{", b"[]", b"null", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"[" * 100_000, b"\xff\xfe",
             b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}"]  # fmt: skip
    for text in texts:
        answer = post("/v1/videos", content=text, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, (text[:40], answer.text)
        assert answer.json()["error"]["message"]
    assert post("/v1/videos", content=b"prompt", headers={"Content-Type": "text/plain"}).status_code == 415
    forms = [b"", b"--x", b"--x\r\n\r\n\r\n--x--", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n"]
    for form in forms:
        answer = post("/v1/videos", content=form, headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert answer.status_code == 400, (form, answer.text)
    assert post("/v1/videos", content=b"", headers={"Content-Type": "multipart/form-data"}).status_code == 400
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
    for text, wrong in [(part + "ä".encode() + b"\r\n", "no end"), (part + b"\xe4\r\n--x--\r\n", "no UTF-8")]:
        answer = post("/v1/videos", content=text, headers=head)
        assert answer.status_code == 400 and wrong in answer.json()["error"]["message"], answer.text
    whole = post("/v1/videos", content=part + "ä".encode() + b"\r\n--x--\r\n", headers=head)
    assert whole.json()["prompt"] == "ä"
    twice = [("prompt", (None, "a")), ("prompt", (None, "b"))]
    assert "twice" in post("/v1/videos", files=twice).json()["error"]["message"]
    other = post("/v1/videos", files={"prompt": (None, "a"), "video": ("../../etc/passwd", b"x")})
    assert other.status_code == 400 and other.json()["error"]["code"] == "unknown_field"


def test_bodies_and_pictures_are_bounded(serve):
    server = serve(limits=Limits(body_bytes=50_000, image_pixels=10_000))
    large = {"prompt": (None, "a"), "input_reference": ("a.png", b"\0" * 60_000)}
    answer = server.http.post("/v1/videos", files=large)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"

    def pieces():
        for _ in range(10):
            yield b" " * 10_000

    answer = server.http.post("/v1/videos", content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    bomb = {"prompt": (None, "a"), "input_reference": ("a.png", picture(size=(3000, 3000)))}
    assert server.http.post("/v1/videos", files=bomb).json()["error"]["code"] == "invalid_image"
    wide = {"prompt": (None, "a"), "input_reference": ("a.png", picture(size=(200, 51)))}
    assert "10000" in server.http.post("/v1/videos", files=wide).json()["error"]["message"]
    wait_until(lambda: _gate(server)._body_bytes == 0)


def _gate(server):
    app = server.server.config.loaded_app
    while not hasattr(app, "_body_bytes"):
        app = app.app if hasattr(app, "app") else app.middleware_stack
    return app


@pytest.mark.parametrize("format", ["GIF", "TIFF", "BMP", "PPM"])
def test_other_kinds_of_pictures_are_refused(server, format):
    files = {"prompt": (None, "a"), "input_reference": ("a.png", picture(format))}
    answer = server.http.post("/v1/videos", files=files)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "input_reference"


def test_unknown_ids_and_paths(server):
    for id in ("x", "video_" + "0" * 32, "..%2f..%2fetc%2fpasswd", "video_%00", "%F0%9F%98%80"):
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("GET", "/events")):
            answer = server.http.request(method, f"/v1/videos/{id}{path}")
            assert answer.status_code in (400, 404, 405) and answer.json()["error"]["message"], (method, id, path)
    assert server.http.put("/v1/videos").status_code == 405
    assert server.http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    for query in ("limit=0", "limit=101", "limit=x", "order=up"):
        answer = server.http.get(f"/v1/videos?{query}")
        assert answer.status_code == 400 and answer.json()["error"]["param"] == query.split("=")[0]


def test_full_queue_is_429_with_retry_after(serve):
    server = serve(limits=Limits(queue=2), concurrency=1)
    ids = [server.create(**SLOW)]
    server.wait(ids[0], "in_progress")
    ids += [server.create(**SLOW) for _ in range(2)]
    answer = server.http.post("/v1/videos", json={"prompt": "a"})
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    server.http.delete(f"/v1/videos/{ids[1]}")
    assert server.http.post("/v1/videos", json={"prompt": "a", **SLOW}).status_code == 200


def test_longer_clips_where_the_server_allows_them(serve):
    server = serve(limits=Limits(frames=20))
    assert server.wait(server.create(num_frames=20))["num_frames"] == 20
    assert server.http.post("/v1/videos", json={"prompt": "a", "num_frames": 21}).status_code == 400


def test_sent_twice_is_made_once(server):
    send = lambda: server.http.post("/v1/videos", json={"prompt": "a"}, headers={"Idempotency-Key": "k1"})  # noqa: E731
    first = send().json()
    assert send().json()["id"] == first["id"] and len(server.http.get("/v1/videos").json()["data"]) == 1
    bad = server.http.post("/v1/videos", json={"prompt": "a"}, headers={"Idempotency-Key": "a b"})
    assert bad.status_code == 400


def test_a_job_that_fails_says_why_and_leaks_no_path(server, monkeypatch):
    def broken(*_, **__):
        raise OSError(28, "No space left on device", "/secret/path")

    monkeypatch.setattr(media, "thumbnail", broken)
    id = server.create()
    video = server.wait(id, "failed")
    assert video["error"]["code"] == "server_error" and "secret" not in json.dumps(video)
    monkeypatch.undo()
    assert server.wait(server.create())["status"] == "completed"


def test_foreign_pages_and_hosts_are_refused(server):
    wrong_host = server.http.get("/v1/videos", headers={"Host": "evil.example"})
    assert wrong_host.status_code == 403 and wrong_host.json()["error"]["code"] == "wrong_host"
    for origin in ("http://evil.example", "null"):
        answer = server.http.post("/v1/videos", json={"prompt": "a"}, headers={"Origin": origin})
        assert answer.status_code == 403
    assert server.http.get("/v1/videos", headers={"Origin": server.url}).status_code == 200


# ---- operation -------------------------------------------------------------------------------------------------------


def test_health_ready_metrics_and_document(server):
    assert server.http.get("/healthz").text == "ok\n" and server.http.get("/readyz").text == "ok\n"
    server.wait(server.create())
    server.http.request("BREW", "/v1/videos")
    text = server.http.get("/metrics").text
    samples = dict(re.findall(r"^(pylumiere_\S+) (\S+)$", text, re.MULTILINE))
    assert float(samples['pylumiere_jobs_total{outcome="completed"}']) >= 1
    assert float(samples['pylumiere_stage_seconds_count{stage="ssr"}']) >= 1
    assert float(samples["pylumiere_frames_total"]) >= 8 and float(samples["pylumiere_store_completed_jobs"]) >= 1
    assert float(samples['pylumiere_engine_memory_bytes{kind="weights"}']) > 0 and "BREW" not in text
    assert float(samples['pylumiere_engine_calls_by_windows{stage="ssr",windows="1"}']) >= 1
    assert any(name.startswith('pylumiere_requests_total{method="POST",route="/v1/videos"') for name in samples)
    document = server.http.get("/openapi.json").json()
    assert document["paths"].keys() >= {"/v1/videos", "/v1/videos/{video_id}", "/v1/videos/{video_id}/content"}
    assert set(document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]) == {
        "application/json", "multipart/form-data",
    }  # fmt: skip
    assert "422" not in json.dumps(document)


def test_seconds_become_frames():
    assert [frames_for(s, 16, 8) for s in (0.5, 0.3, 0.2, 0.001)] == [8, 5, 3, 1]
    assert frames_for(1, 8, 8) == 8 and frames_for(5, 16, 80) == 80
    with pytest.raises(InvalidRequest, match=r"seconds=8: this server makes up to 5 s \(80 frames\)"):
        frames_for(8, 16, 80)


def test_warnings_of_the_client_are_about_openai_only(server):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        server.openai().videos.list()
    assert all("Sora" in str(w.message) for w in caught)
