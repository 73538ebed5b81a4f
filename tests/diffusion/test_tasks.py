"""Each application as C, M, start and kept pixels: tensor order, polarity of the mask, what comes back unchanged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pylumiere.diffusion.samplers import make_table
from pylumiere.diffusion.schedules import make_schedule
from pylumiere.diffusion.tasks import hold, make_task
from pylumiere.errors import InvalidRequest
from pylumiere.media.fitting import Frame, fit
from pylumiere.media.pixels import to_uint8
from pylumiere.request import GenerationRequest

FRAME = Frame(height=32, width=32, scale=2, num_frames=8)  # the base makes 16 x 16
RNG = np.random.default_rng(0)
CLIP = RNG.integers(0, 256, (8, 32, 32, 3), np.uint8)
REGION = np.zeros((32, 32), bool)
REGION[8:24, 8:24] = True


def task_of(frame=FRAME, **fields):
    request = GenerationRequest(prompt="x", **fields)
    return make_task(request, fit(request, frame))


def given(task, num_frames=8):
    """C [T, h, w, 3] and M [T, h, w]."""
    both = task.given(np.arange(num_frames))
    assert both.shape == (num_frames, 16, 16, 4) and both.dtype == torch.float32
    return both[..., :3].numpy(), both[..., 3].numpy()


def small(picture):
    """Means of 2 x 2 pixels in -1..1."""
    return picture.reshape(16, 2, 16, 2, -1).mean((1, 3)) / 127.5 - 1


def test_nothing_is_given_for_a_text():
    task = task_of()
    pixels, mask = given(task)
    assert not pixels.any() and not mask.any() and task.initial is task.kept is task.style is None


def test_a_million_frames_of_nothing_take_little_memory():
    task = task_of(Frame(32, 32, 2, 1_000_000))
    assert task.pictures.nbytes + task.index.nbytes < 5_000_000
    assert task.given(np.array([[0, 999_999]])).shape == (1, 2, 16, 16, 4)


def test_order_is_pixels_then_mask_and_one_means_given():
    pixels, mask = given(task_of(image=CLIP[0]))
    assert (mask[0] == 1).all() and not mask[1:].any() and not pixels[1:].any()
    np.testing.assert_allclose(pixels[0], small(CLIP[0]), atol=1e-5)


def test_keyframes_stand_where_they_were_put():
    task = task_of(image=CLIP[0], keyframes={-1: CLIP[7], 3: CLIP[3]})
    pixels, mask = given(task)
    assert mask.mean((1, 2)).tolist() == [1, 0, 0, 1, 0, 0, 0, 1] and task.name == "keyframes"
    for t in (0, 3, 7):
        np.testing.assert_allclose(pixels[t], small(CLIP[t]), atol=1e-5)


def test_inpainting_gives_what_is_outside_the_mask():
    task = task_of(video=CLIP, mask=REGION)
    pixels, mask = given(task)
    outside = ~REGION[::2, ::2]
    assert (mask == outside).all() and task.name == "inpainting" and task.initial is None
    for t in range(8):
        np.testing.assert_allclose(pixels[t], small(CLIP[t]) * outside[..., None], atol=1e-5)


def test_a_cell_that_the_mask_touches_is_made_anew():
    touched = np.zeros((32, 32), bool)
    touched[9, 9] = True
    _, mask = given(task_of(video=CLIP, mask=touched))
    assert mask[:, 4, 4].max() == 0 and mask.sum() == 8 * (256 - 1)


def test_a_mask_that_moves():
    moving = np.zeros((8, 32, 32), bool)
    for t in range(8):
        moving[t, :, 2 * t : 2 * t + 2] = True
    _, mask = given(task_of(video=CLIP, mask=moving))
    assert (mask == ~moving[:, ::2, ::2]).all()


def test_outpainting_gives_the_box():
    task = task_of(video=CLIP, expand={"left": 8, "bottom": 4})
    _, mask = given(task)
    expected = np.zeros((16, 16))
    expected[:14, 4:] = 1
    assert (mask == expected).all() and task.name == "outpainting"


def test_cinemagraph_gives_all_of_frame_0_and_then_the_outside():
    task = task_of(image=CLIP[0], mask=REGION)
    pixels, mask = given(task)
    outside = ~REGION[::2, ::2]
    assert (mask[0] == 1).all() and (mask[1:] == outside).all() and task.name == "cinemagraph"
    np.testing.assert_allclose(pixels[0], small(CLIP[0]), atol=1e-5)
    np.testing.assert_allclose(pixels[5], small(CLIP[0]) * outside[..., None], atol=1e-5)


def test_video_to_video_starts_from_the_clip_and_gives_nothing():
    task = task_of(video=CLIP, strength=0.5)
    _, mask = given(task)
    assert not mask.any() and task.kept is None and task.name == "video to video"
    np.testing.assert_allclose(task.initial, np.stack([small(frame) for frame in CLIP]), atol=1e-5)


def test_style_is_passed_on():
    assert task_of(style="ink", style_strength=0.5).style == ("ink", 0.5)
    assert task_of(image=CLIP[0], style="ink").style == ("ink", 1.0)


# ---- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"video": CLIP}, {"image": CLIP[0]}], ids=["inpainting", "cinemagraph"])
def test_outside_the_mask_the_users_bytes_come_back(fields):
    task = task_of(**fields, mask=REGION)
    made = RNG.uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    result = to_uint8(task.kept.compose(4, made))
    mine = CLIP[4:7] if "video" in fields else CLIP[[0, 0, 0]]
    assert np.array_equal(result[:, ~REGION], mine[:, ~REGION])
    inner = np.zeros_like(REGION)
    inner[9:23, 9:23] = True  # without the rim of one pixel
    assert np.array_equal(result[:, inner], to_uint8(made)[:, inner])


def test_outpainting_keeps_the_picture_and_fades_from_its_edge():
    task = task_of(video=CLIP, expand={"left": 8})
    result = to_uint8(task.kept.compose(0, np.full((8, 32, 32, 3), -1, np.float32)))
    expected = np.stack([task.kept.placement.apply(frame) for frame in CLIP])[:, :, 8:]
    assert np.array_equal(result[:, :, 8:], np.floor(expected * 255 + 0.5).astype(np.uint8))
    edge = expected[:, :, :1] * 255 / 2  # half of the edge's pixel, half of what was made (black)
    assert np.abs(result[:, :, 7:8] - edge).max() <= 1 and not result[:, :, :7].any()


def test_bars_of_pad_are_black_and_not_given():
    wide = np.full((8, 16, 32, 3), 200, np.uint8)
    for fields in ({"image": wide[0]}, {"video": wide, "strength": 0.5}, {"video": wide, "mask": REGION[8:24]}):
        task = task_of(**fields, fit="pad")
        result = task.kept.compose(0, np.ones((8, 32, 32, 3), np.float32))
        assert (result[:, :8] == -1).all() and (result[:, 24:] == -1).all() and result[:, 8:24].min() > 0
        _, mask = given(task)
        assert not mask[:, :4].any() and not mask[:, 12:].any()


def test_the_next_stage_sees_the_given_pixels():
    task = task_of(video=CLIP, mask=REGION)
    made = RNG.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    settled, region = task.settle(3, made), REGION[::2, ::2]
    np.testing.assert_allclose(settled[:, ~region], np.stack([small(f) for f in CLIP[3:5]])[:, ~region], atol=1e-5)
    assert np.array_equal(settled[:, region], made[:, region])
    for other in (task_of(), task_of(video=CLIP, strength=0.5)):
        assert other.settle(3, made) is made


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
def test_given_pixels_are_held_at_every_step(prediction):
    table = make_table("dpmpp_2m", make_schedule("cosine", 1000, -2.0), prediction, 6)
    given = task_of(image=CLIP[0], mask=REGION).given(np.arange(8))
    noisy, out = torch.randn(8, 16, 16, 3), torch.randn(8, 16, 16, 3)
    for u, v in table.coef[:, :2]:
        held = hold(out, noisy, given, u, v)
        mask = given[..., 3] > 0
        bound = 2e-6 * (1 + abs(u) * noisy.abs().max().item())  # of rounding: epsilon divides by little at first
        torch.testing.assert_close((u * noisy + v * held)[mask], given[..., :3][mask], rtol=0, atol=bound)
        assert torch.equal(held[~mask], out[~mask])


def test_a_mask_that_leaves_no_whole_cell():
    every_second = np.zeros((32, 32), bool)
    every_second[:, ::2] = True
    with pytest.raises(InvalidRequest, match="nothing of the video is left to keep in the network's small frames"):
        task_of(video=CLIP, mask=every_second)


def test_channels_are_those_of_the_arrays():
    """Latents in the place of pixels: nothing counts on three colours."""
    latents = RNG.standard_normal((8, 16, 16, 4)).astype(np.float32)
    region = ~REGION[::2, ::2]
    requests = {
        "inpainting": GenerationRequest(prompt="x", video=CLIP, mask=REGION, strength=0.5),
        "video to video": GenerationRequest(prompt="x", video=CLIP, strength=0.5),
    }
    tasks = {name: make_task(r, replace(fit(r, FRAME), pixels=latents)) for name, r in requests.items()}
    task = tasks["inpainting"]
    given = task.given(np.arange(8))
    assert given.shape == (8, 16, 16, 5) and task.holds and np.array_equal(task.initial, latents)
    made = RNG.standard_normal((2, 16, 16, 4)).astype(np.float32)
    assert np.array_equal(task.settle(3, made), np.where(region[..., None], latents[3:5], made))
    noisy, out = torch.randn(8, 16, 16, 4), torch.randn(8, 16, 16, 4)
    held = 0.5 * noisy + 0.5 * hold(out, noisy, given, 0.5, 0.5)
    torch.testing.assert_close(held[:, region], torch.from_numpy(latents)[:, region])
    blank = tasks["video to video"]
    assert blank.given(np.arange(8)).shape == (8, 16, 16, 5) and not blank.holds
