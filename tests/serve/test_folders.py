"""A diffusers folder that is shifted in time, over HTTP: what it takes, LoRA by name, single pictures, the command."""

from __future__ import annotations

import io
import json
import sqlite3

import numpy as np
import openai
import pytest
from PIL import Image

from pylumiere.engine import Engine
from pylumiere.errors import InvalidRequest
from pylumiere.media.inputs import request_fields
from pylumiere.serve.loras import find_loras
from pylumiere.serve.server import ServeOptions
from pylumiere.serve.server import serve as serve_command

from .conftest import Process
from .test_api import read_events
from .test_applications import APPLICATIONS, CLIP, MASK, STILL, url

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")
SHORT = {"num_inference_steps": 2, "seed": 7}


def content(server, id, variant="video"):
    return server.http.get(f"/v1/videos/{id}/content", params={"variant": variant})


def saved(video, folder):
    video.save(folder / "expected.mp4")
    return (folder / "expected.mp4").read_bytes()


def refusal(server, **fields):
    answer = server.http.post("/v1/videos", json={"prompt": "a dog", **fields})
    assert answer.status_code == 400, answer.text
    assert server.http.get("/v1/videos").json()["data"] == []
    error = answer.json()["error"]
    assert "\n" not in error["message"] and len(error["message"]) < 300
    return error


# ---- the model -------------------------------------------------------------------------------------------------------


def test_the_official_client_gets_the_engine_s_clip(shift_server, shift_engine, tmp_path):
    client = shift_server.openai()
    video = client.videos.create_and_poll(prompt="a dog", extra_body=SHORT)
    assert (video.status, video.num_frames, video.size, video.fps) == ("completed", 16, "16x16", 8)
    expected = shift_engine.generate("a dog", **SHORT)
    assert client.videos.download_content(video.id).read() == saved(expected, tmp_path)


def test_the_model_object_says_what_the_model_is(shift_server, shift_engine):
    [model] = shift_server.openai().models.list().data
    assert model.id == "tiny-sd" and model.stages == [{"name": "unet", "family": "unet2d"}]
    assert model.decoder == "autoencoder_kl" and model.applications == ["text to video", "video to video"]
    assert model.loras == ["Ink wash.v2", "look", "other"] and model.styles == []
    assert model.defaults["num_frames"] == shift_engine.config.first.network.num_frames == 16


def body_of(name):
    reference, fields, _, _ = APPLICATIONS[name]
    return {**fields, **({} if reference is None else {"input_reference": {"image_url": url(reference)}})}


REFUSED = {
    "image to video": "input_reference",
    "keyframes": "keyframes",
    "last frame": "keyframes",
    "inpainting": "mask",
    "outpainting": "expand",
    "cinemagraph": "mask",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_pictures_is_refused_by_its_field(shift_server, name):
    error = refusal(shift_server, **body_of(name))
    assert error["param"] == REFUSED[name] and "take no pictures" in error["message"]


@pytest.mark.parametrize("name", ["text to video", *REFUSED, "video to video"])
def test_what_the_model_takes_is_what_it_says(server, name):
    """The demo's kind takes everything."""
    body = {} if name == "text to video" else body_of(name)
    video = server.http.post("/v1/videos", json={"prompt": "a", **SHORT, **body}).json()
    assert video["application"] in server.http.get("/v1/models/tiny").json()["applications"]


def test_a_clip_is_made_again_and_no_clip_is_extended(shift_server, shift_engine, tmp_path):
    client = shift_server.openai()
    video = client.videos.edit(prompt="a cat", video=("x", CLIP), extra_body=SHORT)
    video = client.videos.poll(video.id)
    assert (video.status, video.application, video.strength) == ("completed", "video to video", 0.6)
    expected = shift_engine.generate("a cat", strength=0.6, **request_fields(video=CLIP), **SHORT)
    assert client.videos.download_content(video.id).read() == saved(expected, tmp_path)
    for call, param in [
        (lambda: client.videos.edit(prompt="a", video=("x", CLIP), extra_body={"mask": url(MASK)}), "mask"),
        (lambda: client.videos.edit(prompt="a", video=("x", CLIP), extra_body={"expand": {"left": 8}}), "expand"),
        (lambda: client.videos.extend(prompt="a", seconds="1", video=("x", CLIP)), "video"),
    ]:
        with pytest.raises(openai.BadRequestError, match="take no pictures") as info:
            call()
        assert info.value.param == param


def test_progress_tells_the_stage_and_its_place(shift_server):
    events = read_events(shift_server, shift_server.create(**SHORT))
    progress = [data for name, data in events if name == "progress"]
    places = {(one["stage"], one["stage_index"], one["num_stages"]) for one in progress}
    assert places == {("unet", 0, 2), ("decoder", 1, 2)}
    final = [one["frames_final"] for one in progress if one["stage"] == "decoder"]
    assert final == sorted(final) and final[-1] == 16 == progress[-1]["num_frames"]
    assert [data["frame"] for name, data in events if name == "preview"] == list(range(16))
    text = shift_server.http.get("/metrics").text
    assert 'pylumiere_stage_seconds_count{stage="decoder"}' in text


# ---- one frame -------------------------------------------------------------------------------------------------------


def test_one_frame_is_a_picture_to_the_byte(shift_server, shift_engine):
    client = shift_server.openai()
    video = client.videos.create_and_poll(prompt="a dog", extra_body={"num_frames": 1, **SHORT})
    picture = client.videos.download_content(video.id, variant="image").read()
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), shift_engine.generate("a dog", num_frames=1, **SHORT).frames[0])
    assert content(shift_server, video.id).headers["content-type"] == "video/mp4"
    answer = shift_server.http.get(f"/v1/videos/{video.id}/content?variant=image", headers={"Range": "bytes=1-3"})
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (206, b"PNG", "image/png")


def test_of_a_clip_the_image_is_the_first_frame(server, engine):
    id = server.create(seed=7, size="48x32")
    server.wait(id)
    with Image.open(io.BytesIO(content(server, id, "image").content)) as image:
        expected = engine.generate("a red circle", seed=7, width=48, height=32).frames[0]
        assert np.array_equal(np.asarray(image), expected)


# ---- LoRA ------------------------------------------------------------------------------------------------------------

LORAS = {
    "one, at its full strength": ("look", ["look"]),
    "one, at a strength": ("look:0.5", ["look:0.5"]),
    "a name with a space and dots": ("Ink wash.v2:-0.5", ["Ink wash.v2:-0.5"]),
    "two, in their order": (["look:0.5", "Ink wash.v2"], ["look:0.5", "Ink wash.v2"]),
}


@pytest.mark.parametrize("given, listed", LORAS.values(), ids=LORAS)
def test_a_lora_by_name_is_the_engine_s_by_file(shift_server, shift_engine, loras, tmp_path, given, listed):
    client = shift_server.openai()
    fields = {"num_frames": 2, **SHORT}
    video = client.videos.create_and_poll(prompt="a dog", extra_body={"lora": given, **fields})
    assert video.status == "completed" and video.lora == listed, video.error
    files = [str(loras / entry.replace(name, f"{name}.safetensors")) for entry in listed
             for name in ("look", "Ink wash.v2") if entry.startswith(name)]  # fmt: skip
    expected = saved(shift_engine.generate("a dog", lora=files, **fields), tmp_path)
    assert client.videos.download_content(video.id).read() == expected
    assert expected != saved(shift_engine.generate("a dog", **fields), tmp_path)
    again = client.videos.poll(client.videos.remix(video.id, prompt="a dog").id)
    assert again.lora == listed and client.videos.download_content(again.id).read() == expected


def test_loras_in_a_form(shift_server):
    """As OpenAI's client writes a list beside a file, and as curl writes one."""
    client = shift_server.openai()
    extra = {"lora": ["look:0.5", "Ink wash.v2"], "strength": 0.5, **SHORT}
    video = client.videos.create(prompt="a dog", input_reference=("x", CLIP), extra_body=extra)
    assert video.lora == ["look:0.5", "Ink wash.v2"] and video.application == "video to video"
    post = shift_server.http.post
    one = [("prompt", (None, "a")), ("lora", (None, "look:0.5"))]
    assert post("/v1/videos", files=one).json()["lora"] == ["look:0.5"]
    for both in ([*one, ("lora[]", (None, "look"))], [*one, ("lora", (None, "look"))]):
        answer = post("/v1/videos", files=both)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora", answer.text


BAD = {
    "unknown": ("ink", "lora='ink': this server has Ink wash.v2, look, other"),
    "unknown, with a strength": ("ink:0.5", "lora='ink': this server has"),
    "the second": (["look", "ink"], "lora='ink'"),
    "by file": ("look.safetensors", "this server has"),
    "in a folder below": ("sub/below", "this server has"),
    "below by name": ("below", "this server has"),
    "relative path": ("../loras/look", "this server has"),
    "absolute path": ("/etc/passwd", "this server has"),
    "path with a strength": ("/etc/passwd:0.5", "lora='/etc/passwd'"),
    "encoded": ("..%2f..%2fetc%2fpasswd", "this server has"),
    "backslashes": ("..\\look", "this server has"),
    "null byte": ("look\0", "this server has"),
    "case": ("LOOK", "this server has"),
    "empty": ("", "lora"),
    "no name": (":0.5", "lora"),
    "strength": ("look:5", "allowed are -4..4"),
    "strength of no number": ("look:nan", "lora"),
    "too many": (["look"] * 9, "lora"),
    "none of a list": ([], "lora"),
    "a mapping": ({"look": 1}, "lora"),
    "long": ("x" * 201, "lora"),
    "for another model": ("other", "lora='other' was made for another model"),
}


@pytest.mark.parametrize("given, text", BAD.values(), ids=BAD)
def test_a_lora_that_is_not_there_is_refused_by_name(shift_server, loras, given, text):
    error = refusal(shift_server, lora=given)
    assert error["param"] == "lora" and text in error["message"]
    assert str(loras) not in error["message"]


def test_the_real_path_of_a_lora_is_refused_too(shift_server, loras):
    assert "this server has" in refusal(shift_server, lora=str(loras / "look.safetensors"))["message"]


def test_a_file_that_goes_is_told_by_its_name(serve, shift_engine, loras, tmp_path):
    (tmp_path / "gone.safetensors").write_bytes((loras / "look.safetensors").read_bytes())
    server = serve(engine=shift_engine, loras=tmp_path)
    (tmp_path / "gone.safetensors").unlink()
    assert refusal(server, lora="gone")["message"] == "lora='gone': no such file"


def test_a_lora_after_a_restart_without_it_fails_with_its_name(serve, shift_engine, loras):
    first = serve(engine=shift_engine, loras=loras, concurrency=1)
    running = first.create(num_inference_steps=500)
    first.wait(running, "in_progress")
    waiting = first.create(lora="look", **SHORT)
    first.close()
    second = serve(engine=shift_engine, concurrency=1)
    second.http.delete(f"/v1/videos/{running}")
    error = second.wait(waiting, "failed")["error"]
    assert error == {"code": "invalid_request", "message": "lora='look': this server has none"}


def test_a_backend_that_holds_graphs_says_so(serve, shift_engine, loras, monkeypatch):
    monkeypatch.setattr(shift_engine.backend, "takes_styles", False, raising=False)  # as artefacts.ArtefactBackend's
    server = serve(engine=shift_engine, loras=loras)
    assert server.http.get("/v1/models").json()["data"][0]["loras"] == []
    error = refusal(server, lora="look:0.5")
    assert error["param"] == "lora" and "lora='look'" in error["message"] and "holds a graph" in error["message"]
    assert str(loras) not in error["message"]
    assert server.wait(server.create(num_frames=1, **SHORT))["status"] == "completed"


def test_folders_of_loras(loras, tmp_path, caplog):
    assert list(find_loras(loras)) == ["Ink wash.v2", "look", "other"] and find_loras(None) == {}
    for name in ("a", "b:0.5", "-c", ".d", "e\n"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    assert find_loras(tmp_path) == {"a": tmp_path / "a.safetensors"} and "b:0.5" in caplog.text
    for folder, reason in ((tmp_path / "none", "No such file"), (loras / "notes.txt", "Not a directory")):
        with pytest.raises(InvalidRequest, match=reason):
            find_loras(folder)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_serves_the_folder(sd_folder, loras, tmp_path):
    server = Process(sd_folder, tmp_path / "data", "--temporal-shift", "4", "--loras", str(loras))
    try:
        client = openai.OpenAI(base_url=f"{server.start()}/v1", api_key="any")
        assert client.models.list().data[0].loras == ["Ink wash.v2", "look", "other"]
        video = client.videos.create_and_poll(prompt="a dog", extra_body={"num_frames": 3, "lora": "look", **SHORT})
        assert video.status == "completed"
        found = client.videos.download_content(video.id).read()
    finally:
        server.close()
    with Engine.load(sd_folder, temporal_shift=4) as engine:
        lora = str(loras / "look.safetensors")
        assert found == saved(engine.generate("a dog", num_frames=3, lora=lora, **SHORT), tmp_path)


def test_options_that_do_not_fit_are_refused(model, tmp_path):
    with pytest.raises(InvalidRequest, match="temporal_shift"):
        serve_command(ServeOptions(model=str(model), port=0, data=tmp_path / "a", temporal_shift=8))
    with pytest.raises(InvalidRequest, match="LoRA folder"):
        serve_command(ServeOptions(model=str(model), port=0, data=tmp_path / "b", loras=tmp_path / "none"))


# ---- what was before -------------------------------------------------------------------------------------------------


def test_a_request_of_an_older_client_is_taken(server, engine, tmp_path):
    """Every field that version 0.1 of the service knew, and no other."""
    old = {
        "prompt": "a red circle", "model": "tiny", "seconds": "0.25", "size": "48x32", "negative_prompt": "blur",
        "num_inference_steps": 3, "guidance_scale": 1.5, "seed": 7, "sampler": "ddim", "style": "bold",
        "style_strength": 0.5, "window_frames": 4, "window_overlap": 2, "timeout": 60, "fps": 16, "fit": "pad",
        "loop": False, "input_reference": {"image_url": url(STILL)},
    }  # fmt: skip
    answer = server.http.post("/v1/videos", json=old)
    assert answer.status_code == 200, answer.text
    video = server.wait(answer.json()["id"])
    names = ("negative_prompt", "num_inference_steps", "guidance_scale", "seed", "sampler", "style", "size", "fit")
    assert {name: video[name] for name in names} == {name: old[name] for name in names}
    same = {name: old[name] for name in (*names[:6], "fit", "style_strength", "window_frames", "window_overlap")}
    shape = {"num_frames": 4, "width": 48, "height": 32}
    expected = engine.generate("a red circle", **same, **shape, **request_fields(image=STILL))
    assert content(server, video["id"]).content == saved(expected, tmp_path)


OLD_REQUEST = {"prompt": "a", "seed": 7, "num_frames": 8}
OLD_PLAN = {"num_frames": 8, "fps": 16.0, "height": 32, "width": 32, "seed": 7, "sampler": "dpmpp_2m",
            "num_inference_steps": 4, "guidance_scale": 2.0, "application": "text to video"}  # fmt: skip


def test_jobs_of_an_older_server_are_shown_and_run(serve, engine, tmp_path):
    """Records without LoRA, results without a picture of the first frame."""
    serve().close()
    folder = tmp_path / "data"
    done, waiting = "video_" + "1" * 32, "video_" + "2" * 32
    with sqlite3.connect(folder / "jobs.sqlite3") as db:
        for id, status in ((done, "completed"), (waiting, "queued")):
            db.execute(
                "INSERT INTO jobs (id, owner, status, created_at, ended_at, model, request, plan, inputs) "
                "VALUES (?, '', ?, 1, ?, 'tiny', ?, ?, '[]')",
                (id, status, 2 if status == "completed" else None, json.dumps(OLD_REQUEST), json.dumps(OLD_PLAN)),
            )
    db.close()
    (folder / "videos" / done).mkdir()
    (folder / "videos" / done / "video.mp4").write_bytes(b"a clip")
    server = serve()
    video = server.http.get(f"/v1/videos/{done}").json()
    assert (video["status"], video["lora"], video["application"]) == ("completed", [], "text to video")
    assert content(server, done).content == b"a clip"
    answer = content(server, done, "image")
    assert answer.status_code == 404 and "without the variant 'image'" in answer.json()["error"]["message"]
    server.wait(waiting)
    assert content(server, waiting).content == saved(engine.generate("a", seed=7, num_frames=8), tmp_path)
    assert content(server, waiting, "image").status_code == 200
