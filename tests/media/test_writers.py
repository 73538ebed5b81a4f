"""Frames to files: every format, the same bytes twice, nothing half-written, an encoder in a thread of its own."""

from __future__ import annotations

import errno
import io
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from support.media import moving_square
from support.testing import no_new_threads

from pylumiere.errors import VideoError
from pylumiere.media import writers
from pylumiere.media.inputs import read_image
from pylumiere.media.video import Video, read_video
from pylumiere.media.writers import BackgroundWriter, VideoWriter, output_format, write_sheet

FORMATS = ["clip.mp4", "clip.webm", "clip.gif", "clip"]


def content(path):
    """The bytes of a file, or of all files of a folder."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    return path.read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_same_frames_give_same_bytes(tmp_path, name):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Video(moving_square(), 16).save(tmp_path / folder / name)
        time.sleep(0.01)
    assert content(tmp_path / "a" / name) == content(tmp_path / "b" / name)


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_give_the_bytes_of_the_whole(tmp_path, name):
    (tmp_path / "pieces").mkdir()
    frames = moving_square()
    Video(frames, 16).save(tmp_path / name)
    with VideoWriter(tmp_path / "pieces" / name, 16) as writer, BackgroundWriter(writer.write) as encoder:
        for first, last in ((0, 1), (1, 7), (7, 20)):
            encoder.put(frames[first:last])
    assert content(tmp_path / "pieces" / name) == content(tmp_path / name)


def test_h264_is_what_players_take(tmp_path):
    Video(moving_square(), 16).save(tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.average_rate) == (20, 16)
        assert container.duration == 20 / 16 * 1_000_000
    start = (tmp_path / "clip.mp4").read_bytes()[:64]
    assert b"moov" in start, "players want the index first"


def test_gif_lasts_as_long_as_the_clip(tmp_path):
    Video(moving_square(16), 16).save(tmp_path / "clip.gif")
    with av.open(str(tmp_path / "clip.gif")) as container:
        assert container.duration == 1_000_000  # centiseconds a frame do not divide: 6 and 7 alternate


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1001])
def test_wrong_rate_is_named(fps, tmp_path):
    with pytest.raises(VideoError, match=f"fps={fps}"):
        VideoWriter(tmp_path / "clip.mp4", fps)
    with pytest.raises(VideoError, match=f"fps={fps}"):
        Video(moving_square(), fps)


@pytest.mark.parametrize("name", FORMATS)
def test_an_error_leaves_nothing(tmp_path, name):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / name, 16) as writer:
        writer.write(moving_square())
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", FORMATS)
def test_no_frames_is_an_error_and_leaves_nothing(tmp_path, name):
    with pytest.raises(VideoError, match="no frames"), VideoWriter(tmp_path / name, 16):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", FORMATS)
def test_the_old_clip_stays_until_the_new_one_is_whole(tmp_path, name):
    Video(moving_square(), 16).save(tmp_path / name)
    before = content(tmp_path / name)
    with pytest.raises(ZeroDivisionError), VideoWriter(tmp_path / name, 16) as writer:
        writer.write(moving_square(5))
        raise ZeroDivisionError
    assert content(tmp_path / name) == before
    Video(moving_square(5), 16).save(tmp_path / name)
    assert len(read_video(tmp_path / name).frames) == 5
    assert os.listdir(tmp_path) == [name]


def test_sizes_that_do_not_fit(tmp_path):
    with pytest.raises(VideoError, match="even sizes, not 47 x 32"):
        Video(moving_square(width=47), 16).save(tmp_path / "clip.mp4")
    with pytest.raises(VideoError, match="24 x 16 differs from the first, 48 x 32"):  # noqa: SIM117
        with VideoWriter(tmp_path / "a", 16) as writer:
            writer.write(moving_square(2))
            writer.write(moving_square(2, 16, 24))
    Video(moving_square(3, 31, 47), 16).save(tmp_path / "odd.gif")
    assert read_video(tmp_path / "odd.gif").frames.shape == (3, 31, 47, 3)
    assert os.listdir(tmp_path) == ["odd.gif"]


def test_encoder_error_reaches_the_thread_that_writes(tmp_path):
    with pytest.raises(VideoError, match="differs from the first"):  # noqa: SIM117
        with VideoWriter(tmp_path / "clip.mp4", 16) as writer, BackgroundWriter(writer.write) as encoder:
            encoder.put(moving_square(2))
            encoder.put(moving_square(2, 16, 24))
            for _ in range(1000):  # the error comes at a later frame, or at the end
                encoder.put(moving_square(1))
                time.sleep(0.001)
    assert os.listdir(tmp_path) == []


def test_output_paths(tmp_path, monkeypatch):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    assert output_format(tmp_path / "a.MP4") == "mp4"
    assert output_format("-") == "mp4"
    assert output_format(tmp_path / "empty") == output_format(tmp_path / "new") == "png"
    for path, text in [
        (tmp_path / "a.avi", ".avi is not one of .mp4, .webm, .gif"),
        (tmp_path / "none" / "a.mp4", "none' does not exist"),
        (tmp_path / "folder.mp4", "is a folder"),
        (tmp_path / "notes", "holds 'text.txt'"),
        (tmp_path / "file", "no folder of frames"),
        ("", "no folder of frames"),
    ]:
        with pytest.raises(VideoError) as caught:
            output_format(path)
        assert text in str(caught.value) and repr(str(Path(path))) in str(caught.value)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(VideoError, match="is not writable"):
        output_format(tmp_path / "a.mp4")


def test_pipes(tmp_path, monkeypatch):
    class Pipe(io.RawIOBase):
        """A stream that cannot seek, as a real pipe."""

        def __init__(self, data=b""):
            self.data = io.BytesIO(data)

        def write(self, data):
            return self.data.write(data)

        def read(self, count=-1):
            return self.data.read(count)

    out = Pipe()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=out))
    Video(moving_square(), 16).save("-")
    data = out.data.getvalue()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Pipe(data)))
    back = read_video("-")
    assert back.frames.shape == (20, 32, 48, 3)
    assert back.fps == 16


def test_sheet(tmp_path):
    frames = moving_square(80)
    Video(frames, 16, {"prompt": "a red square " * 12}).sheet(tmp_path / "sheet.png")
    image = read_image(tmp_path / "sheet.png")
    assert image.shape[1] == 5 * (48 + 4) + 4
    row, column = next((y, x) for y in range(image.shape[0]) for x in [4] if tuple(image[y, x]) == (30, 90, 200))
    for index, number in enumerate(range(0, 80, 8)):
        y, x = row + index // 5 * (32 + 14 + 4), column + index % 5 * (48 + 4)
        assert np.array_equal(image[y : y + 32, x : x + 48], frames[number])
    assert image[:row].min() < 80, "the caption is missing"
    write_sheet(tmp_path / "one.png", frames[:1])
    assert read_image(tmp_path / "one.png").shape == (4 + 32 + 14 + 4, 4 + 48 + 4, 3)
    with pytest.raises(VideoError, match=r"must end in \.png"):
        write_sheet(tmp_path / "sheet.jpg", frames)
    assert sorted(os.listdir(tmp_path)) == ["one.png", "sheet.png"]


@pytest.mark.parametrize("name", FORMATS)
def test_an_output_that_fails_at_its_very_end_leaves_nothing(tmp_path, monkeypatch, name):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(VideoError, match="No space left"), VideoWriter(tmp_path / name, 16) as writer:
        writer.write(moving_square(2))
        monkeypatch.setattr(writers.os, "replace", no_space)
    assert os.listdir(tmp_path) == []


def test_small_frames_give_the_same_mp4_wherever_buffers_lie(tmp_path):
    blocks = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    found, held = set(), []
    for size in range(12):
        held.append(bytes(20011 * (size + 1)))  # moves what is allocated next
        with VideoWriter(str(tmp_path / "clip.mp4"), 16) as writer:
            writer.write(blocks)
        found.add((tmp_path / "clip.mp4").read_bytes())
    assert len(found) == 1


# ---- in a thread of its own ------------------------------------------------------------------------------------------


def test_an_exception_of_the_writer_reaches_the_caller_and_nothing_is_written_after_it():
    written = []

    def write(item):
        if item == 3:
            raise ValueError("disk full")
        written.append(item)

    before = threading.active_count()
    with pytest.raises(ValueError, match="disk full"), BackgroundWriter(write, capacity=1) as writer:
        for i in range(100):
            writer.put(i)
    assert written == [0, 1, 2]
    assert no_new_threads(before)


def test_an_exception_of_the_last_write_is_raised_by_close():
    writer = BackgroundWriter(lambda item: 1 / 0)
    writer.put(1)
    with pytest.raises(ZeroDivisionError):
        writer.close()


def test_an_exception_of_the_consumer_aborts_the_writer():
    release = threading.Event()
    written = []

    def write(item):
        release.wait(5)
        written.append(item)

    before = threading.active_count()
    with pytest.raises(KeyError), BackgroundWriter(write, capacity=3) as writer:
        for i in range(3):
            writer.put(i)
        release.set()
        raise KeyError("consumer")
    assert len(written) <= 3
    assert no_new_threads(before)


def test_writer_overlaps_and_keeps_order():
    written = []
    with BackgroundWriter(lambda item: (time.sleep(0.001), written.append(item)), capacity=2) as writer:
        for i in range(50):
            writer.put(i)
    assert written == list(range(50))
