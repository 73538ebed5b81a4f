"""What a user gave as arrays for one frame: sizes, cells, places in the clip, masks, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from pylumiere.errors import InvalidRequest
from pylumiere.media.fitting import Frame, fit
from pylumiere.media.placement import Placement
from pylumiere.request import GenerationRequest

FRAME = Frame(height=32, width=32, scale=2, num_frames=8)  # the first network makes 16 x 16
RNG = np.random.default_rng(0)
CLIP = RNG.integers(0, 256, (8, 32, 32, 3), np.uint8)
REGION = np.zeros((32, 32), bool)
REGION[8:24, 8:24] = True


def fitted(frame=FRAME, **fields):
    return fit(GenerationRequest(prompt="x", **fields), frame)


def test_of_a_text_there_is_nothing_to_fit():
    nothing = fitted()
    assert nothing.pixels.shape == (0, 16, 16, 3) and nothing.whole.shape == (0, 16, 16, 1)
    assert not nothing.masks.any() and nothing.unmasked.all() and nothing.black_bars() is None


def test_pictures_come_with_their_frames():
    several = fitted(image=CLIP[0], keyframes={-1: CLIP[7], 3: CLIP[3][:16]})
    assert several.positions.tolist() == [0, 7, 3] and several.pixels.dtype == np.float32
    means = CLIP[[0, 7]].reshape(2, 16, 2, 16, 2, 3).mean((2, 4)) / 127.5 - 1
    np.testing.assert_allclose(several.pixels[:2], means, atol=1e-5)
    assert fitted(video=CLIP, strength=0.5).positions.tolist() == list(range(8))


@pytest.mark.parametrize("fit_mode", ["crop", "stretch"])
def test_a_picture_of_the_networks_size_is_not_blurred_by_way_of_the_result(fit_mode):
    pixels = fitted(image=CLIP[0, :16, :16], fit=fit_mode).pixels[0]
    np.testing.assert_allclose(pixels, CLIP[0, :16, :16] / 127.5 - 1, atol=1e-6)


def test_a_picture_lies_where_the_result_shows_it():
    white = np.full((10, 32, 3), 255, np.uint8)
    padded = fitted(image=white, fit="pad", expand={"left": 4})  # 9 x 28 pixels from row 11 and column 4 on
    assert padded.placements[0].inner == (slice(11, 20), slice(4, 32))
    cells = padded.whole[0, ..., 0] == 1
    assert cells[6:10, 2:].all() and cells.sum() == 4 * 14
    np.testing.assert_allclose(padded.pixels[0, 5, 2:], 0, atol=1e-6)  # half of it is bar
    assert (padded.pixels[0, :5] == -1).all() and (padded.pixels[0, 6:10] == 1).all()


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"video": CLIP, "mask": REGION, "strength": 0.5}, 8),
        ({"image": CLIP[0], "mask": np.stack([REGION] * 8)}, 1),
        ({"image": CLIP[0], "keyframes": {3: CLIP[1], -1: CLIP[2]}}, 3),
    ],
    ids=["inpainting", "cinemagraph", "keyframes"],
)
def test_each_picture_is_placed_once(monkeypatch, fields, count):
    placed, apply = [], Placement.apply
    monkeypatch.setattr(Placement, "apply", lambda *arguments: placed.append(1) or apply(*arguments))
    fitted(**fields)
    assert len(placed) == count


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_masks_are_the_results_and_their_cells_the_networks():
    masked = fitted(video=CLIP, mask=REGION, expand={"left": 4})
    expected = np.zeros((32, 32), bool)
    expected[:, :4] = True
    shown = masked.placements[0].cover(REGION)
    assert masked.masks.shape == (1, 32, 32, 1) and np.array_equal(masked.masks[0, ..., 0], expected | shown)
    touched = masked.masks.reshape(16, 2, 16, 2).any((1, 3))
    assert np.array_equal(masked.unmasked[0, ..., 0] == 0, touched)


def test_a_mask_that_moves_has_a_layer_a_frame():
    moving = np.zeros((8, 32, 32), bool)
    for t in range(8):
        moving[t, 3 * t, 5] = True
    masked = fitted(image=CLIP[0], mask=moving)
    assert np.array_equal(masked.masks[..., 0], moving) and (masked.unmasked.sum((1, 2, 3)) == 255).all()
    assert len(masked.kept().made) == 8


def test_the_rim_lies_inside_the_mask_and_rises():
    frame = Frame(32, 32, 4, 8)
    made = fitted(frame, video=CLIP, mask=REGION).kept().made[0, ..., 0]
    assert frame.rim == 2 and not made[~REGION].any()
    np.testing.assert_allclose(made[16, 6:13], [0, 0, 1 / 3, 2 / 3, 1, 1, 1], atol=1e-6)
    at_edge = np.zeros((32, 32), bool)
    at_edge[:, 16:] = True  # no rim where the mask meets the frame's edge
    made = fitted(frame, video=CLIP, mask=at_edge).kept().made[0, ..., 0]
    assert (made[:, 18:] == 1).all() and (made[:, 16] < 0.5).all()


def test_bars_are_black_where_all_pictures_have_them():
    wide, wider = np.full((16, 32, 3), 200, np.uint8), np.full((8, 32, 3), 200, np.uint8)
    bars = fitted(image=wide, keyframes={3: wider}, fit="pad").black_bars()
    result = bars.compose(2, np.ones((2, 32, 32, 3), np.float32))
    assert (result[:, :8] == -1).all() and (result[:, 24:] == -1).all() and (result[:, 8:24] == 1).all()
    assert fitted(image=wide, keyframes={3: CLIP[0]}, fit="pad").black_bars() is None


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_frame_outside_the_clip_or_given_twice():
    for wrong in (8, -9):
        with pytest.raises(InvalidRequest, match=f"frame {wrong} is outside the clip, which has 8 frames"):
            fitted(keyframes={wrong: CLIP[0]})
    with pytest.raises(InvalidRequest, match="frame 7 is given twice"):
        fitted(keyframes={7: CLIP[0], -1: CLIP[1]})
    with pytest.raises(InvalidRequest, match="frame 0 is given twice"):
        fitted(image=CLIP[0], keyframes={-8: CLIP[1]})


def test_a_mask_that_the_fit_leaves_empty_or_full():
    tall, mask = np.zeros((8, 64, 32, 3), np.uint8), np.zeros((64, 32), bool)
    mask[:8] = True  # cropped away
    with pytest.raises(InvalidRequest, match="nothing white is left of it"):
        fitted(video=tall, mask=mask)
    with pytest.raises(InvalidRequest, match="all that is left of it in the frame is white"):
        fitted(video=tall, mask=~mask)
    assert fitted(video=tall, mask=mask, fit="pad").masks.any()


def test_a_mask_of_another_length_than_the_clip():
    with pytest.raises(InvalidRequest, match="mask has 6 frames and the clip 8"):
        fitted(image=CLIP[0], mask=np.tile(REGION, (6, 1, 1)))


def test_expand_that_leaves_nothing():
    with pytest.raises(InvalidRequest, match="expand=left=16,right=16: the frame is 32 x 32"):
        fitted(video=CLIP, expand={"left": 16, "right": 16})


def test_floats_and_bytes_are_the_same_picture():
    eight_bit = RNG.integers(0, 256, (40, 24, 3), np.uint8)
    one, two = (fitted(image=image).pixels for image in (eight_bit, eight_bit / 255))
    np.testing.assert_allclose(one, two, atol=1e-6)
