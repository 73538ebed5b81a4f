"""The norm in C++ against PyTorch's in float64: layouts of the modulation, number formats, threads, sizes."""

from __future__ import annotations

import pytest
import torch
from support.testing import rel_rms

from pylumiere.backends import cpu_ops
from pylumiere.networks.ops import Norm, PlainOps, Shift, shift_frames

# fp32: rounding of the affine form. bf16: half a unit of the result, and of the rounded inputs nothing, since the
# oracle reads the same ones.
BOUND = {torch.float32: 4e-6, torch.bfloat16: 2**-8}


def parts(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    channels = shape[-1]
    return normal(*shape), normal(channels), normal(channels), normal


def oracle(x, norm, scale, shift, silu):
    wide = Norm(norm.weight.double(), norm.bias.double(), norm.num_groups, norm.eps)
    scale, shift = (None if t is None else t.double() for t in (scale, shift))
    return PlainOps().activate(x.double(), wide, scale, shift, silu)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("rows", [None, "clip", "frame"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1, 1, 2, 1), 1), ((2, 3, 5, 7, 24), 3), ((2, 4, 17, 16, 64), 4), ((3, 2, 2, 2, 83), 83),
        ((2, 5, 8, 8, 320), 8),
    ],
)  # fmt: skip
@torch.inference_mode()
def test_equals_the_definition_in_float64(shape, groups, rows, silu, dtype):
    x, weight, bias, normal = parts(shape, dtype)
    scale = shift = None
    if rows is not None:
        projected = normal(shape[0], shape[1] if rows == "frame" else 1, 2 * shape[-1])
        scale, shift = projected.chunk(2, -1)
    norm = Norm(weight, bias, groups, 1e-5)
    result = cpu_ops.CpuOps().activate(x, norm, scale, shift, silu)
    assert result.dtype == dtype and result.is_contiguous()
    assert rel_rms(result, oracle(x, norm, scale, shift, silu)) < BOUND[dtype]


@torch.inference_mode()
def test_rows_of_any_layout_are_read_right():
    x, weight, bias, normal = parts((2, 3, 4, 4, 16), torch.float32)
    norm = Norm(weight, bias, 4, 1e-5)
    spaced = normal(2, 6, 32)[:, ::2]  # rows of one clip are evenly spaced, those of two are too
    expanded = normal(1, 3, 16).expand(2, 3, 16)
    every_second = normal(2, 2, 16)[:, 1:]
    for scale, shift in (spaced.chunk(2, -1), (expanded, normal(2, 3, 16)), (normal(2, 1, 16), every_second)):
        result = cpu_ops.CpuOps().activate(x, norm, scale, shift, True)
        assert rel_rms(result, oracle(x, norm, scale, shift, True)) < BOUND[torch.float32]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("over_frames", [False, True])
@pytest.mark.parametrize("frames", [1, 3])
@torch.inference_mode()
def test_row_bias_and_norms_over_frames_are_those_of_the_definition(frames, over_frames, dtype):
    x, weight, bias, normal = parts((2, 3, 7, 5, 24), dtype)
    norm = Norm(weight, bias, 3, 1e-5, over_frames)
    rows = normal(2, frames, 48)[..., ::2]
    for scale, shift in ((None, None), normal(2, frames, 48).chunk(2, -1)):
        wide = (None if t is None else t.double() for t in (scale, shift))
        wide_norm = Norm(weight.double(), bias.double(), 3, 1e-5, over_frames)
        expected = PlainOps().activate(x.double(), wide_norm, *wide, True, row_bias=rows.double())
        result = cpu_ops.CpuOps().activate(x, norm, scale, shift, True, row_bias=rows)
        assert result.dtype == dtype and result.is_contiguous()
        assert rel_rms(result, expected) < 2 * BOUND[dtype]  # the sum is rounded before the norm reads it


@torch.inference_mode()
def test_bits_do_not_depend_on_threads_or_neighbours():
    x, weight, bias, _ = parts((4, 5, 9, 9, 48), torch.bfloat16)
    norm = Norm(weight, bias, 3, 1e-5)
    ops = cpu_ops.CpuOps()
    whole = ops.activate(x, norm, None, None, True)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(ops.activate(x, norm, None, None, True), whole)
    finally:
        torch.set_num_threads(before)
    alone = ops.activate(x[2:3].contiguous(), norm, None, None, True)
    assert torch.equal(alone, whole[2:3])


@torch.inference_mode()
def test_values_far_from_zero_keep_their_digits():
    x, weight, bias, _ = parts((1, 2, 16, 16, 32), torch.float32)
    x = x + 1000  # variance by E[x^2] - E[x]^2 in fp32 would be noise
    norm = Norm(weight, bias, 2, 1e-5)
    assert rel_rms(cpu_ops.CpuOps().activate(x, norm, None, None, False), oracle(x, norm, None, None, False)) < 1e-3


@torch.inference_mode()
def test_nan_is_not_hidden():
    x, weight, bias, _ = parts((1, 2, 4, 4, 16), torch.bfloat16)
    x[0, 1, 0, 0, 0] = torch.nan
    result = cpu_ops.CpuOps().activate(x, Norm(weight, bias, 2, 1e-5), None, None, True)
    assert result[0, 1, ..., :8].isnan().all() and not result[0, 0].isnan().any()


SHIFTS = [Shift(div, direction, pad) for div, direction, pad in (
    (8, "both", "zero"), (3, "both", "circular"), (2, "both", "replicate"), (8, "causal", "zero"),
    (4, "causal", "circular"), (5, "causal", "replicate"), (25, "both", "zero"),
)]  # fmt: skip


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("shift", SHIFTS, ids=lambda s: f"{s.direction}-{s.pad}-{s.div}")
@torch.inference_mode()
def test_the_shift_in_place_has_the_bits_of_the_definition_and_spares_the_input(shift, frames, dtype):
    x, weight, bias, normal = parts((2, frames, 5, 3, 24), dtype)
    before, ops = x.clone(), cpu_ops.CpuOps()
    assert torch.equal(cpu_ops.shift_in_place(x.clone(), shift), shift_frames(x, shift))
    conv = normal(8, 24, 3, 3)
    for prologue in ({}, {"silu": True}, {"norm": Norm(weight, bias, 3, 1e-5), "silu": True},
                     {"row_bias": normal(2, 1, 24)}):  # fmt: skip
        activated = ops.activate(x, **{"norm": None, "scale": None, "shift": None, "silu": False, **prologue})
        expected = ops.spatial_conv(shift_frames(activated, shift), conv, None)
        assert torch.equal(ops.spatial_conv(x, conv, None, temporal_shift=shift, **prologue), expected), prologue
        assert torch.equal(x, before), prologue


@torch.inference_mode()
def test_mixed_number_formats_are_refused():
    x, weight, bias, _ = parts((1, 1, 2, 2, 8), torch.bfloat16)
    with pytest.raises(ValueError, match="weight is torch.float32"):
        cpu_ops.CpuOps().activate(x, Norm(weight.float(), bias, 2, 1e-5), None, None, True)


def test_torch_lends_its_threads():
    assert cpu_ops.openmp_parallel() != 0


# ---- products and attention ------------------------------------------------------------------------------------------


def product_bound(dtype):
    return {torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("shape", "out"), [((1, 1, 1, 1, 3), 5), ((2, 3, 7, 5, 24), 40), ((1, 4, 16, 16, 64), 64)])
@torch.inference_mode()
def test_products_are_those_of_the_definition(shape, out, residual, dtype):
    x, _, bias, normal = parts(shape, dtype)
    ops, plain = cpu_ops.CpuOps(), PlainOps()
    channels = shape[-1]
    bias = normal(out)
    spatial, temporal, linear = normal(out, channels, 3, 3), normal(out, channels, 3), normal(out, channels)
    for name, weight, options, size in (
        ("spatial_conv", spatial, {}, shape[:-1]),
        ("temporal_conv", temporal, {}, shape[:-1]),
        ("temporal_conv", temporal, {"upsample": 2}, (shape[0], 2 * shape[1], *shape[2:-1])),
        ("linear", linear, {}, shape[:-1]),
    ):
        added = normal(*size, out) if residual else None
        wide = plain.__getattribute__(name)(
            x.double(), weight.double(), bias.double(), residual=None if added is None else added.double(), **options
        )
        for _ in range(2):  # the first call reorders the weight, the second finds it
            result = getattr(ops, name)(x, weight, bias, residual=added, **options)
            assert result.dtype == dtype and result.is_contiguous()
            assert rel_rms(result, wide) < product_bound(dtype)


@torch.inference_mode()
def test_weights_in_other_layouts_go_with_their_weights():
    """A new weight at an old one's place in memory must not be answered with the old one's copy."""
    x, _, _, normal = parts((1, 2, 4, 4, 16), torch.float32)
    ops = cpu_ops.CpuOps()
    for _ in range(20):
        weight, conv = normal(16, 16), normal(16, 16, 3, 3)
        assert rel_rms(ops.linear(x, weight, None), PlainOps().linear(x, weight, None)) < 1e-6
        assert rel_rms(ops.spatial_conv(x, conv, None), PlainOps().spatial_conv(x, conv, None)) < 1e-6
        del weight, conv
    assert not ops._packed


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("sequences", "queries", "keys", "heads", "head_dim"),
    [(1, 1, 1, 1, 16), (40, 64, 64, 4, 32), (2, 300, 24, 6, 32), (3, 7, 5, 2, 64), (2, 9, 33, 3, 8),
     (1, 5, 600, 1, 32)],
)  # fmt: skip
@torch.inference_mode()
def test_attention_is_that_of_the_definition(sequences, queries, keys, heads, head_dim, masked, dtype):
    _, _, _, normal = parts((1, 1, 1, 1, 1), dtype)
    width = heads * head_dim
    q, (k, v) = normal(sequences, queries, width), normal(sequences, keys, 2 * width).chunk(2, -1)
    mask = None
    if masked:
        mask = torch.arange(keys)[None] % 3 != 1
    expected = PlainOps().attention(q.double(), k.double(), v.double(), heads, mask)
    result = cpu_ops.CpuOps().attention(q, k, v, heads, mask)
    assert result.dtype == dtype and result.is_contiguous()
    plain = rel_rms(PlainOps().attention(q, k, v, heads, mask), expected)
    assert rel_rms(result, expected) < 2 * plain + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@torch.inference_mode()
def test_attention_over_frames_reads_them_in_place(dtype):
    _, _, _, normal = parts((1, 1, 1, 1, 1), dtype)
    qkv = normal(2, 10, 7, 3 * 64)
    expected = PlainOps().temporal_attention(qkv.double(), 2)
    result = cpu_ops.CpuOps().temporal_attention(qkv, 2)
    assert result.is_contiguous()
    assert rel_rms(result, expected) < {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]


@torch.inference_mode()
def test_attention_does_not_hide_what_is_not_finite():
    q, k, v = (torch.ones(1, 4, 32) for _ in range(3))
    for part in (q, k, v):
        part[0, 1, 3] = float("nan")
        assert cpu_ops.CpuOps().attention(q, k, v, 1).isnan().any()
        part[0, 1, 3] = 1.0


@torch.inference_mode()
def test_bits_of_products_do_not_depend_on_neighbours():
    """Rows of an engine's call are computed one by one; a packed weight must not make them differ between calls."""
    x, _, _, normal = parts((1, 4, 8, 8, 32), torch.bfloat16)
    weight, bias = normal(32, 32, 3, 3), normal(32)
    ops = cpu_ops.CpuOps()
    first = ops.spatial_conv(x, weight, bias, residual=x)
    assert torch.equal(first, ops.spatial_conv(x, weight, bias, residual=x))
    assert torch.equal(first, cpu_ops.CpuOps().spatial_conv(x, weight, bias, residual=x))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@torch.inference_mode()
def test_bits_do_not_depend_on_the_call_that_came_first(dtype):
    """A weight's layout is chosen once; if the first call's size chose it, later results would remember that call."""
    _, _, _, normal = parts((1, 1, 1, 1, 1), dtype)
    linear, conv = normal(256, 320), normal(192, 320, 3, 3)
    row, rows = normal(1, 320), normal(100_000, 320)
    small, large = normal(1, 1, 4, 4, 320), normal(1, 8, 32, 32, 320)
    first, second = cpu_ops.CpuOps(), cpu_ops.CpuOps()
    first.matmul(row, linear, None), second.matmul(rows, linear, None)
    first.spatial_conv(small, conv, None), second.spatial_conv(large, conv, None)
    for x in (row, rows):
        assert torch.equal(first.matmul(x, linear, None), second.matmul(x, linear, None))
    for x in (small, large):
        assert torch.equal(first.spatial_conv(x, conv, None), second.spatial_conv(x, conv, None))
