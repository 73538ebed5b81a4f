"""Temporal shift: some channels of a frame are read from the next or the previous frame.

    y[t, 0 : fold]          = x[t + 1]      "both"      ("causal": x[t - 1])
    y[t, fold : 2 fold]     = x[t - 1]      "both"      ("causal": x[t])
    y[t, 2 fold : C]        = x[t]                      fold = C // n_div

Beyond the ends stand zeros ("zero"), the other end of the clip ("circular"), the end frame itself ("replicate"), or,
where the caller has them, the neighbour frames of a longer clip (the halo). One frame without a halo stays as it is.

The model does not call the kernel below: its convolutions read each channel block from the shifted frame
(`spatial_conv`, fold_next and fold_prev), so the shift moves no bytes. That form has no halo and needs none: a window
that overlaps its neighbours brings their frames along as frames of its own, and its ends are ends of the clip it sees.
The kernel is for callers that need the shifted tensor itself, or that hold a clip in pieces and pass the frames beside
each piece as its halo.

Source: Lin et al. 2019, "TSM: Temporal Shift Module", sec. 3; An et al. 2023, "Latent-Shift".
Bound by memory: x read once, y written once.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from pylumiere.kernels import launching, tuning
from pylumiere.kernels.cost import Cost
from pylumiere.kernels.launching import recorded
from torch import Tensor

DIRECTIONS = ("both", "causal")
PADS = ("zero", "circular", "replicate")


@dataclass(frozen=True)
class ShiftSpec:
    """How the channels of a frame are shifted.

    Args:
        n_div: 1 / n_div of the channels moves in each direction; C // n_div channels, 0 meaning no shift.
        direction: "both" or "causal".
        pad: what lies beyond the ends: "zero", "circular" or "replicate".
    """

    n_div: int = 8
    direction: str = "both"
    pad: str = "zero"

    def __post_init__(self) -> None:
        least = 1 if self.direction == "causal" else 2
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction={self.direction!r} is not one of {DIRECTIONS}")
        if self.pad not in PADS:
            raise ValueError(f"pad={self.pad!r} is not one of {PADS}")
        if self.n_div < least:
            raise ValueError(f"n_div={self.n_div} is below {least}, the least for direction={self.direction!r}")

    def fold(self, channels: int) -> int:
        """Channels that move in each direction."""
        return channels // self.n_div

    def channel_blocks(self, channels: int) -> list[tuple[int, int, int]]:
        """(first channel, end channel, frame offset), ascending, covering [0, channels)."""
        fold = self.fold(channels)
        if fold == 0:
            return [(0, channels, 0)]
        moved = [(0, fold, -1)] if self.direction == "causal" else [(0, fold, 1), (fold, 2 * fold, -1)]
        end = moved[-1][1]
        return moved if end == channels else [*moved, (end, channels, 0)]


# ---- reference -----------------------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    n_div: int = 8,
    direction: str = "both",
    pad: str = "zero",
    before: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    T, C = x.shape[1], x.shape[3]
    if T == 1 and before is None and after is None:
        return x.clone(memory_format=torch.contiguous_format)
    if pad == "circular":
        first, last = x[:, -1:], x[:, :1]
    elif pad == "replicate":
        first, last = x[:, :1], x[:, -1:]
    else:
        first = last = torch.zeros_like(x[:, :1])
    first = first if before is None else before[:, None]
    last = last if after is None else after[:, None]
    framed = torch.cat([first, x, last], 1)  # [B, T + 2, S, C]; frame t stands at t + 1
    blocks = ShiftSpec(n_div, direction, pad).channel_blocks(C)
    return torch.cat([framed[:, 1 + offset : 1 + offset + T, :, c0:c1] for c0, c1, offset in blocks], -1)


# ---- kernel --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("T", "S", "fold", "first_offset", "second_offset"))
def _temporal_shift_kernel(
    x_ptr, before_ptr, after_ptr, y_ptr,
    T, S, C, fold, first_offset, second_offset,
    stride_b, stride_t, stride_s, stride_before_b, stride_before_s, stride_after_b, stride_after_s,
    PAD: tl.constexpr, UNIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles_c, tiles_s = tl.cdiv(C, BLOCK_C), tl.cdiv(S, BLOCK_S)
    pid = tl.program_id(0)
    frame = pid // (tiles_c * tiles_s)
    b, t = (frame // T).to(tl.int64), frame % T
    offs_s = ((pid // tiles_c) % tiles_s) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_s = (offs_s < S)[:, None]
    mask_c = offs_c < C
    pixels = offs_s.to(tl.int64)[:, None]

    delta = tl.where(offs_c < fold, first_offset, tl.where(offs_c < 2 * fold, second_offset, 0))
    if UNIT > 1:
        delta = tl.max_constancy(delta, [UNIT])  # keeps the loads vectorised
    source = t + delta
    is_before, is_after = source < 0, source >= T
    mask_x = mask_c
    if PAD == "circular":
        nearest = (source + T) % T
    else:
        nearest = tl.minimum(tl.maximum(source, 0), T - 1)
    if PAD == "zero":
        mask_x = mask_x & (source >= 0) & (source < T)
    if before_ptr is not None:
        mask_x = mask_x & (source >= 0)
    if after_ptr is not None:
        mask_x = mask_x & (source < T)
    channels = nearest.to(tl.int64) * stride_t + offs_c
    x = x_ptr + b * stride_b + pixels * stride_s + channels[None, :]
    y = tl.load(x, mask=mask_s & mask_x[None, :], other=0.0)  # [BLOCK_S, BLOCK_C]
    if before_ptr is not None:
        mask = mask_s & (mask_c & is_before)[None, :]
        halo = before_ptr + b * stride_before_b + pixels * stride_before_s + offs_c[None, :]
        y = tl.where(mask, tl.load(halo, mask=mask, other=0.0), y)
    if after_ptr is not None:
        mask = mask_s & (mask_c & is_after)[None, :]
        halo = after_ptr + b * stride_after_b + pixels * stride_after_s + offs_c[None, :]
        y = tl.where(mask, tl.load(halo, mask=mask, other=0.0), y)
    y_row = y_ptr + (frame.to(tl.int64) * S + pixels) * C
    tl.store(y_row + offs_c[None, :], y, mask=mask_s & mask_c[None, :])


# ---- launch --------------------------------------------------------------------------------------------------------


@recorded("temporal_shift", reference)
def launch(
    x: Tensor,
    n_div: int = 8,
    direction: str = "both",
    pad: str = "zero",
    before: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    B, T, S, C = x.shape
    y = torch.empty(B, T, S, C, dtype=x.dtype, device=x.device)
    alone = T == 1 and before is None and after is None
    config = tuning.choose("temporal_shift", launching.arch_of(x), C=C, dtype=x.dtype)
    first_offset, second_offset = (-1, 0) if direction == "causal" else (1, -1)
    fold = 0 if alone else C // n_div
    unit = math.gcd(fold, 16 // x.element_size())  # what the borders between channel blocks are multiples of
    halo = {}
    for name, value in (("before", before), ("after", after)):
        halo[f"{name}_ptr"] = value
        halo[f"stride_{name}_b"] = 0 if value is None else value.stride(0)
        halo[f"stride_{name}_s"] = 0 if value is None else value.stride(1)
    tiles = triton.cdiv(S, config.constants["BLOCK_S"]) * triton.cdiv(C, config.constants["BLOCK_C"])
    launching.launch(
        _temporal_shift_kernel,
        (B * T * tiles,),
        dict(
            x_ptr=x, y_ptr=y, T=T, S=S, C=C, fold=fold, first_offset=first_offset,
            second_offset=second_offset, stride_b=x.stride(0), stride_t=x.stride(1), stride_s=x.stride(2), **halo,
        ),
        dict(PAD=pad, UNIT=unit, **config.constants),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return y


# ---- op ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pylumiere::temporal_shift", mutates_args=())
def temporal_shift(
    x: Tensor,
    n_div: int = 8,
    direction: str = "both",
    pad: str = "zero",
    before: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    """Channels read from the next and the previous frame.

    Args:
        x: [B, T, S, C], the last axis contiguous.
        n_div, direction, pad: see `ShiftSpec`.
        before, after: [B, S, C], the frames next to x in a longer clip, used in place of the padding; the last axis
            contiguous.

    Returns:
        [B, T, S, C], contiguous. With T = 1 and no halo a copy of x.

    Raises:
        ValueError: an unknown direction or pad, n_div too small, or shapes, dtypes and strides that do not fit.
    """
    _check(x, n_div, direction, pad, before, after)
    return (launch if x.is_cuda else reference)(x, n_div, direction, pad, before, after)


@temporal_shift.register_fake
def _(x, n_div=8, direction="both", pad="zero", before=None, after=None):
    _check(x, n_div, direction, pad, before, after)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(x, n_div, direction, pad, before, after) -> None:
    ShiftSpec(n_div, direction, pad)
    if x.dim() != 4:
        raise ValueError(f"temporal_shift: x has shape {tuple(x.shape)}, expected [B, T, S, C]")
    if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"temporal_shift: x has dtype {x.dtype}; a floating dtype is needed")
    if x.numel() == 0:
        raise ValueError(f"temporal_shift: x is empty, shape {tuple(x.shape)}")
    B, _, S, C = x.shape
    for name, value in {"x": x, "before": before, "after": after}.items():
        if value is None:
            continue
        if name != "x" and tuple(value.shape) != (B, S, C):
            raise ValueError(f"temporal_shift: {name} has shape {tuple(value.shape)}, expected {(B, S, C)}")
        if value.dtype != x.dtype:
            raise ValueError(f"temporal_shift: {name} has dtype {value.dtype}, x has {x.dtype}")
        if value.device != x.device:
            raise ValueError(f"temporal_shift: {name} is on {value.device}, x on {x.device}")
        if value.stride(-1) != 1 and C > 1:
            strides = tuple(value.stride())
            raise ValueError(f"temporal_shift: {name} has stride {strides}; its last axis must be contiguous")


def cost(
    x: Tensor,
    n_div: int = 8,
    direction: str = "both",
    pad: str = "zero",
    before: Tensor | None = None,
    after: Tensor | None = None,
) -> Cost:
    return Cost(flops=0, bytes=2 * x.numel() * x.element_size())


def aot_cases(dtype: torch.dtype) -> list:
    """A level for each tile, and each way to treat the ends."""

    def case(S: int, C: int, pad: str):
        return f"C{C}-{pad}", lambda: launch(torch.empty(1, 80, S, C, dtype=dtype, device="meta"), pad=pad)

    return [
        case(128 * 128, 320, "zero"), case(64 * 64, 640, "circular"), case(256 * 256, 32, "replicate"),
        case(256 * 256, 8, "zero"),
    ]  # fmt: skip
