"""The operations of a STUNet on a CPU: PyTorch's convolutions, and a norm in C++ that reads its input once.

Eager PyTorch spends a quarter of a bf16 call on GroupNorm, modulation and SiLU: three passes over memory, where one
over a frame that stays in the cache will do. The C++ loop runs on the threads that PyTorch already keeps; a second pool
would compete with them while they spin.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from pylumiere import _runtime
from pylumiere.model.ops import Norm, PlainOps

_IS_BFLOAT16 = {torch.float32: False, torch.bfloat16: True}


class CpuOps(PlainOps):
    """PlainOps with the norm in one pass. For inference; between load and store the arithmetic is fp32 or wider."""

    name = "cpu"

    def __init__(self):
        self._parallel = openmp_parallel()

    def activate(self, x: Tensor, norm: Norm | None, scale: Tensor | None, shift: Tensor | None, silu: bool) -> Tensor:
        if norm is None or x.dtype not in _IS_BFLOAT16 or x.numel() == 0 or not x.is_contiguous():
            return super().activate(x, norm, scale, shift, silu)
        batch, frames, height, width, channels = x.shape
        for name, part in (("weight", norm.weight), ("bias", norm.bias), ("scale", scale), ("shift", shift)):
            if part is not None and (part.dtype != x.dtype or part.shape[-1] != channels or part.stride(-1) != 1):
                raise ValueError(f"{name} is {part.dtype} {list(part.shape)}; x is {x.dtype} with {channels} channels")
        frames_per_row = row_stride = 1
        if scale is not None:
            if _row_stride(scale) != _row_stride(shift) or _row_stride(scale) is None:
                scale, shift = scale.contiguous(), shift.contiguous()
            frames_per_row, row_stride = frames // scale.shape[1], _row_stride(scale)
        y = torch.empty_like(x)
        _runtime.group_norm(
            x.data_ptr(), y.data_ptr(), _IS_BFLOAT16[x.dtype], batch * frames, height * width, channels,
            norm.num_groups, norm.eps, norm.weight.data_ptr(), norm.bias.data_ptr(),
            0 if scale is None else scale.data_ptr(), 0 if shift is None else shift.data_ptr(),
            frames_per_row, row_stride, silu, self._parallel, torch.get_num_threads(),
        )  # fmt: skip
        return y


def _row_stride(rows: Tensor) -> int | None:
    """Values from one of the B * F rows of [B, F, C] to the next; None where they are not evenly spaced."""
    batch, frames, _ = rows.shape
    if frames == 1:
        return rows.stride(0)
    return rows.stride(1) if batch == 1 or rows.stride(0) == frames * rows.stride(1) else None


@functools.cache
def openmp_parallel() -> int:
    """The address of GOMP_parallel in the OpenMP library that torch has loaded; 0 where there is none."""
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return 0
    paths = {line.split(maxsplit=5)[5] for line in mapped if line.count("/") and "omp" in line.rsplit("/", 1)[1]}
    for path in sorted(paths):
        name = Path(path).name
        if name.startswith(("libgomp", "libiomp5", "libomp")):
            try:
                return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value or 0
            except (OSError, AttributeError):
                continue
    return 0
