"""Time is kept: when each frame is shown, how long the last one stands, the shape of pixels; `fps` is the average."""

from __future__ import annotations

import io
import json
import struct
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.clips import encode, packets_of, piped, remux, shades, shown
from support.testing import write_random_model

from pylumiere.cli import main
from pylumiere.media.inputs import read_clip
from pylumiere.media.readers import VideoReader
from pylumiere.media.video import Video, read_video
from pylumiere.media.writers import VideoWriter

MS = Fraction(1, 1000)
STARTS = [0, 100, 200, 600, 700, 800, 840, 2000]  # ms


def timing(source) -> tuple[list[int], int, float]:
    """When frames are shown and how long the last one stands, in ms; frames a second."""
    with VideoReader(source) as reader:
        starts = [round(1000 * time) for time, _ in reader.timed()]
        return starts, round(1000 * reader.last_duration), reader.fps


def gif(delays: list[int], size=(16, 12)) -> bytes:
    """A gif whose frames stand so many ms."""
    frames = [Image.new("L", size, 30 * index) for index in range(len(delays))]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=delays, loop=0)
    return file.getvalue()


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format, codec", [("matroska", "libx264"), ("webm", "libvpx-vp9"), ("mp4", "libx264")])
def test_the_rate_of_a_varying_clip_is_its_average(format, codec):
    data = encode(shades(8), format, codec, times=STARTS, unit=MS, rate=16)
    starts, last, fps = timing(data)
    assert starts == STARTS
    assert fps == pytest.approx(8 / ((2000 + last) / 1000), rel=1e-3)
    assert len(read_video(data).frames) == 8 and read_video(data).fps == fps


def test_the_rate_of_an_even_clip_is_the_one_that_its_header_tells():
    for rate, format in ((30, "matroska"), (24, "webm"), (25, "mp4"), (16, "gif"), (30, "mpegts"), (60, "avi")):
        codec = {"webm": "libvpx-vp9", "gif": "gif", "avi": "mpeg4"}.get(format, "libx264")
        data = encode(shades(20), format, codec, rate=rate, pixels="rgb8" if format == "gif" else "yuv420p")
        with VideoReader(data) as reader:
            assert (reader.fps, reader.is_even) == (rate, True), format


def test_delays_of_a_gif():
    assert timing(gif([100, 200, 300])) == ([0, 100, 300], 300, 5)
    assert timing(gif([100, 100, 100, 2000])) == ([0, 100, 200, 300], 2000, 10)


@pytest.mark.parametrize("format", ["WEBP", "AVIF"])
def test_durations_of_an_animation_in_a_pictures_format(format):
    frames = [Image.new("RGB", (32, 24), (60 * index, 0, 0)) for index in range(4)]
    file = io.BytesIO()
    frames[0].save(file, format, save_all=True, append_images=frames[1:], duration=[100, 200, 300, 400])
    assert timing(file.getvalue()) == ([0, 100, 300, 600], 400, 4)


def test_a_clip_is_read_at_a_constant_rate_and_its_last_frame_stands_for_its_own_time():
    assert [frame[0, 0, 0] // 30 for frame in read_clip(gif([100, 200, 400]), fps=10)[0]] == [0, 1, 1, 2, 2, 2, 2]
    clip, fps = read_clip(gif([100, 200, 300]))
    assert fps == 5 and len(clip) == 3
    even, fps = read_clip(remux(encode(shades(8)), "matroska", last=5))
    assert fps == 16 and shown(even) == list(range(8))  # it comes evenly: frame by frame


def test_times_that_fall_back_rise_all_the_same():
    """A recorder whose clock was set back."""
    frames = [packet.data for packet in packets_of(encode(shades(6), "webm", "libvpx"))]
    header = struct.pack("<4sHH4sHHIIII", b"DKIF", 0, 32, b"VP80", 32, 32, 10, 1, 0, 0)
    times = [0, 1, 2, 0, 1, 2]
    data = header + b"".join(struct.pack("<IQ", len(f), t) + f for f, t in zip(frames, times, strict=True))
    with VideoReader(data) as reader:
        timed = list(reader.timed())
    starts = [time for time, _ in timed]
    assert shown(frame for _, frame in timed) == list(range(6)) and starts == sorted(set(starts))


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif"])
@pytest.mark.parametrize("last", [40, 1700])
def test_a_writer_keeps_times(tmp_path, name, last):
    blocks = np.random.default_rng(0).integers(0, 200, (16, 16, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    frames = np.stack([np.roll(blocks, 4 * index, 1) for index in range(8)])
    with VideoWriter(tmp_path / name, 4, time_base=MS) as writer:
        writer.last_duration = last * MS
        writer.write(frames[:3], [start * MS for start in STARTS[:3]])
        writer.write(frames[3:], [start * MS for start in STARTS[3:]])
    starts, found, fps = timing(tmp_path / name)
    assert starts == STARTS and found == pytest.approx(last, abs=1)
    if name != "clip.webm" or last == 40:  # how long its last frame is held, a webm tells of the file alone
        assert fps == pytest.approx(8 / (2 + last / 1000), rel=1e-2)
    error = np.abs(read_video(tmp_path / name).frames.astype(int) - frames)
    assert error.mean() < 12


def test_the_last_frame_stands_for_one_period_where_nothing_tells(tmp_path):
    with VideoWriter(tmp_path / "clip.mp4", 4, time_base=MS) as writer:
        writer.write(np.stack(shades(3)), [0 * MS, 100 * MS, 900 * MS])
    assert timing(tmp_path / "clip.mp4")[:2] == ([0, 100, 900], 250)


def test_times_in_a_unit_that_no_container_takes(tmp_path):
    unit = Fraction(7, 123_456_789)
    with VideoWriter(tmp_path / "clip.mp4", 4, time_base=unit) as writer:
        writer.write(np.stack(shades(3)), [Fraction(0), Fraction(1, 10), Fraction(9, 10)])
    assert timing(tmp_path / "clip.mp4")[0] == [0, 100, 900]


def test_a_writer_keeps_the_shape_of_pixels_or_makes_them_square(tmp_path):
    for name in ("clip.mp4", "clip.gif", "clip.webm", "clip"):
        with VideoWriter(tmp_path / name, 4, pixel_aspect=Fraction(4, 3)) as writer:
            writer.write(np.stack(shades(3)))
        with VideoReader(tmp_path / name) as reader:
            found = reader.width, reader.height, reader.pixel_aspect
        if name in ("clip.mp4", "clip.gif"):
            assert found == (32, 32, pytest.approx(4 / 3, abs=1 / 64)), name
        else:
            assert found == (42 if name == "clip.webm" else 43, 32, 1), name


# ---- super-resolution ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(write_random_model(tmp_path_factory.mktemp("model")))


def upscale(tiny, capsys, source, output, *options) -> dict:
    assert main(["upscale", str(source), "-o", str(output), "--model", tiny, "--steps", "1", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif"])
@pytest.mark.parametrize("kind", ["varying", "gif", "held"])
def test_upscale_keeps_the_time_of_every_frame(tmp_path, tiny, capsys, kind, name):
    delays = [100, 100, 400, 100, 100, 40, 1160, 1700]
    data = {
        "varying": lambda: encode(shades(8, 16, 16), "matroska", times=STARTS, unit=MS),
        "gif": lambda: gif(delays, (16, 16)),
        "held": lambda: remux(encode(shades(8, 16, 16), rate=20, b_frames=0), "matroska", last=5),
    }[kind]()
    (tmp_path / "in").write_bytes(data)
    before = timing(tmp_path / "in")
    report = upscale(tiny, capsys, tmp_path / "in", tmp_path / name)
    after = timing(tmp_path / name)
    assert after[0] == before[0]
    assert after[1] == pytest.approx(before[1], abs=10 if name == "out.gif" else 2)
    assert report["num_frames"] == 8 and report["fps"] == pytest.approx(before[2])
    if kind == "gif":
        assert before == (STARTS, 1700, pytest.approx(8 / 3.7))


def test_upscale_of_an_even_clip_gives_the_bytes_of_even_frames(tmp_path, tiny, capsys):
    Video(np.stack(shades(8, 16, 16)), 12).save(tmp_path / "in.mp4")
    upscale(tiny, capsys, tmp_path / "in.mp4", tmp_path / "out.mp4")
    upscale(tiny, capsys, tmp_path / "in.mp4", tmp_path / "same.mp4", "--fps", "12")
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "same.mp4").read_bytes()


def test_upscale_keeps_the_shape_of_pixels(tmp_path, tiny, capsys):
    (tmp_path / "in.mp4").write_bytes(encode(shades(4, 16, 16), aspect=Fraction(4, 3)))
    upscale(tiny, capsys, tmp_path / "in.mp4", tmp_path / "out.mp4")
    with VideoReader(tmp_path / "out.mp4") as reader:
        assert reader.pixel_aspect == Fraction(4, 3) and (reader.height, reader.width) == (32, 32)


def test_upscale_at_another_rate_gives_even_frames(tmp_path, tiny, capsys):
    (tmp_path / "in.gif").write_bytes(gif([100, 200, 300], (16, 16)))
    assert upscale(tiny, capsys, tmp_path / "in.gif", tmp_path / "out.mp4", "--fps", "10")["fps"] == 10
    assert timing(tmp_path / "out.mp4") == ([0, 100, 200], 100, 10)


def test_upscale_of_a_clip_whose_header_tells_another_number_of_frames(tmp_path, tiny, capsys):
    (tmp_path / "in.mp4").write_bytes(encode(shades(20, 16, 16), gop=4, container={"movflags": "frag_keyframe"}))
    for options in ((), ("--loop",)):
        assert upscale(tiny, capsys, tmp_path / "in.mp4", tmp_path / "out.mp4", *options)["num_frames"] == 20
        assert timing(tmp_path / "out.mp4")[0] == [round(1000 * k / 16) for k in range(20)]


def test_upscale_through_pipes_keeps_times(monkeypatch, tiny):
    class Pipe(io.RawIOBase):
        data = b""

        def write(self, data):
            self.data += bytes(data)
            return len(data)

    data = encode(shades(8, 16, 16), "matroska", times=STARTS, unit=MS)
    with monkeypatch.context() as patch:
        out = Pipe()
        patch.setattr(sys, "stdout", SimpleNamespace(buffer=out, isatty=lambda: False, write=lambda text: None))
        assert main(["upscale", piped(patch, data), "-o", "-", "--model", tiny, "--steps", "1"]) == 0
    assert timing(out.data)[0] == STARTS
