"""A clip to a file and back, and what is no clip."""

from __future__ import annotations

import os

import numpy as np
import pytest
from support.media import moving_square

from pylumiere.errors import VideoError
from pylumiere.media.video import Video, read_video


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "clip"])
def test_round_trip_keeps_frames_rate_and_colours(tmp_path, name):
    frames = moving_square()
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


def test_float_frames_are_rounded_not_cut(tmp_path):
    frames = moving_square()
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
