"""temporal_attention: both ways of the kernel against the float64 reference; the reference against SDPA."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pylumiere.kernels import launching, tuning
from pylumiere.kernels import temporal_attention as op
from support.testing import DTYPES, assert_close, shapes
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cpu" if launching.interpreted() else "cuda"
SHAPES = shapes("B T S num_heads D", [
    (1, 1, 1, 1, 8),        # one frame: the value itself
    (2, 5, 7, 3, 8),        # the last tile is not full; a tile crosses from one clip to the next
    (1, 10, 9, 2, 32),      # the coarsest level of 80 frames
    (1, 17, 3, 1, 24),      # odd, D not a power of two
    (1, 128, 1, 1, 16),     # the longest
])  # fmt: skip


def position_of(kind, num_heads, T):
    return {"none": None, "absolute": torch.randn(num_heads, T, T), "relative": torch.randn(num_heads, 2 * T - 1)}[kind]


def run(qkv, num_heads, position=None):
    return op.launch(qkv.to(DEVICE), num_heads, None if position is None else position.to(DEVICE)).cpu()


def check(qkv, num_heads, position=None):
    exact = op.reference(qkv.double(), num_heads, None if position is None else position.double())
    assert_close(run(qkv, num_heads, position), exact, kind="matmul", plain=op.reference(qkv, num_heads, position))


@pytest.mark.parametrize("kind", ["none", "absolute", "relative"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_matches_reference(shape, dtype, kind):
    B, T, S, num_heads, D = shape
    check(torch.randn(B, T, S, 3 * num_heads * D).to(dtype), num_heads, position_of(kind, num_heads, T))


@pytest.mark.parametrize("kind", ["none", "absolute", "relative"])
@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_in_every_dtype(dtype, matrix, kind, monkeypatch):
    config = tuning.Config({"BLOCK_M": 32, "MATRIX": matrix}, 4, 1)
    monkeypatch.setattr(tuning, "choose", lambda *_, **__: config)
    check(torch.randn(2, 6, 5, 3 * 2 * 16).to(dtype), 2, position_of(kind, 2, 6))


@pytest.mark.parametrize("kind", ["none", "absolute", "relative"])
def test_reference_is_sdpa(kind):
    B, T, S, num_heads, D = 2, 6, 3, 2, 8
    qkv = torch.randn(B, T, S, 3, num_heads, D, dtype=torch.float64)
    position = position_of(kind, num_heads, T)
    mask = None if position is None else torch.empty(num_heads, T, T, dtype=torch.float64)
    for i in range(T if position is not None else 0):
        for j in range(T):
            mask[:, i, j] = position[:, i, j] if kind == "absolute" else position[:, j - i + T - 1]
    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5)  # [B, S, heads, T, D]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).permute(0, 3, 1, 2, 4).flatten(3)
    torch.testing.assert_close(op.reference(qkv.flatten(3), num_heads, position), expected)


def test_pixels_do_not_see_each_other():
    """The other pixels of a tile hold values that would win every softmax."""
    qkv = torch.randn(1, 5, 6, 3 * 16)
    alone = run(qkv, 1)[:, :, 2]
    qkv[:, :, [0, 1, 3, 4, 5]] = 1e4
    assert torch.equal(run(qkv, 1)[:, :, 2], alone)


def test_large_scores_do_not_overflow():
    check(torch.randn(1, 6, 4, 3 * 16) * 100, 1)


def test_strided_input():
    memory = torch.full((2, 8, 9, 200), float("nan"))
    qkv = memory[:, ::2, 1:6, 8:104]
    qkv.copy_(torch.randn(2, 4, 5, 96))
    check(qkv, 2)


def test_grid_uses_the_first_axis_alone():
    """The other axes of a grid end at 65,535: 70,000 sequences of full length, one for each tile."""
    with launching.record(90) as recording:
        op.launch(torch.empty(1, 128, 70_000, 3 * 32, device="meta", dtype=torch.float16), 2)
    assert recording.launches[0].grid == (140_000,)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["clip", "frame", "pixel"])
def test_offsets_beyond_int32(axis, far_apart):
    qkv = far_apart((*(2 if i == axis else 1 for i in range(3)), 48), axis)
    exact, plain = op.reference(qkv.double().cpu(), 2), op.reference(qkv.cpu(), 2)
    assert_close(op.launch(qkv, 2).cpu(), exact, kind="matmul", plain=plain)


def test_more_sequences_than_65535(monkeypatch):
    """In a tile of many pixels, so that the interpreter has some hundred programs to run."""
    config = tuning.Config({"BLOCK_M": 256, "MATRIX": False}, 4, 1)
    monkeypatch.setattr(tuning, "choose", lambda *_, **__: config)
    qkv = torch.randn(2, 2, 33_000, 24, dtype=torch.float16)
    y = op.launch(qkv.to(DEVICE), 1)[:, :, -50:].cpu()
    last = qkv[:, :, -50:].contiguous()
    assert_close(y, op.reference(last.double(), 1), kind="matmul", plain=op.reference(last, 1))


@settings(max_examples=15)
@given(
    st.integers(1, 2), st.integers(1, 33), st.integers(1, 9), st.integers(1, 2), st.integers(1, 24),
    st.sampled_from(["none", "absolute", "relative"]),
)  # fmt: skip
def test_any_shape(B, T, S, num_heads, D, kind):
    check(torch.randn(B, T, S, 3 * num_heads * D), num_heads, position_of(kind, num_heads, T))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["none", "absolute", "relative"])
def test_opcheck(kind):
    torch.library.opcheck(op.temporal_attention, (torch.randn(1, 3, 4, 48), 2, position_of(kind, 2, 3)))


X = torch.zeros(1, 3, 4, 24)
REJECTED = {
    "rank": ((X[0], 2), r"qkv has shape \(3, 4, 24\)"),
    "dtype": ((X.int(), 2), "qkv has dtype torch.int32"),
    "empty": ((X[:, :, :0], 2), "qkv is empty"),
    "heads": ((X, 3), "24 channels, not a multiple of 3 \\* num_heads=9"),
    "frames": ((torch.zeros(1, 129, 1, 3), 1), "T=129 frames, at most 128"),
    "head_dim": ((torch.zeros(1, 1, 1, 3 * 129), 1), "heads of 129, at most 128"),
    "pixels": ((torch.zeros(1, 1, 1, 3).expand(2**16, 1, 2**15, 3), 1), "B\\*S=2147483648 pixels"),
    "stride": ((torch.zeros(1, 3, 24, 4).transpose(2, 3), 2), "qkv has stride"),
    "position": ((X, 2, torch.zeros(2, 3)), r"position has shape \(2, 3\), expected \(2, 3, 3\) or \(2, 5\)"),
    "position dtype": ((X, 2, torch.zeros(2, 5, dtype=torch.int32)), "position has dtype torch.int32"),
    "position stride": ((X, 2, torch.zeros(5, 2).T), "position has stride"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_in_the_op_and_in_the_fake(name):
    args, message = REJECTED[name]
    with pytest.raises(ValueError, match=message):
        op.temporal_attention(*args)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        op.temporal_attention(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in args))


@pytest.mark.gpu
@pytest.mark.slow
def test_beyond_int32_elements():
    qkv = torch.randn(1, 10, 1_200_000, 3 * 64, dtype=torch.float16, device="cuda")  # 2.3e9 elements
    last = qkv[:, :, -9:].contiguous()
    exact, plain = op.reference(last.double(), 2), op.reference(last, 2)
    assert_close(op.launch(qkv, 2)[:, :, -9:], exact, kind="matmul", plain=plain)
