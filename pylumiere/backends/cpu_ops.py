"""The operations of the networks on a CPU: oneDNN's products with weights in its own layout, and a norm in C++.

Eager PyTorch makes three passes over memory for GroupNorm, modulation and SiLU, where one over a frame that stays in
the cache will do. The C++ loop runs on the threads that PyTorch already keeps; a second pool
would compete with them while they spin.

Convolutions and linear layers are those that PyTorch calls, but their weights are reordered once and not at every call,
and what is added to a result is added before it is rounded and stored.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import weakref
from pathlib import Path

import torch
from torch import Tensor

from pylumiere import _runtime
from pylumiere.networks.ops import Norm, PlainOps, Shift, shift_frames

HEAD_DIMS = (16, 32, 64)
MOST_KEYS = 512  # ours keeps a sequence's keys and values in fp32 beside its scores; beyond, PyTorch's is blocked
# Height and width that oneDNN is told when it chooses a weight's layout: always the same, so that no bit of a result
# depends on which call came first. Of the layouts for other sizes none was faster on the demo's networks.
PACKED_FOR = (4, 4)
_IS_BFLOAT16 = {torch.float32: False, torch.bfloat16: True}
_CONV, _LINEAR = (getattr(torch.ops.mkldnn, name, None) for name in ("_convolution_pointwise", "_linear_pointwise"))


@functools.cache
def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or _CONV is None or _LINEAR is None:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _runs_on_onednn(x: Tensor) -> bool:
    return x.numel() > 0 and _has_onednn(x.dtype)


class CpuOps(PlainOps):
    """PlainOps with the norm in one pass. For inference; between load and store the arithmetic is fp32 or wider."""

    name = "cpu"

    def __init__(self):
        self._parallel = openmp_parallel()
        self._packed: dict[int, Tensor] = {}  # weights in oneDNN's layout, by id of the weight

    def _conv2d(self, v, weight, bias, stride, padding, residual):
        if not _runs_on_onednn(v):
            return super()._conv2d(v, weight, bias, stride, padding, residual)
        packed = self._packed.get(id(weight))
        if packed is None:
            given = (weight if weight.ndim == 4 else weight.unsqueeze(-1)).detach().to_mkldnn()
            shape = (1, v.shape[1], *PACKED_FOR)
            packed = torch._C._nn.mkldnn_reorder_conv2d_weight(given, padding, stride, (1, 1), 1, shape)
            self._keep(weight, packed)
        if residual is None:
            return _CONV(v, packed, bias, padding, stride, (1, 1), 1, "none", [], "")
        return _CONV.binary(v, residual, packed, bias, padding, stride, (1, 1), 1, "add", None, None, [], None)

    def _shifted(self, x, shift, is_own):
        return shift_in_place(x, shift) if is_own else shift_frames(x, shift)

    def matmul(self, x, weight, bias, residual=None):
        if not _runs_on_onednn(x):
            return super().matmul(x, weight, bias, residual)
        packed = self._packed.get(id(weight))
        if packed is None:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
            self._keep(weight, packed)
        if residual is None:
            return _LINEAR(x, packed, bias, "none", [], "")
        return _LINEAR.binary(x, residual, packed, bias, "add")

    def _keep(self, weight: Tensor, packed: Tensor) -> None:
        self._packed[id(weight)] = packed
        weakref.finalize(weight, self._packed.pop, id(weight), None)  # a style's weights go with it

    def activate(
        self,
        x: Tensor,
        norm: Norm | None,
        scale: Tensor | None,
        shift: Tensor | None,
        silu: bool,
        *,
        row_bias: Tensor | None = None,
    ) -> Tensor:
        if row_bias is not None:
            x = x + row_bias[:, :, None, None]
        if norm is None or x.dtype not in _IS_BFLOAT16 or x.numel() == 0 or not x.is_contiguous():
            return super().activate(x, norm, scale, shift, silu)
        if norm.over_frames and x.shape[1] > 1:
            if scale is not None and scale.shape[1] > 1:
                return super().activate(x, norm, scale, shift, silu)
            clip = x.flatten(1, 2).unsqueeze(1)  # one tall frame
            return self.activate(clip, norm, scale, shift, silu).view(x.shape)
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

    def attention(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
        """PlainOps.attention in one pass over each short sequence; long ones and other heads are PyTorch's."""
        if not self._takes(q, k, v, num_heads):
            return super().attention(q, k, v, num_heads, mask)
        out = torch.empty(q.shape, dtype=q.dtype)
        self._attend(q, k, v, out, num_heads, None if mask is None else mask.expand(k.shape[:2]).contiguous())
        return out

    def temporal_attention(self, qkv: Tensor, num_heads: int) -> Tensor:
        """PlainOps.temporal_attention without its copies: a pixel's frames are read where they are."""
        q, k, v = qkv.chunk(3, -1)
        if not self._takes(q[:, :, 0], k[:, :, 0], v[:, :, 0], num_heads):
            return super().temporal_attention(qkv, num_heads)
        out = torch.empty(q.shape, dtype=q.dtype)
        for clip in zip(q, k, v, out, strict=True):
            self._attend(*(part.transpose(0, 1) for part in clip), num_heads, None)
        return out

    def _takes(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> bool:
        heads = q.shape[-1] // num_heads in HEAD_DIMS and 0 < k.shape[1] <= MOST_KEYS and q.numel() > 0
        return (
            heads
            and q.dtype in _IS_BFLOAT16
            and all(t.stride(-1) == 1 for t in (q, k, v))
            and not torch.is_grad_enabled()
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, num_heads: int, mask: Tensor | None) -> None:
        """q, out [N, Sq, C]; k, v [N, Sk, C]; channels are contiguous; mask [N, Sk] contiguous."""
        head_dim = q.shape[-1] // num_heads
        tensors = (q, k, v, out)
        _runtime.attention(
            [t.data_ptr() for t in tensors], [step for t in tensors for step in t.stride()[:2]],
            _IS_BFLOAT16[q.dtype], q.shape[0], num_heads, q.shape[1], k.shape[1], head_dim, head_dim**-0.5,
            0 if mask is None else mask.data_ptr(), self._parallel, torch.get_num_threads(),
        )  # fmt: skip


def shift_in_place(x: Tensor, shift: Shift) -> Tensor:
    """`shift_frames` that moves only what changes its frame, inside x: a fourth of the channels by default."""
    fold = x.shape[-1] // shift.div
    if x.shape[1] == 1 or fold == 0:
        return x
    for i, step in enumerate((1,) if shift.direction == "causal" else (-1, 1)):
        # Each frame is overwritten by the next of the list, and that one after it.
        frames = x[..., i * fold : (i + 1) * fold].unbind(1)[::-step]
        first = frames[0].clone() if shift.pad == "circular" else None
        for to, source in itertools.pairwise(frames):
            to.copy_(source)
        if first is not None:
            frames[-1].copy_(first)
        elif shift.pad == "zero":
            frames[-1].zero_()
    return x


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
