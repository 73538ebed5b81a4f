"""The place of a picture in the frame: every fit, every shape, and edges that are left free."""

from __future__ import annotations

import numpy as np
import pytest
from support.media import BLUE, GREEN, RED, WHITE, corners

from pylumiere.errors import InvalidRequest
from pylumiere.media.placement import place


def test_crop_keeps_the_middle():
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, 8:24] = 255
    assert place((16, 32), (16, 16), "crop").apply(wide).min() == 1


def test_pad_shows_all_of_it_between_black_bars():
    placement = place((16, 32), (16, 16), "pad")
    frame = placement.apply(np.full((16, 32, 3), 255, np.uint8))
    assert placement.inner == (slice(4, 12), slice(0, 16))
    assert frame[4:12].min() == 1 and frame[[0, 3, 12, 15]].max() == 0


def test_stretch_uses_all_of_both():
    frame = place((24, 40), (16, 16), "stretch").apply(corners())
    assert np.allclose(frame[[1, 1, 14, 14], [1, 14, 1, 14]] * 255, [RED, GREEN, BLUE, WHITE], atol=1)


def test_expand_leaves_the_edges_free():
    placement = place((8, 8), (16, 16), "crop", {"left": 4, "bottom": 8})
    assert placement.inner == placement.box == (slice(0, 8), slice(4, 16))
    picture = np.zeros((8, 12, 3), np.uint8)
    picture[:, :1] = RED
    frame = place((8, 12), (16, 16), "crop", {"left": 4, "bottom": 8}).apply(picture)
    assert (frame[:8, :5] * 255 == RED).all() and frame[:8, 5:].max() == 0  # beside the box its edge goes on
    with pytest.raises(InvalidRequest, match="left=16: the frame is 16 x 16"):
        place((8, 8), (16, 16), "crop", {"left": 16})


def test_every_pixel_of_the_frame_is_of_the_picture_a_bar_or_a_margin():
    placement = place((16, 32), (20, 20), "pad", {"left": 4, "top": 4})
    parts = np.stack([placement.shown, placement.bars, placement.margins])
    assert (parts.sum(0) == 1).all() and parts.sum((1, 2, 3)).tolist() == [8 * 16, 8 * 16, 20 * 20 - 16 * 16]
    assert placement.shown[8:16, 4:].all() and placement.margins[:4].all() and placement.margins[:, :4].all()


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(2, 2), (3, 1000), (1000, 3), (17, 13), (128, 128)])
def test_every_shape_fits_every_way(fit, size):
    frame = place(size, (32, 48), fit).apply(np.full((*size, 3), 200, np.uint8))
    assert frame.shape == (32, 48, 3) and frame.dtype == np.float32
    assert frame.max() == pytest.approx(200 / 255, abs=1e-5)


def test_a_picture_of_the_frames_size_is_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    for fit in ("crop", "pad", "stretch"):
        assert np.array_equal(np.round(place((32, 48), (32, 48), fit).apply(pixels) * 255), pixels)
