"""The norm in C++ against PyTorch's in float64: layouts of the modulation, number formats, threads, sizes."""

from __future__ import annotations

import pytest
import torch

from pylumiere.backends import cpu_ops
from pylumiere.model.ops import Norm, PlainOps
from pylumiere.testing import rel_rms

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


@torch.inference_mode()
def test_mixed_number_formats_are_refused():
    x, weight, bias, _ = parts((1, 1, 2, 2, 8), torch.bfloat16)
    with pytest.raises(ValueError, match="weight is torch.float32"):
        cpu_ops.CpuOps().activate(x, Norm(weight.float(), bias, 2, 1e-5), None, None, True)


def test_torch_lends_its_threads():
    assert cpu_ops.openmp_parallel() != 0
