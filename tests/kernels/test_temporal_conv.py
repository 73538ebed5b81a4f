"""temporal_conv: Triton kernel against the float64 reference; the reference against F.conv3d."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pylumiere.kernels import launching
from pylumiere.kernels import temporal_conv as op
from pylumiere.kernels.implicit_gemm import pack_weight
from pylumiere.kernels.norm_affine import statistics_reference
from support.testing import DTYPES, assert_close, rel_rms, shapes
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cpu" if launching.interpreted() else "cuda"
SHAPES = shapes("B T H W C O", [
    (1, 1, 1, 1, 1, 8),       # one frame, pixel and channel: both neighbours beyond the ends
    (2, 5, 3, 5, 13, 19),     # nothing divides a block
    (1, 3, 9, 9, 40, 8),      # tiles of pixels and of input channels have tails
    (1, 8, 8, 8, 64, 64),     # level 0 of a small network
])  # fmt: skip


def make(shape, dtype, fused=True, stride=1, upsample=1, **options):
    B, T, H, W, C, O = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size, dtype=dtype):
        return torch.randn(*size, generator=generator).to(dtype)

    tensors = {"x": random(B, T, H, W, C), "weight": random(O, C, 3), "bias": random(O)}
    if fused:
        tensors |= {"mul": random(B * T, C, dtype=torch.float32), "add": random(B * T, C, dtype=torch.float32)}
        tensors["residual"] = random(*op.output_shape(tensors["x"], tensors["weight"], stride, upsample))
        options |= {"silu": True, "statistics": True}
    return tensors, dict(stride=stride, upsample=upsample, **options)


def run(tensors, options):
    tensors = {name: value.to(DEVICE) for name, value in tensors.items()}
    y, statistics = op.launch(**tensors | {"weight": pack_weight(tensors["weight"])}, **options)
    return y.cpu(), statistics.cpu()


def check(tensors, options):
    y, statistics = run(tensors, options)
    expected, _ = op.reference(**{name: value.double() for name, value in tensors.items()}, **options)
    assert y.is_contiguous()
    assert_close(y, expected, kind="matmul")
    if options.get("statistics"):
        assert_close(statistics, statistics_reference(y.double().flatten(2, 3).flatten(0, 1)), name="statistics")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_matches_reference(shape, dtype):
    check(*make(shape, dtype))


@pytest.mark.parametrize("fused", [False, True], ids=["bare", "fused"])
@pytest.mark.parametrize("factors", shapes("stride upsample", [(2, 1), (3, 1), (1, 2), (1, 3), (2, 2)]))
def test_resampling_inside_the_loads(factors, fused):
    check(*make((1, 6, 3, 3, 24, 16), torch.float16, fused, *factors))


@settings(max_examples=12)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (2, 6, 4, 4, 40, 36))), stride=st.integers(1, 4),
    upsample=st.integers(1, 4), fused=st.booleans(),
)  # fmt: skip
def test_any_shape(shape, stride, upsample, fused):
    check(*make(shape, torch.float32, fused, stride, upsample))


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["clip", "frame", "row", "column"])
def test_offsets_beyond_int32(axis, far_apart):
    x = far_apart((*(2 if i == axis else 1 for i in range(4)), 16), axis)
    weight = torch.randn(16, 16, 3).half()
    y, _ = op.launch(x, pack_weight(weight).to(DEVICE))
    assert_close(y.cpu(), op.reference(x.double().cpu(), weight.double())[0], kind="matmul")


def test_strided_input():
    tensors, options = make((2, 3, 3, 4, 24, 16), torch.float32)
    expected = run(tensors, options)[0]
    wide = torch.full((2, 4, 3, 3, 32), float("nan"))  # B, W, T, H, C in memory
    view = wide.permute(0, 2, 3, 1, 4)[..., 4:28]
    view.copy_(tensors["x"])
    assert torch.equal(run(tensors | {"x": view}, options)[0], expected)


def test_reference_is_conv3d():
    tensors, options = make((2, 5, 3, 4, 8, 12), torch.float64, fused=False)
    x = tensors["x"].permute(0, 4, 1, 2, 3)
    expected = F.conv3d(x, tensors["weight"][..., None, None], tensors["bias"], padding=(1, 0, 0))
    assert rel_rms(op.reference(**tensors, **options)[0], expected.permute(0, 2, 3, 4, 1)) < 1e-14


@pytest.mark.parametrize("factor", [2, 3])
def test_identity_weights_select_and_repeat_frames(factor):
    x = torch.randn(1, 6, 2, 2, 8)
    weight = torch.nn.init.dirac_(torch.empty(8, 8, 3))
    down, up = (run({"x": x, "weight": weight}, {name: factor})[0] for name in ("stride", "upsample"))
    assert torch.equal(down, x[:, ::factor])
    assert torch.equal(up, x.repeat_interleave(factor, 1))


def test_opcheck():
    tensors, _ = make((1, 3, 2, 2, 8, 6), torch.float32)
    names = ("x", "weight", "bias", "mul", "add", "residual")
    torch.library.opcheck(op.temporal_conv, tuple(tensors[n] for n in names), {"silu": True, "statistics": True})
    torch.library.opcheck(op.temporal_conv, (tensors["x"], tensors["weight"]), {"stride": 2})


BAD = [
    (dict(x=(2, 3, 4, 8)), "x has shape (2, 3, 4, 8)"),
    (dict(weight=(6, 8, 5)), "weight has shape (6, 8, 5)"),
    (dict(weight=(6, 9, 3)), "weight has 9 input channels"),
    (dict(stride=0), "stride=0"),
    (dict(upsample=9), "upsample=9"),
    (dict(residual=(1, 2, 3, 4, 5)), "residual has shape (1, 2, 3, 4, 5)"),
    (dict(x_dtype=torch.int32), "x has dtype torch.int32"),
]


@pytest.mark.parametrize("fake", [False, True], ids=["op", "fake"])
@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_rejects(change, message, fake):
    sizes = dict(x=(1, 2, 3, 4, 8), weight=(6, 8, 3), residual=(1, 2, 3, 4, 6))
    options = {key: value for key, value in change.items() if key not in sizes and not key.endswith("_dtype")}

    def call():
        tensors = {
            name: torch.zeros(change.get(name, size), dtype=change.get(f"{name}_dtype", torch.float32))
            for name, size in sizes.items()
        }
        op.temporal_conv(**tensors, **options)

    with pytest.raises(ValueError) as error:
        if fake:
            with FakeTensorMode():
                call()
        else:
            call()
    assert message in str(error.value)
