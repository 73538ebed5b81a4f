"""factorized_conv: the fused kernel against the float64 reference; the plan and its reasons."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pylumiere.kernels import factorized_conv as op
from pylumiere.kernels import launching
from pylumiere.kernels.implicit_gemm import pack_weight
from support.testing import DTYPES, assert_close, rel_rms, shapes
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cpu" if launching.interpreted() else "cuda"
SHAPES = shapes("B T H W C M O", [
    (1, 1, 1, 1, 1, 1, 1),        # smallest
    (2, 5, 3, 5, 13, 9, 19),      # nothing divides a block; a second chunk of frames
    (1, 2, 9, 9, 24, 40, 33),     # two tiles of pixels
    (1, 4, 8, 8, 32, 32, 32),     # a level of a small super-resolution network
])  # fmt: skip


def make(shape, dtype, fused=True):
    B, T, H, W, C, M, O = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size, dtype=dtype, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to(dtype)

    tensors = {
        "x": random(B, T, H, W, C), "weight_s": random(M, C, 3, 3, scale=(9 * C) ** -0.5), "bias_s": random(M),
        "weight_t": random(O, M, 3, scale=(3 * M) ** -0.5), "bias_t": random(O),
    }  # fmt: skip
    if fused:
        tensors |= {"mul": random(B * T, C, dtype=torch.float32), "add": random(B * T, C, dtype=torch.float32)}
        tensors["residual"] = random(B, T, H, W, O)
    return tensors, dict(silu=fused, silu_between=fused)


def run(tensors, options, fused=True):
    tensors = {name: value.to(DEVICE) for name, value in tensors.items()}
    tensors |= {name: pack_weight(tensors[name]) for name in ("weight_s", "weight_t")}
    return op.launch(**tensors, **options, fused=fused).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_matches_reference(shape, dtype):
    tensors, options = make(shape, dtype)
    expected = op.reference(**{name: value.double() for name, value in tensors.items()}, **options)
    assert_close(run(tensors, options), expected, kind="matmul")


@settings(max_examples=6)
@given(shape=st.tuples(*(st.integers(1, n) for n in (2, 6, 5, 5, 40, 40, 40))), fused=st.booleans())
def test_any_shape(shape, fused):
    tensors, options = make(shape, torch.float32, fused)
    expected = op.reference(**{name: value.double() for name, value in tensors.items()}, **options)
    assert_close(run(tensors, options), expected, kind="matmul")


def test_without_prologue_and_residual():
    tensors, options = make((1, 3, 3, 4, 16, 16, 16), torch.float32, fused=False)
    expected = op.reference(**{name: value.double() for name, value in tensors.items()}, **options)
    assert_close(run(tensors, options), expected, kind="matmul")


def test_two_kernels_give_the_same():
    tensors, options = make((1, 3, 3, 4, 16, 24, 16), torch.float32)
    expected = op.reference(**{name: value.double() for name, value in tensors.items()}, **options)
    assert_close(run(tensors, options, fused=False), expected, kind="matmul")


def test_reference_is_conv3d_after_conv3d():
    tensors, options = make((1, 4, 5, 6, 8, 10, 12), torch.float64, fused=False)
    x, weight_s = tensors["x"].permute(0, 4, 1, 2, 3), tensors["weight_s"][:, :, None]
    z = F.conv3d(x, weight_s, tensors["bias_s"], padding=(0, 1, 1))
    y = F.conv3d(z, tensors["weight_t"][..., None, None], tensors["bias_t"], padding=(1, 0, 0))
    assert rel_rms(op.reference(**tensors, **options), y.permute(0, 2, 3, 4, 1)) < 1e-14


def test_plan_says_why():
    wide = op.plan((1, 80, 128, 128, 320), 320, 320, torch.bfloat16, 90)
    assert not wide.fused and "320 channels" in wide.reason
    spills = op.plan((1, 80, 128, 128, 128), 128, 128, torch.bfloat16, 80)
    assert not spills.fused and "without spills" in spills.reason
    narrow = op.plan((1, 8, 1024, 1024, 32), 32, 32, torch.bfloat16, 90)
    assert "us in one kernel against" in narrow.reason
    assert not op.plan((1, 8, 64, 64, 32), 32, 32, torch.float32, 90).fused


def test_plan_prefers_one_kernel_where_memory_is_the_bound():
    assert op.plan((1, 16, 512, 512, 16), 16, 16, torch.bfloat16, 90).fused


def test_opcheck():
    tensors, _ = make((1, 3, 2, 2, 8, 6, 4), torch.float32)
    names = ("x", "weight_s", "bias_s", "weight_t", "bias_t", "mul", "add", "residual")
    torch.library.opcheck(op.factorized_conv, tuple(tensors[n] for n in names), {"silu": True})


BAD = [
    (dict(x=(2, 3, 4, 8)), "x has shape (2, 3, 4, 8)"),
    (dict(weight_s=(6, 8, 1, 1)), "weight_s has shape (6, 8, 1, 1)"),
    (dict(weight_t=(4, 5, 3)), "weight_t has shape (4, 5, 3)"),
    (dict(residual=(1, 2, 3, 4, 6)), "residual has shape (1, 2, 3, 4, 6)"),
    (dict(weight_s=(200, 8, 3, 3), weight_t=(4, 200, 3), bias_s=(200,), fused=True), "fused=True with 200 channels"),
]


@pytest.mark.parametrize("fake", [False, True], ids=["op", "fake"])
@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_rejects(change, message, fake):
    sizes = dict(x=(1, 2, 3, 4, 8), weight_s=(6, 8, 3, 3), bias_s=(6,), weight_t=(4, 6, 3), residual=(1, 2, 3, 4, 4))

    def call():
        tensors = {name: torch.zeros(change.get(name, size)) for name, size in sizes.items()}
        op.factorized_conv(**tensors, fused=change.get("fused"))

    with pytest.raises(ValueError) as error:
        if fake:
            with FakeTensorMode():
                call()
        else:
            call()
    assert message in str(error.value)
