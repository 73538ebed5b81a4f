"""Convolution within each frame, with everything around it folded in.

    y = conv(upsample(shift(silu(mul * x + add)))) + bias + residual        k = 1 or 3, zero padding k // 2

mul, add [B*T, C] carry GroupNorm and the timestep's scale and shift (`norm_affine`). Nearest upsampling, stride and the
temporal shift are addresses in the loads. With `statistics` the epilogue also yields what the next GroupNorm needs.

Source: implicit GEMM, Chetlur et al. 2014 (cuDNN); shift, Lin et al. 2019 (TSM). Bound by arithmetic for wide C.
"""

import torch
import torch.nn.functional as F
from pylumiere.kernels.cost import Cost
from pylumiere.kernels.implicit_gemm import (
    ENDS,
    check_operands,
    convolve,
    out_size,
    pack_weight,
    prologue,
    traffic,
)  # fmt: skip
from pylumiere.kernels.launching import recorded
from pylumiere.kernels.norm_affine import statistics_reference

Tensor = torch.Tensor


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mul: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = False,
    stride: int = 1,
    upsample: int = 1,
    fold_next: int = 0,
    fold_prev: int = 0,
    ends: str = "zero",
    statistics: bool = False,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    B, T = x.shape[:2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = shift_frames(prologue(x.to(dtype), mul, add, silu), fold_next, fold_prev, ends)
    y = y.flatten(0, 1).permute(0, 3, 1, 2)  # NCHW by shape, channels-last in memory
    if upsample > 1:
        y = F.interpolate(y, scale_factor=float(upsample), mode="nearest")
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(y, weight.to(dtype), bias, stride=stride, padding=weight.shape[-1] // 2)
    y = y.permute(0, 2, 3, 1).unflatten(0, (B, T))
    y = (y if residual is None else y + residual.to(dtype)).to(x.dtype).contiguous()
    return y, statistics_reference(y.flatten(2, 3).flatten(0, 1)) if statistics else y.new_empty(0, dtype=dtype)


def shift_frames(x: Tensor, fold_next: int, fold_prev: int, ends: str) -> Tensor:
    """Channels [0, fold_next) from frame t + 1, the next fold_prev from frame t - 1. One frame stays as it is."""
    T, end = x.shape[1], fold_next + fold_prev
    if end == 0 or T == 1:
        return x
    zero = torch.zeros_like(x[:, :1])
    first = {"zero": zero, "circular": x[:, -1:], "replicate": x[:, :1]}[ends]
    last = {"zero": zero, "circular": x[:, :1], "replicate": x[:, -1:]}[ends]
    framed = torch.cat([first, x, last], 1)  # frame t stands at t + 1
    return torch.cat([framed[:, 2:, ..., :fold_next], framed[:, :T, ..., fold_next:end], x[..., end:]], -1)


@recorded("spatial_conv", reference)
def launch(
    x, weight, bias=None, mul=None, add=None, residual=None, silu=False, stride=1, upsample=1,
    fold_next=0, fold_prev=0, ends="zero", statistics=False, precision="ieee",
):  # fmt: skip
    """As `reference`; the weight must be packed (`pack_weight`)."""
    if x.shape[1] == 1:
        fold_next = fold_prev = 0
    return convolve(
        "spatial_conv", x, weight, bias, mul, add, residual, silu=silu, kernel_s=weight.shape[-1], stride_s=stride,
        up_s=upsample, fold_next=fold_next, fold_prev=fold_prev, ends=ends, statistics=statistics, precision=precision,
    )  # fmt: skip


@torch.library.custom_op("pylumiere::spatial_conv", mutates_args=())
def spatial_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mul: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = False,
    stride: int = 1,
    upsample: int = 1,
    fold_next: int = 0,
    fold_prev: int = 0,
    ends: str = "zero",
    statistics: bool = False,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """A k x k convolution of each frame with fused prologue and epilogue.

    Args:
        x: [B, T, H, W, C]; any strides with the last axis contiguous.
        weight: [O, C, k, k], k = 1 or 3. Fastest with C innermost in memory (`pack_weight`), else copied per call.
        bias: [O].
        mul, add: [B*T, C] float32: silu(mul * x + add) is convolved. Padding stays zero.
        residual: [B, T, H', W', O], added at the end.
        stride, upsample: 1 or 2; nearest upsampling comes before the convolution.
        fold_next, fold_prev: channels [0, fold_next) are read from frame t + 1, the next fold_prev from t - 1.
        ends: what lies beyond the clip for shifted channels: "zero", "circular" or "replicate".
        statistics: also return the channel statistics of the result.
        precision: "ieee", or "tf32" for float32 on tensor cores with 10 bits.

    Returns:
        y [B, T, H', W', O], contiguous, and its statistics [B*T, 2, O] (an empty tensor if not asked for).
        Sums in float32.

    Raises:
        ValueError: shapes, dtypes, devices, strides or choices that do not fit; the argument is named.
    """
    _check(x, weight, bias, mul, add, residual, stride, upsample, fold_next, fold_prev, ends, precision)
    run = launch if x.is_cuda else reference
    weight = pack_weight(weight) if x.is_cuda else weight
    return run(
        x, weight, bias, mul, add, residual, silu, stride, upsample, fold_next, fold_prev, ends, statistics, precision
    )


@spatial_conv.register_fake
def _(
    x, weight, bias=None, mul=None, add=None, residual=None, silu=False, stride=1, upsample=1,
    fold_next=0, fold_prev=0, ends="zero", statistics=False, precision="ieee",
):  # fmt: skip
    shape = _check(x, weight, bias, mul, add, residual, stride, upsample, fold_next, fold_prev, ends, precision)
    rows = (x.shape[0] * x.shape[1], 2, weight.shape[0]) if statistics else (0,)
    return x.new_empty(shape), x.new_empty(rows, dtype=torch.promote_types(x.dtype, torch.float32))


def _check(x, weight, bias, mul, add, residual, stride, upsample, fold_next, fold_prev, ends, precision):
    if x.dim() != 5:
        raise ValueError(f"spatial_conv: x has shape {tuple(x.shape)}, expected [B, T, H, W, C]")
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] not in (1, 3):
        raise ValueError(f"spatial_conv: weight has shape {tuple(weight.shape)}, expected [O, C, k, k] with k = 1 or 3")
    if stride not in (1, 2):
        raise ValueError(f"spatial_conv: stride={stride} is not 1 or 2")
    if upsample not in (1, 2):
        raise ValueError(f"spatial_conv: upsample={upsample} is not 1 or 2")
    if min(fold_next, fold_prev) < 0 or fold_next + fold_prev > x.shape[4]:
        raise ValueError(f"spatial_conv: fold_next={fold_next}, fold_prev={fold_prev} do not fit into C={x.shape[4]}")
    if ends not in ENDS:
        raise ValueError(f"spatial_conv: ends={ends!r} is not one of {ENDS}")
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"spatial_conv: precision={precision!r} is not 'ieee' or 'tf32'")
    shape = output_shape(x, weight, stride, upsample)
    check_operands("spatial_conv", x, weight, bias, mul, add, residual, shape)
    return shape


def output_shape(x: Tensor, weight: Tensor, stride: int = 1, upsample: int = 1) -> tuple[int, ...]:
    H, W = (out_size(n, upsample, weight.shape[2], stride) for n in x.shape[2:4])
    return (*x.shape[:2], H, W, weight.shape[0])


def cost(x: Tensor, weight: Tensor, residual: Tensor | None = None, stride: int = 1, upsample: int = 1) -> Cost:
    return traffic(x, weight, output_shape(x, weight, stride, upsample), residual)


def aot_cases(dtype: torch.dtype) -> list:
    """The shapes and fusions that the networks use: name and a call on tensors without data."""

    def case(C, O, size, k=3, fused=True, **options):
        def run():
            x = torch.empty(1, 8, size, size, C, dtype=dtype, device="meta")
            weight = pack_weight(x.new_empty(O, C, k, k))
            bias, shape = x.new_empty(O), output_shape(x, weight, options.get("stride", 1), options.get("upsample", 1))
            if not fused:
                return launch(x, weight, bias, **options)
            mul, add = (torch.empty(8, C, dtype=torch.float32, device="meta") for _ in range(2))
            return launch(x, weight, bias, mul, add, x.new_empty(shape), True, statistics=True, **options)

        return f"C{C}-O{O}-{size}x{size}-k{k}" + "".join(f"-{n}{v}" for n, v in options.items()), run

    return [
        case(7, 320, 128, fused=False),
        case(4, 4, 64, k=1, fused=False),
        case(64, 64, 64),
        case(64, 64, 64, fold_next=8, fold_prev=8),
        case(320, 320, 128, k=1),
        case(320, 320, 128, fold_next=40, fold_prev=40),
        case(640, 640, 16, fold_next=80, fold_prev=80),
        case(1280, 1280, 8, fold_next=160, fold_prev=160),
        case(320, 640, 128, fused=False, stride=2),
        case(640, 320, 64, fused=False, upsample=2),
        case(1280, 1280, 8),
        case(320, 3, 128),
    ]
