"""layer_norm: the kernel against the float64 reference; the reference against its formula; registration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pylumiere.kernels import launching, tuning
from pylumiere.kernels import layer_norm as op
from support.testing import DTYPES, assert_close, rel_rms, shapes
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cpu" if launching.interpreted() else "cuda"
SHAPES = shapes("S C", [
    (1, 1),              # smallest
    (5, 33),             # nothing divides a block
    (2 * 3 * 16, 320),   # levels of the public U-Nets, a few pixels of them
    (7, 640),
    (3, 1280),
])  # fmt: skip


def to(tree, change):
    return [change(v) if isinstance(v, torch.Tensor) else v for v in tree]


def run(*args):
    return op.launch(*to(args, lambda v: v.to(DEVICE))).cpu()


def oracle(*args):
    return op.reference(*to(args, lambda v: v.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_matches_reference(shape, dtype):
    x, (weight, bias) = (2 * torch.randn(shape) + 1).to(dtype), torch.randn(2, shape[-1]).to(dtype)
    assert_close(run(x, weight, bias), oracle(x, weight, bias))


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(2, 90), st.sampled_from(DTYPES))
def test_any_shape(B, S, C, dtype):
    x, (weight, bias) = torch.randn(B, S, C).to(dtype), torch.randn(2, C).to(dtype)
    y = run(x, weight, bias, 1e-2)
    assert y.shape == x.shape
    assert_close(y, oracle(x, weight, bias, 1e-2))


@pytest.mark.parametrize("C", [320, 333])
def test_offset_mean_does_not_cancel(C):
    """A mean of 1000 costs about 1000 eps, since x and the mean are float32; E[x^2] - E[x]^2 would cost 1000^2 eps."""
    args = (torch.randn(9, C) + 1e3, torch.ones(C), torch.zeros(C))
    assert rel_rms(run(*args), oracle(*args)) < 1e3 * torch.finfo(torch.float32).eps


def test_a_constant_token_gives_the_bias():
    bias = torch.randn(24)
    assert torch.equal(run(torch.full((6, 24), 3.0), torch.randn(24), bias), bias.expand(6, 24))


def test_reference_is_its_formula():
    x, weight, bias = (torch.randn(*size, 12, dtype=torch.float64) for size in ((2, 3), (), ()))
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    expected = (x - mean) / (variance + 1e-3).sqrt() * weight + bias
    assert rel_rms(op.reference(x, weight, bias, 1e-3), expected) < 1e-14


def test_strided_input():
    memory = torch.full((2, 10, 48), float("nan"))
    x = memory[:, ::2, 8:32]
    x.copy_(torch.randn(2, 5, 24))
    assert_close(run(x, torch.ones(24), torch.zeros(24)), oracle(x, torch.ones(24), torch.zeros(24)))


def test_offsets_beyond_int32(far_apart):
    x, parts = far_apart((2, 16), 0), torch.randn(2, 16).half()
    assert_close(op.launch(x, *parts.to(DEVICE)).cpu(), oracle(x.cpu(), *parts))


def test_every_listed_tile_computes_the_same():
    args = (torch.randn(5, 40), torch.randn(40), torch.randn(40))
    for row in tuning.TABLE["layer_norm"][75]:
        with pytest.MonkeyPatch.context() as patch:
            rows = [tuning.Row(row.config)]
            patch.setitem(tuning.TABLE, "layer_norm", {0: rows, 75: rows})  # whatever the device
            assert_close(run(*args), oracle(*args), name=str(row.config.constants))


def test_cost_reads_and_writes_each_value_once():
    x, weight = torch.empty(2, 3, 8, dtype=torch.float16), torch.empty(8, dtype=torch.float16)
    assert op.cost(x, weight, weight).bytes == 2 * (48 + 48 + 8 + 8)


# ---- registration --------------------------------------------------------------------------------------------------


def test_opcheck():
    torch.library.opcheck(op.layer_norm, (torch.randn(2, 3, 8), torch.randn(8), torch.randn(8), 1e-3))


X, WEIGHT = torch.zeros(2, 3, 8), torch.zeros(8)
REJECTED = {
    "dtype": ((X.int(), WEIGHT, WEIGHT), "x has dtype torch.int32"),
    "empty": ((X[:0], WEIGHT, WEIGHT), r"x is empty, shape \(0, 3, 8\)"),
    "width": ((torch.zeros(1, 8193), WEIGHT, WEIGHT), "x has C=8193 channels, at most 8192"),
    "channel stride": ((X.mT.contiguous().mT, WEIGHT, WEIGHT), "last axis must be contiguous"),
    "token stride": ((X.transpose(0, 1), WEIGHT, WEIGHT), "tokens must be evenly spaced"),
    "weight": ((X, WEIGHT[:4], WEIGHT), r"weight has shape \(4,\), expected contiguous \(8,\)"),
    "bias": ((X, WEIGHT, WEIGHT[None]), r"bias has shape \(1, 8\)"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_in_the_op_and_in_the_fake(name):
    args, message = REJECTED[name]
    with pytest.raises(ValueError, match=message):
        op.layer_norm(*args)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        op.layer_norm(*to(args, mode.from_tensor))


@pytest.mark.gpu
@pytest.mark.slow
def test_beyond_int32_elements():
    x = torch.randn(7_000_000, 320, dtype=torch.float16, device="cuda")  # 2.24e9 elements
    weight, bias = torch.randn(2, 320, dtype=torch.float16, device="cuda")
    assert_close(op.launch(x, weight, bias)[-1000:], oracle(x[-1000:], weight, bias))
