"""The plain operators against torch's own modules and against their formulas, in float64."""

import pytest
import torch
import torch.nn.functional as F

from pylumiere.networks.ops import Norm, PlainOps

OPS = PlainOps()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize("frames", [1, 3], ids=["a row a clip", "a row a frame"])
@torch.no_grad()
def test_a_row_bias_is_added_before_everything_else(frames):
    x, rows = normal(2, 3, 5, 4, 8), normal(2, frames, 8, seed=1)
    shifted = x + rows.view(2, frames, 1, 1, 8)
    norm = Norm(normal(8, seed=2), normal(8, seed=3), 2, 1e-5)
    options = dict(norm=norm, scale=normal(2, 3, 8, seed=4), shift=normal(2, 1, 8, seed=5), silu=True)
    for name, size in (("spatial_conv", (6, 8, 3, 3)), ("temporal_conv", (6, 8, 3)), ("linear", (6, 8))):
        operation, weight = getattr(OPS, name), normal(*size, seed=6)
        for given in (options, {}):
            expected = operation(shifted, weight, None, **given)
            assert torch.equal(operation(x, weight, None, row_bias=rows, **given), expected), name


@torch.no_grad()
def test_a_norm_over_frames_is_a_group_norm_of_the_volume():
    x, weight, bias = normal(2, 3, 5, 4, 8), normal(8, seed=1), normal(8, seed=2)
    expected = F.group_norm(x.permute(0, 4, 1, 2, 3), 2, weight, bias, 1e-6).permute(0, 2, 3, 4, 1)
    result = OPS.activate(x, Norm(weight, bias, 2, 1e-6, over_frames=True), None, None, False)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    per_frame = OPS.activate(x, Norm(weight, bias, 2, 1e-6), None, None, False)
    assert (result - per_frame).abs().max() > 1e-2


@torch.no_grad()
def test_layer_norm_and_geglu_are_their_formulas():
    x, weight, bias = normal(2, 3, 5, 4, 8) + 3, normal(8, seed=1), normal(8, seed=2)
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    expected = (x - mean) / (variance + 1e-3).sqrt() * weight + bias
    torch.testing.assert_close(OPS.layer_norm(x, weight, bias, 1e-3), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(OPS.layer_norm(x, weight, bias), F.layer_norm(x, (8,), weight, bias))
    h, g = x[..., :4], x[..., 4:]
    torch.testing.assert_close(OPS.geglu(x), h * g * (1 + torch.erf(g / 2**0.5)) / 2, rtol=1e-12, atol=1e-12)
