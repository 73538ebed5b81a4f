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


def launch(*args):
    return [v.cpu() for v in op.launch(*(v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in args))]


def oracle(*args):
    return op.reference(*(v.double() if isinstance(v, torch.Tensor) else v for v in args))


def check(*args):
    for name, actual, expected in zip(("mul", "add"), launch(*args), oracle(*args), strict=True):
        assert_close(actual, expected, name=name)


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
    check(statistics, 30, gamma, beta, 4, 1e-5, scale, shift)


@pytest.mark.parametrize("over_frames", [1, 5], ids=["frame", "clip"])
@pytest.mark.parametrize("rows", [None, "clip", "frame", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_bias_and_frames_match_reference(dtype, rows, over_frames):
    B, T, C = 2, 5, 24
    statistics = op.statistics_reference(torch.randn(B * T, 30, C) + torch.arange(B * T).view(-1, 1, 1))
    gamma, beta = torch.randn(C).to(dtype), torch.randn(C).to(dtype)
    row_bias, scale, shift = torch.randn(B, 1 if rows == "clip" else T, 3 * C).to(dtype).chunk(3, -1)
    row_bias = None if rows is None else row_bias if rows == "sliced" else row_bias.contiguous()
    for modulation in ((None, None), (scale, shift)):
        check(statistics, 30, gamma, beta, 4, 1e-5, *modulation, row_bias, over_frames)


@settings(max_examples=15)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 40), st.booleans(), st.booleans(),
)  # fmt: skip
def test_affine_of_any_shape(B, T, num_groups, group_size, has_rows, over_clips):
    C = num_groups * group_size
    statistics = op.statistics_reference(torch.randn(B * T, 7, C))
    row_bias = torch.randn(B, T, C) if has_rows else None
    check(statistics, 7, torch.randn(C), torch.randn(C), num_groups, 1e-5, None, None, row_bias, T if over_clips else 1)


@pytest.mark.parametrize("frames", [1, 40], ids=["frame", "clip"])
def test_a_large_row_bias_does_not_cancel(frames):
    """It moves the mean by 1000, which costs 1000 eps; sums of squares of x + row_bias would cost its square."""
    statistics = op.statistics_reference(torch.randn(frames, 50, 16))
    rows = torch.randn(frames, 1, 16) + 1e3
    args = (statistics, 50, torch.ones(16), torch.zeros(16), 4, 1e-5, None, None, rows, frames)
    (mul, add), (expected_mul, expected_add) = launch(*args), oracle(*args)
    eps = torch.finfo(torch.float32).eps
    assert rel_rms(mul, expected_mul) < 1e3 * eps
    assert (add - expected_add).abs().max() < 8e3 * eps


def test_a_row_bias_is_an_addition_before_the_norm():
    x, rows = torch.randn(6, 20, 24, dtype=torch.float64), torch.randn(2, 1, 24, dtype=torch.float64)
    gamma, beta = torch.randn(24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    moved = x + rows.expand(2, 3, 24).reshape(6, 1, 24)
    for over_frames in (1, 3):
        mul, add = op.reference(
            op.statistics_reference(x), 20, gamma, beta, 4, 1e-5, row_bias=rows, over_frames=over_frames
        )
        clips = moved.unflatten(0, (-1, over_frames)).permute(0, 3, 1, 2)  # [clips, C, frames, S]
        expected = F.group_norm(clips, 4, gamma, beta, 1e-5).permute(0, 2, 3, 1).flatten(0, 1)
        assert rel_rms(x * mul[:, None] + add[:, None], expected) < 1e-13


def test_a_row_bias_and_a_norm_over_frames_cost_no_launch():
    with launching.record(90) as recording:
        statistics, gamma, rows = (torch.empty(*size, 64, device="meta") for size in ((32, 2), (), (2, 16)))
        op.launch(statistics, 64, gamma, gamma, 4)
        op.launch(statistics, 64, gamma, gamma, 4, row_bias=rows, over_frames=16)
    assert [len(call.launches) for call in recording.calls] == [1, 1]


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
    torch.library.opcheck(op.norm_affine, (*args, torch.randn(2, 1, 8), 2))


BAD = [
    (dict(statistics=(4, 3, 8)), "statistics has shape (4, 3, 8)"),
    (dict(num_groups=3), "C=8 is not a multiple of num_groups=3"),
    (dict(pixels=0), "pixels=0"),
    (dict(gamma=(7,)), "gamma has shape (7,)"),
    (dict(scale=(3, 1, 8)), "scale has shape (3, 1, 8)"),
    (dict(shift=(2, 2, 9)), "shift has shape (2, 2, 9)"),
    (dict(row_bias=(2, 3, 8)), "row_bias has shape (2, 3, 8)"),
    (dict(row_bias=(4, 1, 8)), "shift has B=2, row_bias has B=4"),
    (dict(over_frames=3), "over_frames=3 does not divide the 4 frames"),
]


@pytest.mark.parametrize("fake", [False, True], ids=["op", "fake"])
@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_rejects(change, message, fake):
    sizes = dict(statistics=(4, 2, 8), gamma=(8,), beta=(8,), scale=(2, 1, 8), shift=(2, 1, 8), row_bias=(2, 1, 8))
    numbers = dict(pixels=30, num_groups=4, over_frames=1)

    def call():
        tensors = {name: torch.zeros(change.get(name, size)) for name, size in sizes.items()}
        op.norm_affine(**tensors, **{name: change.get(name, value) for name, value in numbers.items()})

    with pytest.raises(ValueError) as error:
        if fake:
            with FakeTensorMode():
                call()
        else:
            call()
    assert message in str(error.value)
