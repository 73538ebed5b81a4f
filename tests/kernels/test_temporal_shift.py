"""temporal_shift: kernel and reference against loops and a one-hot conv3d; ends, halo, one frame; registration."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pylumiere.kernels import launching
from pylumiere.kernels import temporal_shift as op
from support.testing import DTYPES, shapes
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cpu" if launching.interpreted() else "cuda"
SHAPES = shapes("B T S C", [
    (1, 1, 1, 1),       # one of everything: no channel to shift
    (1, 1, 5, 16),      # one frame: bypassed
    (2, 2, 7, 21),      # both neighbours are ends; nothing divides a block
    (1, 5, 9, 64),
])  # fmt: skip
SPECS = [(direction, pad) for direction in op.DIRECTIONS for pad in op.PADS]


def run(x, n_div, direction, pad, before=None, after=None):
    parts = [None if v is None else v.to(DEVICE) for v in (before, after)]
    return op.launch(x.to(DEVICE), n_div, direction, pad, *parts).cpu()


@pytest.mark.parametrize("direction, pad", SPECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_the_reference(shape, dtype, direction, pad):
    x = torch.randn(*shape).to(dtype)
    assert torch.equal(run(x, 4, direction, pad), op.reference(x, 4, direction, pad))


@pytest.mark.parametrize("direction, pad", SPECS)
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("halo", ["before", "after", "before after"])
def test_halo_takes_the_place_of_the_padding(direction, pad, frames, halo):
    clip = torch.randn(2, frames + 2, 5, 16)
    parts = {"before": clip[:, 0], "after": clip[:, -1]}
    parts = {name: parts[name] for name in halo.split()}
    y = run(clip[:, 1:-1], 4, direction, pad, **parts)
    assert torch.equal(y, op.reference(clip[:, 1:-1], 4, direction, pad, **parts))
    if halo == "before after":
        assert torch.equal(y, op.reference(clip, 4, direction, pad)[:, 1:-1])


@pytest.mark.parametrize("direction, pad", SPECS)
def test_reference_is_a_loop(direction, pad):
    T, C, fold = 4, 12, 3
    x = torch.randn(1, T, 2, C)
    y = op.reference(x, 4, direction, pad)
    for t in range(T):
        for c in range(C):
            offset = [1, -1, 0, 0][c // fold] if direction == "both" else [-1, 0, 0, 0][c // fold]
            source = t + offset
            if pad == "circular":
                source %= T
            elif pad == "replicate":
                source = min(max(source, 0), T - 1)
            expected = x[0, source, :, c] if 0 <= source < T else torch.zeros(2)
            assert torch.equal(y[0, t, :, c], expected)


def test_shift_then_convolution_is_a_one_hot_conv3d():
    """W3d[:, c, frame of c] = W2d[:, c]: the semantics that the fused convolution must have."""
    B, T, H, W, C, O, spec = 1, 5, 4, 4, 16, 6, op.ShiftSpec(4)
    x, weight = torch.randn(B, T, H, W, C, dtype=torch.float64), torch.randn(O, C, 3, 3, dtype=torch.float64)
    shifted = op.reference(x.flatten(2, 3), spec.n_div).view_as(x)
    two_steps = F.conv2d(shifted.flatten(0, 1).permute(0, 3, 1, 2), weight, padding=1)
    taps = torch.zeros(O, C, 3, 3, 3, dtype=torch.float64)
    for first, end, offset in spec.channel_blocks(C):
        taps[:, first:end, 1 + offset] = weight[:, first:end]
    one_step = F.conv3d(x.permute(0, 4, 1, 2, 3), taps, padding=1)
    torch.testing.assert_close(two_steps, one_step.permute(0, 2, 1, 3, 4).flatten(0, 1))


def test_blocks_cover_every_channel_once():
    for channels in (1, 7, 8, 16, 320):
        for spec in (op.ShiftSpec(), op.ShiftSpec(2), op.ShiftSpec(1, "causal"), op.ShiftSpec(3, "causal", "circular")):
            blocks = spec.channel_blocks(channels)
            assert [c for first, end, _ in blocks for c in range(first, end)] == list(range(channels))


def test_strided_input():
    memory = torch.full((2, 6, 9, 40), float("nan"))
    x = memory[:, ::2, 1:8, 8:29]
    x.copy_(torch.randn(2, 3, 7, 21))
    assert torch.equal(run(x, 5, "both", "zero"), op.reference(x, 5))


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["clip", "frame", "pixel"])
def test_offsets_beyond_int32(axis, far_apart):
    x = far_apart((*(2 if i == axis else 1 for i in range(3)), 16), axis)
    assert torch.equal(op.launch(x).cpu(), op.reference(x.cpu()))


@settings(max_examples=15)
@given(
    st.integers(1, 2), st.integers(1, 5), st.integers(1, 9), st.integers(1, 40), st.integers(2, 9),
    st.sampled_from(SPECS),
)  # fmt: skip
def test_any_shape(B, T, S, C, n_div, spec):
    x = torch.randn(B, T, S, C)
    assert torch.equal(run(x, n_div, *spec), op.reference(x, n_div, *spec))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck():
    x = torch.randn(1, 3, 4, 8)
    torch.library.opcheck(op.temporal_shift, (x, 4, "both", "zero"))
    torch.library.opcheck(op.temporal_shift, (x, 4, "causal", "circular", x[:, 0].clone(), x[:, 1].clone()))


X = torch.zeros(1, 2, 3, 8)
REJECTED = {
    "rank": ((X[0],), r"x has shape \(2, 3, 8\)"),
    "dtype": ((X.int(),), "x has dtype torch.int32"),
    "empty": ((X[:, :0],), r"empty, shape \(1, 0, 3, 8\)"),
    "stride": ((X.transpose(2, 3),), "x has stride"),
    "n_div": ((X, 1), "n_div=1 is below 2"),
    "direction": ((X, 8, "back"), "direction='back'"),
    "pad": ((X, 8, "both", "mirror"), "pad='mirror'"),
    "halo shape": ((X, 8, "both", "zero", X[:, :, 0]), r"before has shape \(1, 2, 8\), expected \(1, 3, 8\)"),
    "halo dtype": ((X, 8, "both", "zero", None, X[:, 0].half()), "after has dtype torch.float16"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_in_the_op_and_in_the_fake(name):
    args, message = REJECTED[name]
    with pytest.raises(ValueError, match=message):
        op.temporal_shift(*args)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        op.temporal_shift(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in args))


@pytest.mark.gpu
@pytest.mark.slow
def test_beyond_int32_elements():
    x = torch.empty(1, 80, 200 * 200, 700, dtype=torch.float16, device="cuda")  # 2.24e9 elements
    x[0, -2:, -3:] = torch.randn(2, 3, 700, device="cuda", dtype=torch.float16)
    assert torch.equal(op.launch(x)[0, -1:, -3:], op.reference(x[:, -2:, -3:].contiguous())[0, -1:])
