"""norm_affine: statistics, their merging and the folded affine against float64; the reference against F.group_norm."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pylumiere.kernels import launching
from pylumiere.kernels import norm_affine as op
from support.testing import DTYPES, assert_close, rel_rms, shapes
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cpu" if launching.interpreted() else "cuda"
SHAPES = shapes("N S C num_groups", [
    (1, 1, 4, 4),         # one pixel, one channel per group
    (2, 37, 24, 4),       # nothing divides a block
    (1, 1100, 10, 2),     # more tiles than one merge takes
    (2, 256, 64, 4),      # level 0 of the demo network
])  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_match_reference(shape, dtype):
    x = torch.randn(*shape[:3]).to(dtype)
    assert_close(op.launch_statistics(x.to(DEVICE)).cpu(), op.statistics_reference(x.double()))


@settings(max_examples=15)
@given(shape=st.tuples(st.integers(1, 3), st.integers(2, 150), st.integers(1, 40)), dtype=st.sampled_from(DTYPES))
def test_statistics_of_any_shape(shape, dtype):
    x = torch.randn(shape).to(dtype)
    assert_close(op.launch_statistics(x.to(DEVICE)).cpu(), op.statistics_reference(x.double()))


def test_offset_mean_does_not_cancel():
    """A mean of 1000 costs 1000 eps, since means are stored in float32; E[x^2] - E[x]^2 would cost its square."""
    x = torch.randn(1, 200, 16) + 1e3
    deviations = op.launch_statistics(x.to(DEVICE)).cpu()[:, 1]
    assert rel_rms(deviations, op.statistics_reference(x.double())[:, 1]) < 1e3 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("axis", [0, 1], ids=["frame", "pixel"])
def test_offsets_beyond_int32(axis, far_apart):
    x = far_apart((*(2 if i == axis else 1 for i in range(2)), 16), axis)
    assert_close(op.launch_statistics(x).cpu(), op.statistics_reference(x.double().cpu()))


def test_statistics_of_strided_input():
    memory = torch.full((2, 40, 48), float("nan"))
    x = memory[:, ::2, 16:40]
    x.copy_(torch.randn(2, 20, 24))
    assert_close(op.launch_statistics(x.to(DEVICE)).cpu(), op.statistics_reference(x.double()))


@pytest.mark.parametrize("modulation", [None, "clip", "frame", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_matches_reference(dtype, modulation):
    B, T, C = 2, 3, 24
    statistics = op.statistics_reference(torch.randn(B * T, 30, C))
    gamma, beta = torch.randn(C).to(dtype), torch.randn(C).to(dtype)
    scale = shift = None
    if modulation:
        rows = torch.randn(B, 1 if modulation == "clip" else T, 2 * C).to(dtype)
        scale, shift = rows.chunk(2, -1) if modulation == "sliced" else (v.contiguous() for v in rows.chunk(2, -1))
    args = (statistics, 30, gamma, beta, 4, 1e-5, scale, shift)
    actual = op.launch(*(v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in args))
    expected = op.reference(*(v.double() if isinstance(v, torch.Tensor) else v for v in args))
    for name, a, e in zip(("mul", "add"), actual, expected, strict=True):
        assert_close(a.cpu(), e, name=name)


def test_reference_is_group_norm():
    x = torch.randn(3, 20, 24, dtype=torch.float64)
    gamma, beta = torch.randn(24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    mul, add = op.reference(op.statistics_reference(x), 20, gamma, beta, 4, 1e-5)
    expected = F.group_norm(x.transpose(1, 2), 4, gamma, beta, 1e-5).transpose(1, 2)
    assert rel_rms(x * mul[:, None] + add[:, None], expected) < 1e-13


def test_opcheck():
    statistics = op.statistics_reference(torch.randn(4, 30, 8))
    torch.library.opcheck(op.channel_statistics, (torch.randn(2, 30, 8),))
    args = (statistics, 30, torch.randn(8), torch.randn(8), 4, 1e-5, torch.randn(2, 1, 8), torch.randn(2, 2, 8))
    torch.library.opcheck(op.norm_affine, args)


BAD = [
    (dict(statistics=(4, 3, 8)), "statistics has shape (4, 3, 8)"),
    (dict(num_groups=3), "C=8 is not a multiple of num_groups=3"),
    (dict(pixels=0), "pixels=0"),
    (dict(gamma=(7,)), "gamma has shape (7,)"),
    (dict(scale=(3, 1, 8)), "scale has shape (3, 1, 8)"),
    (dict(shift=(2, 2, 9)), "shift has shape (2, 2, 9)"),
]


@pytest.mark.parametrize("fake", [False, True], ids=["op", "fake"])
@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_rejects(change, message, fake):
    sizes = dict(statistics=(4, 2, 8), gamma=(8,), beta=(8,), scale=(2, 1, 8), shift=(2, 1, 8))

    def call():
        tensors = {name: torch.zeros(change.get(name, size)) for name, size in sizes.items()}
        op.norm_affine(**tensors, pixels=change.get("pixels", 30), num_groups=change.get("num_groups", 4))

    with pytest.raises(ValueError) as error:
        if fake:
            with FakeTensorMode():
                call()
        else:
            call()
    assert message in str(error.value)
