"""geglu: the kernel against the float64 reference; the reference against its formula; registration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pylumiere.kernels import geglu as op
from pylumiere.kernels import launching, tuning
from support.testing import DTYPES, assert_close, rel_rms, shapes
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cpu" if launching.interpreted() else "cuda"
SHAPES = shapes("S C", [
    (1, 1),       # smallest
    (5, 33),      # nothing divides a block
    (9, 1280),    # the feed-forward layers of the public U-Nets, a few pixels of them
    (3, 2560),
])  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_matches_reference(shape, dtype):
    S, C = shape
    x = (2 * torch.randn(S, 2 * C)).to(dtype)
    assert_close(op.launch(x.to(DEVICE)).cpu(), op.reference(x.double()))


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 10), st.integers(1, 40), st.sampled_from(DTYPES))
def test_any_shape(B, S, C, dtype):
    x = torch.randn(B, S, 2 * C).to(dtype)
    y = op.launch(x.to(DEVICE)).cpu()
    assert y.shape == (B, S, C)
    assert_close(y, op.reference(x.double()))


def test_a_far_gate_lets_all_or_nothing_through():
    h = torch.randn(3, 4)
    gates = torch.tensor([30.0, -30.0, 0.0, 1e4]).expand(3, 4)
    y = op.launch(torch.cat([h, gates], -1).to(DEVICE)).cpu()
    expected = h * torch.tensor([30.0, 0.0, 0.0, 1e4])
    assert torch.equal(y, expected)


def test_reference_is_its_formula():
    h, g = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    expected = h * g * (1 + torch.erf(g / 2**0.5)) / 2
    assert rel_rms(op.reference(torch.cat([h, g], -1)), expected) < 1e-14


def test_strided_input():
    memory = torch.full((2, 10, 48), float("nan"))
    x = memory[:, ::2, 8:34]
    x.copy_(torch.randn(2, 5, 26))
    assert_close(op.launch(x.to(DEVICE)).cpu(), op.reference(x.double()))


def test_offsets_beyond_int32(far_apart):
    x = far_apart((2, 32), 0)
    assert_close(op.launch(x).cpu(), op.reference(x.double().cpu()))


def test_every_listed_tile_computes_the_same():
    x = torch.randn(20, 2 * 40)
    for row in tuning.TABLE["geglu"][75]:
        with pytest.MonkeyPatch.context() as patch:
            rows = [tuning.Row(row.config)]
            patch.setitem(tuning.TABLE, "geglu", {0: rows, 75: rows})  # whatever the device
            assert_close(op.launch(x.to(DEVICE)).cpu(), op.reference(x.double()), name=str(row.config.constants))


def test_cost_reads_both_halves_and_writes_one():
    assert op.cost(torch.empty(2, 3, 8, dtype=torch.float16)).bytes == 2 * (48 + 24)


# ---- registration --------------------------------------------------------------------------------------------------


def test_opcheck():
    torch.library.opcheck(op.geglu, (torch.randn(2, 3, 8),))


X = torch.zeros(2, 3, 8)
REJECTED = {
    "dtype": (X.int(), "x has dtype torch.int32"),
    "empty": (X[:0], r"x is empty, shape \(0, 3, 8\)"),
    "halves": (X[..., :7], "x has 7 channels, not two halves"),
    "channel stride": (X.mT.contiguous().mT, "last axis must be contiguous"),
    "token stride": (X.transpose(0, 1), "tokens must be evenly spaced"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_in_the_op_and_in_the_fake(name):
    x, message = REJECTED[name]
    with pytest.raises(ValueError, match=message):
        op.geglu(x)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        op.geglu(mode.from_tensor(x))


@pytest.mark.gpu
@pytest.mark.slow
def test_beyond_int32_elements():
    x = torch.randn(900_000, 2 * 1280, dtype=torch.float16, device="cuda")  # 2.3e9 elements
    assert_close(op.launch(x)[-1000:], op.reference(x[-1000:].double()))
