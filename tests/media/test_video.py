"""Frames to files and back: every format, the same bytes twice, nothing half-written, hostile and damaged input."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import struct
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from support.testing import sound_file

from pylumiere.diffusion.windows import BackgroundWriter
from pylumiere.errors import VideoError
from pylumiere.media import video
from pylumiere.media.video import (
    Limits,
    Video,
    VideoReader,
    VideoWriter,
    output_format,
    read_image,
    read_video,
    write_sheet,
)

FORMATS = ["clip.mp4", "clip.webm", "clip.gif", "clip"]


def make_frames(num_frames=20, height=32, width=48):
    """A red square that moves over a plain ground: flat areas, so that lossy formats must come close."""
    frames = np.full((num_frames, height, width, 3), (30, 90, 200), np.uint8)
    for t in range(num_frames):
        frames[t, 8:24, 2 + t : 18 + t] = (220, 40, 30)
    return frames


def content(path):
    """The bytes of a file, or of all files of a folder."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    return path.read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_round_trip_keeps_frames_rate_and_colours(tmp_path, name):
    frames = make_frames()
    Video(frames, 16).save(tmp_path / name)
    back = read_video(tmp_path / name)
    assert back.frames.shape == frames.shape
    error = np.abs(back.frames.astype(int) - frames)
    if name == "clip":
        assert error.max() == 0
    else:
        assert back.fps == 16
        # Chroma has half the resolution in mp4 and webm; inside the square and far from it colours are near.
        assert error.mean() < 4
        assert np.abs(back.frames[5, 14:18, 13:17].astype(int) - (220, 40, 30)).max() <= 8
        assert np.abs(back.frames[5, 28:, 40:].astype(int) - (30, 90, 200)).max() <= 8


@pytest.mark.parametrize("name", FORMATS)
def test_same_frames_give_same_bytes(tmp_path, name):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Video(make_frames(), 16).save(tmp_path / folder / name)
        time.sleep(0.01)
    assert content(tmp_path / "a" / name) == content(tmp_path / "b" / name)


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_give_the_bytes_of_the_whole(tmp_path, name):
    (tmp_path / "pieces").mkdir()
    frames = make_frames()
    Video(frames, 16).save(tmp_path / name)
    with VideoWriter(tmp_path / "pieces" / name, 16) as writer, BackgroundWriter(writer.write) as encoder:
        for first, last in ((0, 1), (1, 7), (7, 20)):
            encoder.put(frames[first:last])
    assert content(tmp_path / "pieces" / name) == content(tmp_path / name)


def test_h264_is_what_players_take(tmp_path):
    Video(make_frames(), 16).save(tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.average_rate) == (20, 16)
        assert container.duration == 20 / 16 * 1_000_000
    start = (tmp_path / "clip.mp4").read_bytes()[:64]
    assert b"moov" in start, "players want the index first"


def test_gif_lasts_as_long_as_the_clip(tmp_path):
    Video(make_frames(16), 16).save(tmp_path / "clip.gif")
    with av.open(str(tmp_path / "clip.gif")) as container:
        assert container.duration == 1_000_000  # centiseconds a frame do not divide: 6 and 7 alternate


def test_float_frames_are_rounded_not_cut(tmp_path):
    frames = make_frames()
    Video(frames.astype(np.float32) / 255, 16).save(tmp_path / "clip")
    assert np.array_equal(read_video(tmp_path / "clip").frames, frames)


@pytest.mark.parametrize("frames", [
    np.zeros((4, 8, 8), np.uint8), np.zeros((4, 8, 8, 4), np.uint8), np.zeros((4, 0, 8, 3), np.uint8),
    np.zeros((4, 8, 8, 3), np.int64), np.full((4, 8, 8, 3), np.nan, np.float32),
], ids=["no-channels", "alpha", "no-rows", "int64", "nan"])  # fmt: skip
def test_frames_that_are_no_pictures_are_refused(frames, tmp_path):
    with pytest.raises(VideoError, match="frames"):
        Video(frames, 16).save(tmp_path / "clip.mp4")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1001])
def test_wrong_rate_is_named(fps, tmp_path):
    with pytest.raises(VideoError, match=f"fps={fps}"):
        VideoWriter(tmp_path / "clip.mp4", fps)
    with pytest.raises(VideoError, match=f"fps={fps}"):
        Video(make_frames(), fps)


@pytest.mark.parametrize("name", FORMATS)
def test_an_error_leaves_nothing(tmp_path, name):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / name, 16) as writer:
        writer.write(make_frames())
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", FORMATS)
def test_no_frames_is_an_error_and_leaves_nothing(tmp_path, name):
    with pytest.raises(VideoError, match="no frames"), VideoWriter(tmp_path / name, 16):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", FORMATS)
def test_the_old_clip_stays_until_the_new_one_is_whole(tmp_path, name):
    Video(make_frames(), 16).save(tmp_path / name)
    before = content(tmp_path / name)
    with pytest.raises(ZeroDivisionError), VideoWriter(tmp_path / name, 16) as writer:
        writer.write(make_frames(5))
        raise ZeroDivisionError
    assert content(tmp_path / name) == before
    Video(make_frames(5), 16).save(tmp_path / name)
    assert len(read_video(tmp_path / name).frames) == 5
    assert os.listdir(tmp_path) == [name]


def test_sizes_that_do_not_fit(tmp_path):
    with pytest.raises(VideoError, match="even sizes, not 47 x 32"):
        Video(make_frames(width=47), 16).save(tmp_path / "clip.mp4")
    with pytest.raises(VideoError, match="24 x 16 differs from the first, 48 x 32"):  # noqa: SIM117
        with VideoWriter(tmp_path / "a", 16) as writer:
            writer.write(make_frames(2))
            writer.write(make_frames(2, 16, 24))
    Video(make_frames(3, 31, 47), 16).save(tmp_path / "odd.gif")
    assert read_video(tmp_path / "odd.gif").frames.shape == (3, 31, 47, 3)
    assert os.listdir(tmp_path) == ["odd.gif"]


def test_encoder_error_reaches_the_thread_that_writes(tmp_path):
    with pytest.raises(VideoError, match="differs from the first"):  # noqa: SIM117
        with VideoWriter(tmp_path / "clip.mp4", 16) as writer, BackgroundWriter(writer.write) as encoder:
            encoder.put(make_frames(2))
            encoder.put(make_frames(2, 16, 24))
            for _ in range(1000):  # the error comes at a later frame, or at the end
                encoder.put(make_frames(1))
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


def png(width, height, *, data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(("name", "data", "text"), [
    ("empty.mp4", b"", "damaged or no video"),
    ("text.mp4", b"not a video at all " * 50, "damaged or no video"),
    ("sound.mp4", sound_file(), "holds no video"),
    ("large.png", png(9000, 8000), "9000 x 8000 have more than 67108864 pixels"),
    ("bomb.png", png(16000, 16000), "more than 67108864 pixels"),
    ("huge.png", png(2**31 - 1, 2**31 - 1), "huge.png"),
    ("cut.png", png(64, 64, data=b"\0" * 50), "cut.png"),
    ("list.m3u8", PLAYLIST.format(path="clip.mp4").encode(), "damaged or no video"),
    ("list.ffconcat", b"ffconcat version 1.0\nfile clip.mp4\n", "damaged or no video"),
], ids=lambda value: value if isinstance(value, str) and "." in value else "")  # fmt: skip
def test_hostile_input_is_one_line(tmp_path, name, data, text):
    Video(make_frames(), 16).save(tmp_path / "clip.mp4")  # what the play lists name
    (tmp_path / name).write_bytes(data)
    with pytest.raises(VideoError) as caught:
        read_video(tmp_path / name)
    assert text in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_truncated_clip_is_an_error(tmp_path, name, share):
    rng = np.random.default_rng(0)
    Video(rng.integers(0, 256, (20, 32, 48, 3), np.uint8), 16).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(VideoError, match=name):
        read_video(tmp_path / name)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif"])
def test_flipped_bytes_never_escape_as_another_error(tmp_path, name):
    Video(make_frames(8), 16).save(tmp_path / name)
    data = bytearray((tmp_path / name).read_bytes())
    rng = np.random.default_rng(1)
    for _ in range(60):
        broken = data.copy()
        for position in rng.integers(0, len(data), 3):
            broken[position] = rng.integers(0, 256)
        (tmp_path / name).write_bytes(broken)
        with contextlib.suppress(VideoError):
            frames = read_video(tmp_path / name, Limits(max_pixels=2**20, max_frames=1000, max_bytes=2**26)).frames
            assert len(frames) <= 1000


def test_limits(tmp_path):
    Video(make_frames(), 16).save(tmp_path / "clip.mp4")
    for limits, text in [
        (Limits(max_pixels=48 * 32 - 1), "frames of 48 x 32"),
        (Limits(max_frames=19), "more than 19 frames"),
        (Limits(max_bytes=48 * 32 * 3 * 19), "more than 19 frames of 48 x 32"),
    ]:
        with pytest.raises(VideoError, match=text):
            read_video(tmp_path / "clip.mp4", limits)
    exact = Limits(max_pixels=48 * 32, max_frames=20, max_bytes=48 * 32 * 3 * 20)
    assert len(read_video(tmp_path / "clip.mp4", exact).frames) == 20


def test_names_are_files_and_never_addresses(tmp_path):
    Video(make_frames(), 16).save(tmp_path / "clip.mp4")
    for path in ["http://127.0.0.1:9/clip.mp4", f"file:{tmp_path}/clip.mp4", f"concat:{tmp_path}/clip.mp4"]:
        with pytest.raises(VideoError, match="No such file"):
            read_video(path)


def test_reader_is_lazy(tmp_path):
    Video(make_frames(), 16).save(tmp_path / "clip.mp4")
    with VideoReader(tmp_path / "clip.mp4") as reader:
        assert (reader.width, reader.height, reader.num_frames, reader.fps) == (48, 32, 20, 16)
        iterator = iter(reader)
        assert next(iterator).shape == (32, 48, 3)
    with pytest.raises(VideoError, match="closed"):
        next(iter(reader))


def test_folder_with_frames_of_two_sizes(tmp_path):
    Video(make_frames(3), 16).save(tmp_path / "clip")
    (tmp_path / "clip" / "frame_000002.png").write_bytes(video.encode_png(make_frames(1, 16, 24)[0]))
    with pytest.raises(VideoError, match="48 x 32 to 24 x 16"):
        read_video(tmp_path / "clip")
    (tmp_path / "none").mkdir()
    with pytest.raises(VideoError, match="holds no PNG"):
        read_video(tmp_path / "none")


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
    Video(make_frames(), 16).save("-")
    data = out.data.getvalue()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Pipe(data)))
    back = read_video("-")
    assert back.frames.shape == (20, 32, 48, 3)
    assert back.fps == 16


def test_sheet(tmp_path):
    frames = make_frames(80)
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
        writer.write(make_frames(2))
        monkeypatch.setattr(video.os, "replace", no_space)
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
