"""Models of three stages, and of one stage and a decoder, over HTTP: the clips that the engine makes."""

from __future__ import annotations

import contextlib

import pytest
from support.testing import write_random_model
from support.toy import latent_model, three_stages

from pylumiere.engine import Engine

from .conftest import Running
from .test_api import read_events

MODELS = {
    "three stages": (three_stages, ["base", "middle", "last"]),
    "a stage and a decoder": (latent_model, ["latents", "decoder"]),
}


@pytest.fixture(scope="module", params=MODELS)
def served(request, tmp_path_factory):
    model, names = MODELS[request.param]
    folder = write_random_model(tmp_path_factory.mktemp("model"), model())
    with (
        Engine.load(folder, precision="fp32") as engine,
        contextlib.closing(Running(engine, tmp_path_factory.mktemp("data"))) as server,
    ):
        yield server, engine, names


def test_a_clip_over_http_is_the_engines(served, tmp_path):
    server, engine, names = served
    fields = {"prompt": "a red circle", "seed": 7, "num_frames": 20}
    job = server.http.post("/v1/videos", json=fields).json()
    events = read_events(server, job["id"])
    told = dict.fromkeys(data["stage"] for kind, data in events if kind == "progress")
    assert names[-1] in told and list(told) == [name for name in names if name in told]  # listening may begin late
    assert server.http.get(f"/v1/videos/{job['id']}").json()["status"] == "completed"
    engine.generate(**fields).save(tmp_path / "clip.mp4")
    assert server.http.get(f"/v1/videos/{job['id']}/content").content == (tmp_path / "clip.mp4").read_bytes()


def test_a_request_that_the_model_does_not_take_is_a_400_in_one_line(served):
    server, engine, _ = served
    most = server.http.get("/v1/models").json()["data"][0]["limits"]["size"]["width"]
    for fields in ({"size": "24x30"}, {"size": f"{2 * most}x{2 * most}"}, {"window_overlap": 9, "window_frames": 4}):
        answer = server.http.post("/v1/videos", json={"prompt": "a dog", **fields})
        assert answer.status_code == 400 and "\n" not in answer.json()["error"]["message"], answer.text
