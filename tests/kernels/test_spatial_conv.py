"""spatial_conv: Triton kernel against the float64 reference; the reference against PyTorch's own convolutions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pylumiere.kernels import launching, tuning
from pylumiere.kernels import spatial_conv as op
from pylumiere.kernels.implicit_gemm import pack_weight
from pylumiere.kernels.norm_affine import statistics_reference
from support.testing import DTYPES, assert_close, rel_rms, shapes
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cpu" if launching.interpreted() else "cuda"
SHAPES = shapes("B T H W C O k", [
    (1, 1, 1, 1, 1, 1, 3),       # smallest
    (1, 2, 5, 7, 13, 19, 3),     # nothing divides a block
    (1, 1, 9, 9, 40, 8, 3),      # tiles of pixels and of input channels have tails
    (2, 2, 3, 4, 24, 40, 1),     # a linear layer; output channels have a tail
    (1, 1, 16, 16, 64, 64, 3),   # level 0 of the demo network
])  # fmt: skip
FUSIONS = {
    "bare": dict(),
    "fused": dict(affine=True, silu=True, residual=True, statistics=True),
    "silu": dict(silu=True),
    "stride2": dict(stride=2, affine=True, silu=True),
    "upsample2": dict(upsample=2, affine=True, silu=True, statistics=True),
}
SHIFTS = {
    "zero": dict(fold_next=8, fold_prev=8),
    "circular": dict(fold_next=3, fold_prev=5, ends="circular"),
    "replicate": dict(fold_next=8, fold_prev=8, ends="replicate"),
    "causal": dict(fold_prev=8),
}


def make(shape, dtype, affine=False, residual=False, stride=1, upsample=1, seed=0, **options):
    B, T, H, W, C, O, k = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size, dtype=dtype):
        return torch.randn(*size, generator=generator).to(dtype)

    tensors = {"x": random(B, T, H, W, C), "weight": random(O, C, k, k), "bias": random(O)}
    if affine:
        tensors |= {"mul": random(B * T, C, dtype=torch.float32), "add": random(B * T, C, dtype=torch.float32)}
    if residual:
        tensors["residual"] = random(*op.output_shape(tensors["x"], tensors["weight"], stride, upsample))
    return tensors, dict(stride=stride, upsample=upsample, **options)


def oracle(tensors, options):
    return op.reference(**{name: value.double().cpu() for name, value in tensors.items()}, **options)


def run(tensors, options):
    tensors = {name: value.to(DEVICE) for name, value in tensors.items()}
    y, statistics = op.launch(**tensors | {"weight": pack_weight(tensors["weight"])}, **options)
    return y.cpu(), statistics.cpu()


def check(tensors, options):
    y, statistics = run(tensors, options)
    expected, _ = oracle(tensors, options)
    assert y.is_contiguous()
    assert_close(y, expected, kind="matmul")
    if options.get("statistics"):
        of_stored = statistics_reference(y.double().flatten(2, 3).flatten(0, 1))
        assert_close(statistics, of_stored, name="statistics")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_matches_reference(shape, dtype):
    check(*make(shape, dtype, affine=True, silu=True, residual=True, statistics=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_each_fusion(fusion, dtype):
    check(*make((1, 2, 5, 6, 24, 16, 3), dtype, **FUSIONS[fusion]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", SHIFTS)
def test_temporal_shift_inside_the_loads(shift, dtype):
    check(*make((2, 3, 3, 4, 32, 16, 3), dtype, affine=True, silu=True, **SHIFTS[shift]))


def test_one_frame_is_not_shifted():
    tensors, options = make((2, 1, 3, 4, 32, 16, 3), torch.float32)
    shifted, _ = run(tensors, options | SHIFTS["zero"])
    assert torch.equal(shifted, run(tensors, options)[0])


@settings(max_examples=12)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (2, 3, 6, 6, 40, 36)), st.sampled_from((1, 3))),
    stride=st.sampled_from((1, 2)), upsample=st.sampled_from((1, 2)), fused=st.booleans(), fold=st.integers(0, 20),
    ends=st.sampled_from(("zero", "circular", "replicate")),
)  # fmt: skip
def test_any_shape(shape, stride, upsample, fused, fold, ends):
    fold = min(fold, shape[4] // 2)
    options = dict(stride=stride, upsample=upsample, affine=fused, silu=fused, residual=fused, statistics=fused)
    check(*make(shape, torch.float32, fold_next=fold, fold_prev=fold, ends=ends, **options))


def test_strided_input():
    tensors, options = make((2, 3, 5, 6, 24, 16, 3), torch.float32, affine=True, silu=True)
    expected = run(tensors, options)[0]
    wide = torch.full((3, 2, 6, 5, 40), float("nan"))  # T, B, W, H, C in memory
    view = wide.permute(1, 0, 3, 2, 4)[..., 8:32]
    view.copy_(tensors["x"])
    assert torch.equal(run(tensors | {"x": view}, options)[0], expected)


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["clip", "frame", "row", "column"])
def test_offsets_beyond_int32(axis, far_apart):
    x = far_apart(tuple(2 if i == axis or i in (2, 3) else 1 for i in range(4)) + (16,), axis)
    tensors, _ = make((1, 1, 2, 2, 16, 16, 3), torch.float16)
    y, _ = op.launch(x, pack_weight(tensors["weight"]).to(DEVICE))
    expected, _ = op.reference(x.double().cpu(), tensors["weight"].double())
    assert_close(y.cpu(), expected, kind="matmul")


# ---- the reference against independent statements -------------------------------------------------------------------


def test_reference_is_conv2d_of_each_frame():
    tensors, options = make((2, 2, 5, 6, 8, 12, 3), torch.float64)
    x = tensors["x"].flatten(0, 1).permute(0, 3, 1, 2)
    expected = F.conv2d(x, tensors["weight"], tensors["bias"], padding=1).permute(0, 2, 3, 1)
    assert rel_rms(op.reference(**tensors, **options)[0].flatten(0, 1), expected) < 1e-14


def test_reference_shift_is_a_one_hot_conv3d():
    tensors, options = make((2, 4, 5, 6, 16, 12, 3), torch.float64, fold_next=4, fold_prev=2)
    taps = torch.ones(16, dtype=torch.long)
    taps[:4], taps[4:6] = 2, 0  # which of frames t-1, t, t+1 a channel comes from
    weight = torch.zeros(12, 16, 3, 3, 3, dtype=torch.float64)
    for c in range(16):
        weight[:, c, taps[c]] = tensors["weight"][:, c]
    expected = F.conv3d(tensors["x"].permute(0, 4, 1, 2, 3), weight, tensors["bias"], padding=1)
    assert rel_rms(op.reference(**tensors, **options)[0], expected.permute(0, 2, 3, 4, 1)) < 1e-14


def test_reference_pads_after_the_activation():
    x = torch.zeros(1, 1, 3, 3, 4, dtype=torch.float64)
    mul, add = torch.ones(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    weight = torch.ones(1, 4, 3, 3, dtype=torch.float64)
    y, _ = op.reference(x, weight, mul=mul, add=add, silu=True)
    neighbours = torch.tensor([[4, 6, 4], [6, 9, 6], [4, 6, 4]], dtype=torch.float64)
    expected = neighbours * 4 * F.silu(torch.ones((), dtype=torch.float64))
    assert rel_rms(y[0, 0, ..., 0], expected) < 1e-14


# ---- registration --------------------------------------------------------------------------------------------------


def test_opcheck():
    tensors, _ = make((1, 2, 3, 4, 8, 6, 3), torch.float32, affine=True, residual=True)
    torch.library.opcheck(op.spatial_conv, tuple(tensors[n] for n in ("x", "weight", "bias", "mul", "add", "residual")),
                          {"silu": True, "fold_next": 2, "statistics": True})  # fmt: skip


BAD = [
    (dict(x=(2, 3, 4, 8)), "x has shape (2, 3, 4, 8)"),
    (dict(weight=(6, 8, 5, 5)), "weight has shape (6, 8, 5, 5)"),
    (dict(weight=(6, 9, 3, 3)), "weight has 9 input channels"),
    (dict(bias=(5,)), "bias has shape (5,)"),
    (dict(mul=(2, 7)), "mul has shape (2, 7)"),
    (dict(residual=(1, 2, 3, 4, 5)), "residual has shape (1, 2, 3, 4, 5)"),
    (dict(x=(1, 0, 3, 4, 8)), "x is empty"),
    (dict(stride=3), "stride=3"),
    (dict(upsample=4), "upsample=4"),
    (dict(fold_next=5, fold_prev=4), "fold_next=5, fold_prev=4"),
    (dict(ends="mirror"), "ends='mirror'"),
    (dict(precision="fp8"), "precision='fp8'"),
    (dict(weight_dtype=torch.float16), "weight has dtype torch.float16"),
    (dict(x_dtype=torch.int32), "x has dtype torch.int32"),
    (dict(mul_dtype=torch.float16), "mul has dtype torch.float16"),
]


@pytest.mark.parametrize("fake", [False, True], ids=["op", "fake"])
@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_rejects(change, message, fake):
    sizes = dict(x=(1, 2, 3, 4, 8), weight=(6, 8, 3, 3), bias=(6,), mul=(2, 8), add=(2, 8), residual=(1, 2, 3, 4, 6))
    options = {key: value for key, value in change.items() if key not in sizes and not key.endswith("_dtype")}

    def call():
        tensors = {
            name: torch.zeros(change.get(name, size), dtype=change.get(f"{name}_dtype", torch.float32))
            for name, size in sizes.items()
        }
        op.spatial_conv(**tensors, **options)

    with pytest.raises(ValueError) as error:
        if fake:
            with FakeTensorMode():
                call()
        else:
            call()
    assert message in str(error.value)


def test_rejects_channels_that_are_not_innermost():
    x = torch.zeros(1, 2, 3, 8, 4).transpose(3, 4)
    with pytest.raises(ValueError, match=r"x has stride .* last axis must be contiguous"):
        op.spatial_conv(x, torch.zeros(6, 8, 3, 3))


def test_every_listed_tile_computes_the_same():
    """The tile sizes that are shipped for GPUs, run as they are: one launch of each on a small problem."""
    tensors, options = make((1, 1, 3, 3, 20, 12, 3), torch.float32, affine=True, silu=True)
    expected, _ = oracle(tensors, options)
    seen = set()
    for arch in tuning.ARCHITECTURES:
        for row in tuning.TABLE["spatial_conv"].get(arch, []):
            key = tuple(row.config.constants.items())
            if key in seen:
                continue
            seen.add(key)
            with pytest.MonkeyPatch.context() as patch:
                rows = [tuning.Row(row.config)]
                patch.setitem(tuning.TABLE, "spatial_conv", {0: rows, 75: rows})  # whatever the device
                y, _ = run(tensors, options)
            assert_close(y, expected, kind="matmul", name=str(key))
    assert len(seen) >= 3


def test_cost_counts_each_operand_once():
    tensors, _ = make((1, 2, 4, 4, 8, 16, 3), torch.float16)
    cost = op.cost(tensors["x"], tensors["weight"])
    assert cost.flops == 2 * (2 * 4 * 4) * 16 * 8 * 9
    assert cost.bytes == 2 * (2 * 16 * 8 + 16 * 8 * 9 + 2 * 16 * 16)
