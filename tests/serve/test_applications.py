"""Every application over HTTP gives the engine's own bytes; what is wrong with an input is said in one line."""

from __future__ import annotations

import base64
import io
import json
import time

import av
import numpy as np
import openai
import pytest
from PIL import Image
from support.media import sound_file

from pylumiere.media.inputs import request_fields
from pylumiere.media.video import read_video
from pylumiere.serve.app import Limits

from .conftest import SLOW, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
REGION = np.zeros((32, 32), np.uint8)
REGION[8:24, 8:24] = 255


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def mp4(frames, rate=16):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


STILL, OTHER, MASK, CLIP = png(PIXELS[0]), png(PIXELS[1]), png(REGION), mp4(PIXELS)
MASKS = mp4([np.repeat(np.roll(REGION, t, 1)[..., None], 3, 2) for t in range(8)])

# Name: the first picture or clip, further fields of the request, and the same for `request_fields` and the engine.
APPLICATIONS = {
    "image to video": (STILL, {}, {"image": STILL}, {}),
    "keyframes": (STILL, {"keyframes": {"5": url(OTHER), "last": url(STILL)}},
                  {"image": STILL, "keyframes": {5: OTHER, -1: STILL}}, {}),
    "last frame": (None, {"keyframes": {"-1": url(OTHER)}}, {"keyframes": {-1: OTHER}}, {}),
    "inpainting": (CLIP, {"mask": url(MASK)}, {"video": CLIP, "mask": MASK}, {}),
    "inpainting, a mask that moves": (CLIP, {"mask": url(MASKS, "video/mp4")}, {"video": CLIP, "mask": MASKS}, {}),
    "outpainting": (CLIP, {"expand": {"left": 8, "top": 2}}, {"video": CLIP}, {"expand": {"left": 8, "top": 2}}),
    "outpainting, in words": (CLIP, {"expand": "left=8,top=2"}, {"video": CLIP}, {"expand": {"left": 8, "top": 2}}),
    "cinemagraph": (STILL, {"mask": url(MASK)}, {"image": STILL, "mask": MASK}, {}),
    "stylised": (None, {"style": "bold", "style_strength": 0.5}, {}, {"style": "bold", "style_strength": 0.5}),
    "video to video": (CLIP, {"strength": 0.5}, {"video": CLIP}, {"strength": 0.5}),
    "cut": (CLIP, {"strength": 0.5, "seconds": "0.25"}, {"video": CLIP, "num_frames": 4}, {"strength": 0.5}),
    "long": (STILL, {"num_frames": 20}, {"image": STILL, "num_frames": 20}, {}),
    "loop": (None, {"loop": True}, {}, {"loop": True}),
    "padded": (STILL, {"fit": "pad", "size": "48x32"}, {"image": STILL}, {"fit": "pad", "width": 48, "height": 32}),
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(engine, tmp_path_factory):
    """The file that the engine's own clip gives."""
    made = {}

    def make(name):
        if name not in made:
            _, _, files, fields = APPLICATIONS[name]
            path = tmp_path_factory.mktemp("expected") / "clip.mp4"
            engine.generate("a", seed=7, **request_fields(**files), **fields).save(path)
            made[name] = path.read_bytes()
        return made[name]

    return make


@pytest.mark.parametrize("name", APPLICATIONS)
def test_through_the_official_client_and_as_json(server, expected, name):
    reference, extra, _, _ = APPLICATIONS[name]
    client, options = server.openai(), dict(extra)
    openais = {field: options.pop(field) for field in ("seconds", "size") if field in options}
    if reference is not None:
        openais["input_reference"] = ("x", reference)  # the name tells nothing
    video = client.videos.create_and_poll(prompt="a", extra_body={"seed": 7, **options}, **openais)
    assert video.status == "completed", video.error
    assert client.videos.download_content(video.id).read() == expected(name)
    body = {"prompt": "a", "seed": 7, **extra}
    if reference is not None:
        body["input_reference"] = {"image_url": url(reference)}
    answer = server.http.post("/v1/videos", json=body)
    assert answer.status_code == 200, answer.text
    server.wait(answer.json()["id"])
    assert server.http.get(f"/v1/videos/{answer.json()['id']}/content").content == expected(name)


def test_files_of_a_form(server, expected):
    files = {"prompt": (None, "a"), "seed": (None, "7"), "input_reference": ("a", STILL), "mask": ("m", MASK)}
    video = server.http.post("/v1/videos", files=files).json()
    assert video["application"] == "cinemagraph"
    server.wait(video["id"])
    assert server.http.get(f"/v1/videos/{video['id']}/content").content == expected("cinemagraph")
    files = {"prompt": (None, "a"), "seed": (None, "7"), "input_reference": ("a", STILL), "keyframes[5]": ("b", OTHER),
             "keyframes[last]": ("c", STILL)}  # fmt: skip
    id = server.http.post("/v1/videos", files=files).json()["id"]
    server.wait(id)
    assert server.http.get(f"/v1/videos/{id}/content").content == expected("keyframes")


def test_a_request_is_repeated_in_the_answer(server):
    fields = {"style": "bold", "style_strength": 0.5, "loop": True, "fit": "pad", "num_frames": 6}
    video = server.http.post("/v1/videos", json={"prompt": "a", **fields}).json()
    assert {name: video[name] for name in fields} == fields and video["application"] == "text to video"
    clip = {"prompt": "a", "strength": 0.5, "input_reference": {"image_url": url(mp4(PIXELS, rate=8))}, "seconds": "1"}
    video = server.http.post("/v1/videos", json=clip).json()
    assert (video["fps"], video["num_frames"], video["seconds"]) == (8, 8, "1")  # the clip's rate counts
    assert (video["application"], video["strength"]) == ("video to video", 0.5)


# ---- edit, extend, remix ---------------------------------------------------------------------------------------------


def frames_of(client, id, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(client.videos.download_content(id).read())
    return read_video(tmp_path / "clip.mp4").frames


def by_id(id, **extra):
    """openai 3.52 takes only files for `video`, against its own types; so the reference goes round it."""
    return {"video": openai.omit, "extra_body": {"video": {"id": id}, **extra}}


def test_edit_a_file_and_a_video(server, engine, tmp_path):
    client = server.openai()
    video = client.videos.poll(client.videos.edit(prompt="a", video=("x", CLIP), extra_body={"seed": 7}).id)
    assert (video.application, video.strength, video.status) == ("video to video", 0.6, "completed")
    engine.generate("a", seed=7, strength=0.6, **request_fields(video=CLIP)).save(tmp_path / "expected.mp4")
    assert client.videos.download_content(video.id).read() == (tmp_path / "expected.mp4").read_bytes()

    source = client.videos.create_and_poll(prompt="a", size="48x32", extra_body={"num_frames": 6})
    edits = client.videos.edit(prompt="b", **by_id(source.id, strength=0.5, seed=1))
    video = client.videos.poll(edits.id)
    assert (video.status, video.size, video.num_frames, video.strength) == ("completed", "48x32", 6, 0.5)
    assert video.remixed_from_video_id == source.id
    client.videos.delete(source.id)  # the edit has the clip
    again = client.videos.poll(client.videos.remix(video.id, prompt="b").id)
    assert np.array_equal(frames_of(client, again.id, tmp_path), frames_of(client, video.id, tmp_path))
    masked = client.videos.edit(prompt="a", video=("x", CLIP), extra_body={"mask": url(MASK)})
    assert (masked.application, masked.strength) == ("inpainting", 1.0)


def test_extend_a_file_and_a_video(server, engine, tmp_path):
    client = server.openai()
    video = client.videos.extend(prompt="a", seconds="0.25", video=("x", CLIP), extra_body={"seed": 7})
    video = client.videos.poll(video.id)
    assert (video.status, video.application, video.num_frames) == ("completed", "extension", 12)
    clip = request_fields(video=CLIP)["video"]
    longer, mask = np.concatenate([clip, clip[:4]]), np.zeros((12, 32, 32), bool)
    mask[8:] = True
    result = engine.generate("a", seed=7, video=longer, mask=mask)
    assert (result.frames[:8] == clip).all() and (result.frames[8:] != longer[8:]).any()
    result.save(tmp_path / "expected.mp4")
    assert client.videos.download_content(video.id).read() == (tmp_path / "expected.mp4").read_bytes()
    again = client.videos.poll(client.videos.extend(prompt="a", seconds="0.5", **by_id(video.id)).id)
    assert (again.status, again.num_frames, again.remixed_from_video_id) == ("completed", 20, video.id)


def test_what_edit_and_extend_refuse(server):
    client = server.openai()
    slow = client.videos.create(prompt="a", extra_body=SLOW)
    unknown = by_id("video_" + "0" * 32)
    for call, text in [
        (lambda: client.videos.edit(prompt="a", video=("x", STILL)), "video is a picture"),
        (lambda: client.videos.edit(prompt="a", video=("x", sound_file())), "video holds no video"),
        (lambda: client.videos.edit(prompt="a", **by_id(slow.id)), "only completed"),
        (lambda: client.videos.edit(prompt="a", **unknown), "there is no video"),
        (lambda: client.videos.extend(prompt="a", seconds="1", **unknown), "there is no video"),
        (lambda: client.videos.extend(prompt="a", video=("x", CLIP), seconds="four"), "seconds="),
        (lambda: client.videos.extend(prompt="a", video=("x", CLIP), seconds="3.9"), "more than 2 frames"),
    ]:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=text):
            call()
    assert server.http.post("/v1/videos/edits", json={"prompt": "a"}).json()["error"]["param"] == "video"


# ---- what is refused -------------------------------------------------------------------------------------------------

GREY = png(np.full((32, 32), 255, np.uint8))
BAD = {
    "mask of another size": (STILL, {"mask": url(png(REGION[:16]))}, "mask", "mask is 16 x 32"),
    "mask of another length": (CLIP, {"mask": url(mp4([np.repeat(REGION[..., None], 3, 2)] * 5))}, "mask", "5 frames"),
    "mask all white": (STILL, {"mask": url(GREY)}, "mask", "white all over"),
    "mask all black": (STILL, {"mask": url(png(np.zeros((32, 32), np.uint8)))}, "mask", "black all over"),
    "mask alone": (None, {"mask": url(MASK)}, "mask", "without a video or an image"),
    "mask is text": (STILL, {"mask": url(b"white")}, "mask", "mask is damaged"),
    "mask by path": (STILL, {"mask": "/etc/passwd"}, "mask", "data URL"),
    "image of one pixel": (png(PIXELS[0, :1, :1]), {}, "input_reference", "1 x 1"),
    "image too large": (None, {"input_reference": "bomb"}, "input_reference", "more than"),
    "sound only": (sound_file(), {}, "input_reference", "holds no video"),
    "clip truncated": (CLIP[: len(CLIP) // 2], {}, "input_reference", "damaged"),
    "clip without frames": (CLIP[:0], {}, "input_reference", "damaged"),
    "clip too long": (mp4(PIXELS[:1].repeat(65, 0)), {"strength": 0.5}, "input_reference", "more than 64 frames"),
    "clip of no use": (CLIP, {}, "input_reference", "strength"),
    "strength of 0": (CLIP, {"strength": 0}, "strength", "strength"),
    "strength of 1.5": (CLIP, {"strength": 1.5}, "strength", "strength"),
    "strength without a clip": (STILL, {"strength": 0.5}, "strength", "without a video"),
    "style of another model": (None, {"style": "ink"}, "style", "this model has bold"),
    "style by path": (None, {"style": "../../etc/passwd"}, "style", "this model has bold"),
    "style strength alone": (None, {"style_strength": 0.5}, "style_strength", "without a style"),
    "expand of a word": (STILL, {"expand": "left"}, "expand", "EDGE=PIXELS"),
    "expand of no edge": (STILL, {"expand": {"middle": 3}}, "expand", "edges"),
    "expand of everything": (STILL, {"expand": {"left": 31}}, "expand", "no place"),
    "expand alone": (None, {"expand": {"left": 3}}, "expand", "without a video or an image"),
    "keyframe outside": (None, {"keyframes": {"8": url(STILL)}}, "keyframes", "outside the clip"),
    "keyframe twice": (STILL, {"keyframes": {"0": url(STILL)}}, "keyframes", "given twice"),
    "keyframe of a word": (None, {"keyframes": {"middle": url(STILL)}}, "keyframes", "should be"),
    "keyframe by path": (None, {"keyframes": {"../../x": url(STILL)}}, "keyframes", "no frame"),
    "keyframe is a clip": (None, {"keyframes": {"0": url(sound_file())}}, "keyframes", "holds no video"),
    "fit": (STILL, {"fit": "zoom"}, "fit", "crop"),
    "loop": (None, {"loop": "yes"}, "loop", "loop"),
    "too long": (None, {"num_frames": 65}, "num_frames", "up to 64 frames"),
    "timeout": (None, {"timeout": 0}, "timeout", "timeout"),
}


def bomb():
    """A PNG whose header promises 20,000 x 20,000 pixels."""
    data = bytearray(png(np.zeros((2, 2, 3), np.uint8)))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("reference, fields, param, text", BAD.values(), ids=BAD)
def test_bad_input_is_named_and_nothing_is_stored(server, reference, fields, param, text):
    body = {"prompt": "a", **fields}
    if fields.get("input_reference") == "bomb":
        reference = bomb()
    if reference is not None:
        body["input_reference"] = {"image_url": url(reference)}
    answer = server.http.post("/v1/videos", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param, answer.text
    assert text in error["message"] and "\n" not in error["message"] and len(error["message"]) < 300
    assert server.http.get("/v1/videos").json()["data"] == []
    assert not list((server.service.store.folder / "inputs").iterdir())


def test_what_is_decoded_is_bounded(serve):
    server = serve(limits=Limits(decoded_bytes=5 * 32 * 32 * 3))
    body = {"prompt": "a", "strength": 0.5, "input_reference": {"image_url": url(CLIP)}}
    assert "more than 5 frames of 32 x 32" in server.http.post("/v1/videos", json=body).json()["error"]["message"]
    assert server.http.post("/v1/videos", json={**body, "num_frames": 5}).status_code == 200  # cut before


def test_files_that_are_not_known(server):
    for name in ("keyframes", "keyframes[a/b]", "image", "../x"):
        answer = server.http.post("/v1/videos", files={"prompt": (None, "a"), name: ("a.png", STILL)})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "unknown_field", name
    both = {"prompt": (None, "a"), "mask": (None, url(MASK))}
    answer = server.http.post("/v1/videos", files=[*both.items(), ("mask", ("m", MASK))])
    assert "given twice" in answer.json()["error"]["message"]


# ---- jobs with inputs, and with a limit of time ----------------------------------------------------------------------


def test_inputs_survive_a_restart_and_go_with_the_job(serve, expected):
    server = serve(concurrency=1)
    blocker = server.create(**SLOW)
    server.wait(blocker, "in_progress")
    body = {"prompt": "a", "seed": 7, "mask": url(MASK), "input_reference": {"image_url": url(CLIP)}}
    id = server.http.post("/v1/videos", json=body).json()["id"]
    inputs = server.service.store.folder / "inputs"
    assert sorted(file.name for file in (inputs / id).iterdir()) == ["mask", "video"]
    server.close()
    server = serve(concurrency=1)
    server.http.delete(f"/v1/videos/{blocker}")
    assert server.wait(id)["application"] == "inpainting"
    assert server.http.get(f"/v1/videos/{id}/content").content == expected("inpainting")
    server.http.delete(f"/v1/videos/{id}")
    wait_until(lambda: not list(inputs.iterdir()))  # the download may still hold them


def test_a_clip_that_is_not_done_in_time_fails(serve):
    server = serve(limits=Limits(deadline=0.3), concurrency=1)
    begun = time.monotonic()
    running = server.create(**SLOW)
    waiting = server.create(**SLOW)
    for id in (running, waiting):
        error = server.wait(id, "failed")["error"]
        assert error["code"] == "deadline_exceeded" and "within its 0.3 s" in error["message"], error
    assert time.monotonic() - begun < 3
    wait_until(lambda: server.service.runner.num_running == 0)
    patient = server.openai().videos.create_and_poll(prompt="a", extra_body={"timeout": 60})  # more than the default
    assert patient.status == "completed"


def test_the_answer_holds_no_file(server):
    body = {"prompt": "a", "mask": url(MASK), "input_reference": {"image_url": url(STILL)}}
    text = json.dumps(server.http.post("/v1/videos", json=body).json())
    assert "base64" not in text and len(text) < 2000
