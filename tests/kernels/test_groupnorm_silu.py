"""groupnorm_silu: kernels against the float64 reference; the reference against F.group_norm; registration."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pylumiere.kernels import groupnorm_silu as op
from pylumiere.kernels import launching, norm_affine
from support.testing import DTYPES, assert_close, rel_rms, shapes
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cpu" if launching.interpreted() else "cuda"
SHAPES = shapes("B T S C num_groups", [
    (1, 1, 1, 32, 4),        # one pixel
    (2, 3, 37, 24, 4),       # nothing divides a block
    (1, 2, 300, 10, 2),      # many tiles of pixels
    (1, 1, 64, 128, 8),      # level 1 of the demo network, one frame of it
])  # fmt: skip


def to(tree, change):
    return [change(v) if isinstance(v, torch.Tensor) else v for v in tree]


def run(*args):
    return op.launch(*to(args, lambda v: v.to(DEVICE))).cpu()


def oracle(*args):
    return op.reference(*to(args, lambda v: v.double()))


@pytest.mark.parametrize("over, modulation", [("frame", None), ("frame", "clip"), ("clip", "frame")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_matches_reference(shape, dtype, over, modulation):
    B, T, S, C, num_groups = shape
    x = (torch.randn(B, T, S, C) * 2 + 1).to(dtype)
    weight, bias = torch.randn(2, C).to(dtype)
    scale = shift = None
    if modulation:
        scale, shift = torch.randn(B, 1 if modulation == "clip" else T, 2 * C).to(dtype).chunk(2, -1)
    args = (x, weight, bias, num_groups, 1e-5, over, scale, shift)
    assert_close(run(*args), oracle(*args))


@pytest.mark.parametrize("over", op.OVER)
def test_given_statistics_save_the_read_and_change_nothing(over):
    x, weight, bias = torch.randn(2, 3, 20, 16), torch.randn(16), torch.randn(16)
    statistics = norm_affine.launch_statistics(x.flatten(0, 1).to(DEVICE)).cpu()
    args = (x, weight, bias, 4, 1e-5, over, None, None, True)
    assert torch.equal(run(*args, statistics), run(*args))
    assert_close(op.reference(*args, statistics), oracle(*args))
    with launching.record(90) as recording:
        op.launch(*to((*args, statistics), lambda v: v.to("meta")))
    assert not any("tile_statistics" in entry.kernel for entry in recording.launches)


@pytest.mark.parametrize("over", op.OVER)
def test_offset_mean_does_not_cancel(over):
    """A mean of 1000 costs about 1000 eps, since x and the mean are float32; E[x^2] - E[x]^2 would cost 1000^2 eps."""
    x = torch.randn(1, 2, 100, 16) + 1e3
    args = (x, torch.ones(16), torch.zeros(16), 4, 1e-5, over, None, None, False)
    assert rel_rms(run(*args), oracle(*args)) < 1e3 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("over", op.OVER)
def test_reference_is_group_norm(over):
    B, T, S, C, num_groups = 2, 3, 10, 12, 4
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((B, T, S, C), (C,), (C,)))
    rows = x.flatten(0, 1) if over == "frame" else x.flatten(1, 2)
    normed = F.group_norm(rows.transpose(1, 2), num_groups, weight, bias, 1e-3)
    expected = F.silu(normed).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(op.reference(x, weight, bias, num_groups, 1e-3, over), expected)


def test_constant_input_gives_silu_of_the_bias():
    bias = torch.randn(8)
    y = run(torch.full((1, 2, 9, 8), 3.0), torch.randn(8), bias, 2)
    assert_close(y, F.silu(bias).double().expand(1, 2, 9, 8))


def test_strided_input():
    memory = torch.full((2, 3, 40, 48), float("nan"))
    x = memory[:, :, ::2, 16:40]
    x.copy_(torch.randn(2, 3, 20, 24))
    args = (x, torch.randn(24), torch.randn(24), 4)
    assert_close(run(*args), oracle(*args))


@pytest.mark.parametrize("axis", [1, 2], ids=["frame", "pixel"])
def test_offsets_beyond_int32(axis, far_apart):
    x = far_apart((1, *(2 if i == axis else 1 for i in (1, 2)), 16), axis)
    args = (torch.randn(16).half(), torch.randn(16).half(), 4)
    assert_close(op.launch(x, *to(args, lambda v: v.to(DEVICE))).cpu(), oracle(x.cpu(), *args))


@settings(max_examples=12)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 9),
    st.sampled_from(op.OVER), st.booleans(),
)  # fmt: skip
def test_any_shape(B, T, S, num_groups, group_size, over, silu):
    C = num_groups * group_size
    args = (torch.randn(B, T, S, C), torch.randn(C), torch.randn(C) + 1, num_groups, 1e-2, over, None, None, silu)
    assert_close(run(*args), oracle(*args))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck():
    x, gamma, rows = torch.randn(2, 3, 4, 8), torch.randn(8), torch.randn(2, 1, 8)
    torch.library.opcheck(op.groupnorm_silu, (x, gamma, gamma.clone(), 2))
    statistics = norm_affine.statistics_reference(x.flatten(0, 1))
    torch.library.opcheck(
        op.groupnorm_silu, (x, gamma, gamma.clone(), 2, 1e-5, "clip", rows, rows.clone(), False, statistics)
    )


X, GAMMA = torch.zeros(2, 3, 4, 8), torch.zeros(8)
REJECTED = {
    "rank": ((X[0], GAMMA, GAMMA, 2), r"x has shape \(3, 4, 8\)"),
    "dtype": ((X.int(), GAMMA, GAMMA, 2), "x has dtype torch.int32"),
    "empty": ((X[:, :, :0], GAMMA, GAMMA, 2), "x is empty"),
    "groups": ((X, GAMMA, GAMMA, 3), "C=8 is not a multiple of num_groups=3"),
    "over": ((X, GAMMA, GAMMA, 2, 1e-5, "batch"), "over='batch'"),
    "weight": ((X, GAMMA[:4], GAMMA, 2), r"weight has shape \(4,\), expected \(8,\)"),
    "channel stride": ((X.transpose(2, 3).contiguous().transpose(2, 3), GAMMA, GAMMA, 2), "x has stride"),
    "frame stride": ((X.transpose(0, 1).contiguous().transpose(0, 1), GAMMA, GAMMA, 2), "frames must be evenly spaced"),
    "scale alone": ((X, GAMMA, GAMMA, 2, 1e-5, "frame", X[:, :1, 0]), "scale is given and shift is None"),
    "scale": ((X, GAMMA, GAMMA, 2, 1e-5, "frame", X[:, :2, 0], X[:, :1, 0]), r"scale has shape \(2, 2, 8\)"),
    "statistics": (
        (X, GAMMA, GAMMA, 2, 1e-5, "frame", None, None, True, X[:, 0, :2]), r"statistics has shape \(2, 2, 8\)"
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_in_the_op_and_in_the_fake(name):
    args, message = REJECTED[name]
    with pytest.raises(ValueError, match=message):
        op.groupnorm_silu(*args)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        op.groupnorm_silu(*to(args, mode.from_tensor))


@pytest.mark.gpu
@pytest.mark.slow
def test_beyond_int32_elements():
    x = torch.randn(1, 80, 200 * 200, 700, dtype=torch.float16, device="cuda")  # 2.24e9 elements
    args = (torch.ones(700, device="cuda"), torch.zeros(700, device="cuda"), 35)
    assert_close(op.launch(x, *args)[:, -1:], op.reference(x[:, -1:].double(), *(v for v in args)))
