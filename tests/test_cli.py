"""The command line: what it writes, what it says, its exit codes, and that nothing is left half-written."""

from __future__ import annotations

import json
import os
import pty
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.testing import random_weights, write_random_model

from pylumiere.checkpoints.adapters import fingerprint, save_style
from pylumiere.checkpoints.native import load_checkpoint
from pylumiere.cli import main
from pylumiere.media.inputs import read_image
from pylumiere.media.video import Video, read_video
from pylumiere.networks.stunet.presets import model_preset


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model folder with random weights: 8 frames of 32 x 32."""
    return str(write_random_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def generate(tiny, *arguments):
    return main(["generate", "a red circle", "--model", tiny, "--seed", "7", *arguments])


def test_generate_writes_clip_and_sheet_and_says_where(tiny, folder, capsys):
    assert generate(tiny, "-o", "clip.mp4", "--sheet", "sheet.png") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0].startswith(f"{folder / 'clip.mp4'}: 8 frames, 32 x 32, 16 fps, seed 7")
    assert out.splitlines()[1].startswith(f"{folder / 'sheet.png'}:")
    clip = read_video("clip.mp4")
    assert clip.frames.shape == (8, 32, 32, 3)
    assert clip.fps == 16
    assert clip.frames.std() > 1
    assert read_image("sheet.png").shape[2] == 3
    assert sorted(os.listdir(folder)) == ["clip.mp4", "sheet.png"]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "clip"])
def test_same_seed_same_bytes_streamed_or_not(tiny, folder, name):
    def content(path):
        return [file.read_bytes() for file in sorted(path.iterdir())] if path.is_dir() else path.read_bytes()

    results = []
    for extra in ([], [], ["--stream"]):
        assert generate(tiny, "-o", name, *extra) == 0
        results.append(content(folder / name))
    assert results[0] == results[1] == results[2]
    assert main(["generate", "a red circle", "--model", tiny, "--seed", "8", "-o", name]) == 0
    assert content(folder / name) != results[0]
    assert os.listdir(folder) == [name]


def test_json_is_one_object_with_what_was_done(tiny, folder, capsys):
    options = ["--steps", "3", "--guidance", "2.5", "--frames", "4", "--fps", "8", "-o", "a.mp4"]
    assert generate(tiny, "--json", *options) == 0
    report = json.loads(capsys.readouterr().out)
    expected = {
        "seed": 7, "num_frames": 4, "fps": 8, "height": 32, "width": 32, "num_inference_steps": 3,
        "guidance_scale": 2.5, "prompt": "a red circle", "output": str(folder / "a.mp4"), "sheet": None,
    }  # fmt: skip
    assert {name: report[name] for name in expected} == expected
    assert report["seconds"]["all"] >= report["seconds"]["load"] > 0
    assert report["peak_resident_bytes"] > 2**20


def test_a_seed_is_drawn_and_reported(tiny, folder, capsys):
    assert main(["generate", "x", "--model", tiny, "--json", "-o", "a"]) == 0
    seed = json.loads(capsys.readouterr().out)["seed"]
    assert main(["generate", "x", "--model", tiny, "--seed", str(seed), "-o", "b"]) == 0
    assert np.array_equal(read_video("a").frames, read_video("b").frames)


def test_given_pixels_reach_the_model(tiny, folder):
    given = np.zeros((8, 32, 32, 3), np.uint8)
    given[..., :16, 0] = 255
    Video(given, 16).save("given")
    Video(given[:1], 16).save("picture")
    half = np.zeros((1, 32, 32, 3), np.uint8)
    half[:, 16:] = 255
    Video(half, 16).save("mask")
    Video(half[:, :12], 16).save("wide")
    network = model_preset("tiny").first.network
    weight = random_weights(network, 7)["conv_out.weight"]
    base = load_checkpoint(Path(tiny)).weights["base"]
    save_style("style.safetensors", {"conv_out.weight": weight}, network, fingerprint(base))
    assert generate(tiny, "-o", "plain") == 0
    seen = [read_video("plain").frames]
    for name, arguments in {
        "image": ["--image", "picture"],
        "start": ["--video", "given", "--strength", "0.5"],
        "masked": ["--video", "given", "--mask", "mask"],
        "crop": ["--image", "wide"],
        "pad": ["--image", "wide", "--fit", "pad"],
        "keyframes": ["--keyframes", "0:picture", "last:mask"],
        "expand": ["--video", "given", "--expand", "left=8"],
        "cinemagraph": ["--image", "picture", "--mask", "mask"],
        "loop": ["--loop"],
        "styled": ["--style", "style.safetensors"],
        "half styled": ["--style", "style.safetensors", "--style-strength", "0.5"],
        "negative": ["--negative", "blue", "--guidance", "3"],
        "sampler": ["--sampler", "ddpm"],
    }.items():
        assert generate(tiny, "-o", name, *arguments) == 0
        frames = read_video(name).frames
        assert all(not np.array_equal(frames, other) for other in seen), name
        seen.append(frames)


def test_upscale_of_any_length_and_through_pipes(tiny, folder, capsys):
    frames = np.random.default_rng(0).integers(0, 256, (11, 8, 16, 3), np.uint8)
    Video(frames, 12).save("small.mp4")
    assert main(["upscale", "small.mp4", "--model", tiny, "-o", "large.mp4", "--json", "--sheet", "s.png"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_frames"], report["height"], report["width"], report["fps"]) == (11, 16, 32, 12)
    assert read_video("large.mp4").frames.shape == (11, 16, 32, 3)
    with open("small.mp4", "rb") as source, open("piped.mp4", "wb") as target:
        command = [sys.executable, "-P", "-m", "pylumiere.cli", "upscale", "-", "--model", tiny, "-o", "-"]
        done = subprocess.run(command, stdin=source, stdout=target, stderr=subprocess.PIPE, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(b"-: 11 frames")
    assert read_video("piped.mp4").frames.shape == (11, 16, 32, 3)
    assert sorted(os.listdir(folder)) == ["large.mp4", "piped.mp4", "s.png", "small.mp4"]
    # On a pipe the length is not known in advance; the windows are the same all the same. (An encoder that is told the
    # frames' own times, which a pipe does not tell, spends its bits otherwise.)
    for source, given, output in (("small.mp4", None, "read"), ("-", "small.mp4", "piped")):
        command = [sys.executable, "-P", "-m", "pylumiere.cli", "upscale", source, "--model", tiny]
        with open(given or os.devnull, "rb") as stdin:
            subprocess.run([*command, "-o", output], stdin=stdin, check=True, timeout=120)
    assert np.array_equal(read_video("piped").frames, read_video("read").frames)
    assert main(["upscale", "-", "--model", tiny, "-o", "looped.mp4", "--loop"]) == 2
    assert capsys.readouterr().err == "pylumiere: --loop needs an input whose length is known; - is a pipe\n"
    assert main(["upscale", "small.mp4", "--model", tiny, "-o", "looped.mp4", "--loop"]) == 0
    assert not np.array_equal(read_video("looped.mp4").frames, read_video("large.mp4").frames)


def write_bad_files(folder):
    greys = [("wide", (32, 16), 99), ("black", (32, 16), 0), ("white", (32, 16), 255), ("tiny", (1, 1), 9)]
    for name, size, grey in greys:
        Image.new("L", size, grey).save(folder / f"{name}.png")
    Image.fromarray(np.eye(2) > 0).save(folder / "dot.png")
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    packed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    diagonal = 255 * np.eye(16, dtype=np.uint8)[None, :, :, None].repeat(3, -1)
    for name, count in [("two", 2), ("three", 3)]:
        Video(diagonal.repeat(count, 0), 16).save(folder / name)
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    Video(noise, 16).save(folder / "cut.mp4")
    data = (folder / "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    save_file({"conv_out.weight": torch.zeros(3, 3)}, folder / "style.safetensors")


BAD = {
    "no prompt": ([], "Missing argument 'prompt'"),
    "empty prompt": ([""], "prompt='': should be a text that is not empty"),
    "unknown option": (["x", "--stepz", "3"], "No such option: --stepz"),
    "no frames": (["x", "--frames", "0"], "--frames=0: should be greater than or equal to 1"),
    "negative frames": (["x", "--frames", "-5"], "--frames=-5: should be greater than or equal to 1"),
    "frames that are no number": (["x", "--frames", "many"], "'--frames'"),
    "no steps": (["x", "--steps", "0"], "--steps=0: should be greater than or equal to 1"),
    "absurd size": (["x", "--size", "100000x100000"], "--size (height)=100000: should be less than or equal to"),
    "size that the model does not make": (["x", "--size", "33"], "--size (height)=33: this model makes multiples of"),
    "no size": (["x", "--size", "big"], "--size 'big' is neither WIDTHxHEIGHT nor one number"),
    "unknown sampler": (["x", "--sampler", "plms"], "--sampler='plms': should be 'ddpm', 'ddim', 'dpmpp_2m' or"),
    "guidance nan": (["x", "--guidance", "nan"], "--guidance=nan: should be a finite number"),
    "guidance infinite": (["x", "--guidance", "inf"], "--guidance=inf: should be a finite number"),
    "negative seed": (["x", "--seed", "-1"], "--seed=-1: should be greater than or equal to 0"),
    "strength": (["x", "--strength", "2"], "--strength=2.0: should be less than or equal to 1"),
    "overlap": (["x", "--window", "4", "--overlap", "4"], "overlap=4 should be smaller than"),
    "unknown model": (["x", "--model", "none"], "model 'none' does not exist"),
    "unknown backend": (["x", "--backend", "abacus"], "backend 'abacus'"),
    "unknown device": (["x", "--device", "abacus"], "device 'abacus'"),
    "unknown precision": (["x", "--precision", "int3"], "precision 'int3'"),
    "unknown ending": (["x", "-o", "clip.avi"], "output 'clip.avi': .avi is not one of .mp4, .webm, .gif"),
    "folder that is not there": (["x", "-o", "none/clip.mp4"], "folder 'none' does not exist"),
    "output is a folder": (["x", "-o", "../here.mp4"], "output '../here.mp4' is a folder"),
    "sheet is no png": (["x", "--sheet", "sheet.jpg"], "contact sheet 'sheet.jpg' must end in .png"),
    "image that is not there": (["x", "--image", "none.png"], "input 'none.png' cannot be read: No such file"),
    "keyframe in another form": (["x", "--keyframes", "a.png"], "--keyframes='a.png': should be FRAME:FILE"),
    "keyframe that is not there": (["x", "--keyframes", "0:none.png", "1:none.png"], "input 'none.png' cannot be read"),
    "keyframe outside the clip": (["x", "--keyframes", "8:../wide.png"], "--keyframes: frame 8 is outside the clip"),
    "unknown edge": (["x", "--image", "../wide.png", "--expand", "up=3"], "--expand='up=3': should be EDGE=PIXELS"),
    "expand too far": (["x", "--image", "../wide.png", "--expand", "left=32"], "--expand=left=32: the frame is"),
    "unknown fit": (["x", "--image", "../wide.png", "--fit", "zoom"], "--fit='zoom': should be 'crop', 'pad'"),
    "unknown style": (["x", "--style", "oil"], "--style='oil': no such file, and no style of this model; it has: none"),
    "style strength": (["x", "--style", "oil", "--style-strength", "2"], "--style-strength=2.0: should be less than"),
    "style of another model": (["x", "--style", "../style.safetensors"], "was made for another model"),
    "no strength": (["x", "--video", "../wide.png", "--strength", "0"], "--strength=0.0: should be greater than 0"),
    "mask of another size": (["x", "--image", "../wide.png", "--mask", "../dot.png"], "mask is 2 x 2 and the frames"),
    "mask of another length": (["x", "--video", "../two", "--mask", "../three"], "mask has 3 frames and video has 2"),
    "black mask": (["x", "--image", "../wide.png", "--mask", "../black.png"], "--mask: is black all over"),
    "white mask": (["x", "--image", "../wide.png", "--mask", "../white.png"], "--mask: is white all over"),
    "tiny image": (["x", "--image", "../tiny.png"], "input '../tiny.png' is 1 x 1; at least 2 x 2"),
    "huge image": (["x", "--image", "../huge.png"], "more than 67108864 pixels"),
    "cut video": (["x", "--video", "../cut.mp4", "--strength", "0.5"], "input '../cut.mp4' is damaged"),
    "image that is no image": (["x", "--image", "../text.png"], "input '../text.png' is damaged or no video"),
}


@pytest.mark.parametrize("arguments, text", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(tiny, folder, capsys, arguments, text):
    (folder.parent / "here.mp4").mkdir()
    (folder.parent / "text.png").write_text("not a picture")
    write_bad_files(folder.parent)
    model = [] if "--model" in arguments else ["--model", tiny]
    assert main(["generate", *arguments, *model]) == 2
    out, err = capsys.readouterr()
    assert text in err, err
    assert err.startswith("pylumiere: ")
    assert err.count("\n") == 1
    assert out == ""
    assert os.listdir(folder) == []


@pytest.mark.parametrize("damage", ["truncated", "flipped header", "empty", "no config", "broken config"])
def test_damaged_model_is_one_line(tiny, folder, capsys, damage):
    model = folder.parent / "damaged"
    model.mkdir()
    for name in ("config.json", "base.safetensors", "ssr.safetensors"):
        with open(os.path.join(tiny, name), "rb") as file:
            (model / name).write_bytes(file.read())
    weights, config = model / "base.safetensors", model / "config.json"
    data = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "flipped header":
        weights.write_bytes(bytes([data[0] ^ 0xFF]) + data[1:])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "no config":
        config.unlink()
    else:
        config.write_text(config.read_text()[:-20])
    assert main(["generate", "x", "--model", str(model)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pylumiere: ")
    assert "damaged" in err  # the folder's name
    assert err.count("\n") == 1
    assert os.listdir(folder) == []


def test_the_output_is_checked_before_the_model_is_loaded(folder, capsys, monkeypatch):
    monkeypatch.setattr("pylumiere.cli.generate._load", lambda *arguments: pytest.fail("the model was loaded"))
    assert main(["generate", "x", "-o", "none/clip.mp4"]) == 2
    assert main(["generate", "x", "--sheet", "none/sheet.png"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_our_own_failure_is_no_users_mistake(tiny, folder, monkeypatch):
    monkeypatch.setattr("pylumiere.cli.generate._load", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(tiny)
    assert os.listdir(folder) == []


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("extra", [[], ["--stream"]], ids=["whole", "stream"])
def test_interrupt_stops_within_a_step_and_leaves_nothing(tiny, folder, number, code, extra):
    """Also: there are progress bars on a terminal, and they show the first stage."""
    terminal, slave = pty.openpty()
    command = [sys.executable, "-P", "-m", "pylumiere.cli", "generate", "x", "--model", tiny, "--steps", "1000", *extra]
    # A shell lets what it starts in the background ignore SIGINT, and so would all that these tests start.
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=slave,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(slave)
    shown = b""
    try:
        deadline = time.monotonic() + 60
        while b"/1000" not in shown and time.monotonic() < deadline:
            shown += os.read(terminal, 4096)
        process.send_signal(number)
        begun = time.monotonic()
        while True:
            try:
                more = os.read(terminal, 4096)
            except OSError:  # the other end is closed
                break
            if not more:
                break
            shown += more
        assert process.wait(20) == code, shown
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(terminal)
    assert time.monotonic() - begun < 10
    assert b"base" in shown
    assert b"interrupted; nothing was written" in shown
    assert b"Traceback" not in shown
    assert os.listdir(folder) == []


def test_bars_show_both_stages_and_the_time_left(tiny, folder, monkeypatch):
    from types import SimpleNamespace

    from pylumiere.cli.console import Bars

    class Terminal:
        def __init__(self):
            self.text = ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    with Bars() as bars:
        for stage, left in (("base", 12.4), ("ssr", 3.0)):
            bars.callback(SimpleNamespace(stage=stage, step=2, steps=5, seconds_left=left))
    for text in ("base", "ssr", "2/5", "12 s left", "3 s left"):
        assert text in terminal.text


def test_quiet_in_a_pipe(tiny, folder, capfd):
    assert generate(tiny, "-o", "clip.mp4") == 0
    assert capfd.readouterr().err == ""
