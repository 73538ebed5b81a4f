"""Guidance, rescale and thresholds per frame, against numpy, diffusers' formulas and the C++ runtime's order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from pylumiere.diffusion.guidance import dynamic_threshold, guide, rescale_gain
from pylumiere.errors import InvalidRequest

GENERATOR = np.random.default_rng(0)
COND, UNCOND = GENERATOR.normal(size=(2, 5, 4, 6, 3))


def test_guidance_goes_from_unconditional_through_conditional():
    np.testing.assert_array_equal(guide(COND, UNCOND, 0.0), UNCOND)
    np.testing.assert_allclose(guide(COND, UNCOND, 1.0), COND, rtol=0, atol=1e-15)
    np.testing.assert_allclose(guide(COND, UNCOND, 7.5), -6.5 * UNCOND + 7.5 * COND, rtol=0, atol=1e-13)
    tensors = guide(torch.from_numpy(COND).float(), torch.from_numpy(UNCOND).float(), 3.0)
    assert tensors.dtype == torch.float32


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_moves_the_deviation_of_each_frame(phi):
    """Lin et al., equations 15 and 16, frame by frame."""
    guided = guide(COND, UNCOND, 7.0)
    gain = rescale_gain(COND, guided, phi)
    assert gain.shape == (5,) and gain.dtype == torch.float64
    for frame in range(5):
        rescaled = guided[frame] * (COND[frame].std() / guided[frame].std())
        expected = phi * rescaled + (1 - phi) * guided[frame]
        np.testing.assert_allclose(guided[frame] * gain[frame].item(), expected, rtol=1e-13)


def test_rescale_gain_of_16_bit_outputs_is_taken_in_float64():
    """Deviations of 0.01 about a mean of 1: lost by sums in bfloat16."""
    cond = torch.from_numpy(1 + 0.01 * COND).bfloat16()
    guided = torch.from_numpy(1 + 0.05 * COND).bfloat16()
    expected = cond.double().numpy()[0].std() / guided.double().numpy()[0].std()
    assert rescale_gain(cond, guided, 1.0)[0].item() == pytest.approx(expected, rel=1e-12)


def test_constant_frames_are_left_alone():
    guided = torch.from_numpy(guide(COND, UNCOND, 7.0))
    guided[2] = 3.0
    assert rescale_gain(COND, guided, 0.7)[2] == 1
    assert (rescale_gain(COND, guided, 0.7)[[0, 1, 3, 4]] < 1).all()


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("ceiling", [None, 1.7])
def test_threshold_is_the_quantile_of_each_frame(percentile, ceiling):
    x0 = COND * np.array([0.1, 0.8, 1.2, 2.0, 5.0])[:, None, None, None]
    bound, scale = dynamic_threshold(x0, percentile, ceiling=ceiling)
    assert bound.shape == scale.shape == (5, 1, 1, 1)
    expected = np.clip([np.quantile(np.abs(frame), percentile) for frame in x0], 1, ceiling)
    np.testing.assert_allclose(bound.flatten(), expected, rtol=1e-14)
    np.testing.assert_allclose(scale.flatten(), 1 / expected, rtol=1e-14)
    assert (bound[0], scale[0]) == (1, 1)  # within the floor: the static clip
    assert bound[4] > 1


@given(
    st_numpy.arrays(
        np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.floats(-50, 50, width=32)
    ),
    st.floats(0.01, 1),
    st.floats(0.5, 2),
    st.one_of(st.none(), st.floats(0.25, 8)),
)
def test_thresholded_frames_stay_within_the_floor(x0, percentile, floor, ceiling):
    bound, scale = dynamic_threshold(x0, percentile, floor=floor, ceiling=ceiling)
    assert bound.dtype == torch.float32
    x0 = torch.from_numpy(x0)
    result = x0.clip(-bound, bound) * scale
    assert result.abs().max() <= floor * (1 + 1e-6)
    assert (bound >= np.float32(floor)).all() and (scale <= 1).all()
    # Nothing that lies below every bound changes but by the scale, and order is kept.
    inside = x0.abs() <= bound
    torch.testing.assert_close(result[inside], (x0 * scale)[inside])


def test_frames_do_not_know_of_each_other():
    """What streaming stands on: a frame's bound and gain alone are those it has in a clip."""
    x0, guided = torch.from_numpy(2 * COND), torch.from_numpy(guide(COND, UNCOND, 5.0))
    bound, scale = dynamic_threshold(x0, 0.9)
    gain = rescale_gain(COND, guided, 0.5)
    for frame in range(5):
        one = slice(frame, frame + 1)
        assert dynamic_threshold(x0[one], 0.9) == (bound[one], scale[one])
        torch.testing.assert_close(rescale_gain(COND[one], guided[one], 0.5), gain[one], rtol=1e-14, atol=0)


def test_more_values_than_torch_quantile_takes():
    values = torch.arange(2**24 + 10, dtype=torch.float32).view(1, -1) / 2**20
    bound, _ = dynamic_threshold(values, 0.5)
    assert bound.item() == pytest.approx((2**24 + 9) / 2**21, rel=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: guide(COND, UNCOND, float("nan")), "guidance_scale=nan"),
        (lambda: guide(COND, UNCOND, float("inf")), "guidance_scale=inf"),
        (lambda: rescale_gain(COND, COND, 1.5), "guidance_rescale=1.5 is not in 0..1"),
        (lambda: rescale_gain(COND, COND, float("nan")), "guidance_rescale=nan"),
        (lambda: dynamic_threshold(COND, 0.0), "percentile=0.0"),
        (lambda: dynamic_threshold(COND, 95.0), "percentile=95.0 is not in 0..1"),
        (lambda: dynamic_threshold(COND, 0.9, floor=0.0), "floor=0.0"),
        (lambda: dynamic_threshold(COND, 0.9, ceiling=float("nan")), "ceiling=nan"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(InvalidRequest) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)
