"""Files to frames: hostile, damaged and endless ones cost no more than the limits, and one line says what is wrong."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from support.media import moving_square, png_file, sound_file

from pylumiere.errors import VideoError
from pylumiere.media.readers import Limits, VideoReader
from pylumiere.media.video import Video, read_video
from pylumiere.media.writers import encode_png

PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(("name", "data", "text"), [
    ("empty.mp4", b"", "damaged or no video"),
    ("text.mp4", b"not a video at all " * 50, "damaged or no video"),
    ("sound.mp4", sound_file(), "holds no video"),
    ("large.png", png_file(9000, 8000), "9000 x 8000 have more than 67108864 pixels"),
    ("bomb.png", png_file(16000, 16000), "more than 67108864 pixels"),
    ("huge.png", png_file(2**31 - 1, 2**31 - 1), "huge.png"),
    ("cut.png", png_file(64, 64, b"\0" * 50), "cut.png"),
    ("list.m3u8", PLAYLIST.format(path="clip.mp4").encode(), "damaged or no video"),
    ("list.ffconcat", b"ffconcat version 1.0\nfile clip.mp4\n", "damaged or no video"),
], ids=lambda value: value if isinstance(value, str) and "." in value else "")  # fmt: skip
def test_hostile_input_is_one_line(tmp_path, name, data, text):
    Video(moving_square(), 16).save(tmp_path / "clip.mp4")  # what the play lists name
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
    Video(moving_square(8), 16).save(tmp_path / name)
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
    Video(moving_square(), 16).save(tmp_path / "clip.mp4")
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
    Video(moving_square(), 16).save(tmp_path / "clip.mp4")
    for path in ["http://127.0.0.1:9/clip.mp4", f"file:{tmp_path}/clip.mp4", f"concat:{tmp_path}/clip.mp4"]:
        with pytest.raises(VideoError, match="No such file"):
            read_video(path)


def test_reader_is_lazy(tmp_path):
    Video(moving_square(), 16).save(tmp_path / "clip.mp4")
    with VideoReader(tmp_path / "clip.mp4") as reader:
        assert (reader.width, reader.height, reader.num_frames, reader.fps) == (48, 32, 20, 16)
        iterator = iter(reader)
        assert next(iterator).shape == (32, 48, 3)
    with pytest.raises(VideoError, match="closed"):
        next(iter(reader))


def test_folder_with_frames_of_two_sizes(tmp_path):
    Video(moving_square(3), 16).save(tmp_path / "clip")
    (tmp_path / "clip" / "frame_000002.png").write_bytes(encode_png(moving_square(1, 16, 24)[0]))
    with pytest.raises(VideoError, match="48 x 32 to 24 x 16"):
        read_video(tmp_path / "clip")
    (tmp_path / "none").mkdir()
    with pytest.raises(VideoError, match="holds no PNG"):
        read_video(tmp_path / "none")
