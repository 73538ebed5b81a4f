"""GroupNorm, the timestep's scale and shift, and SiLU, over single frames or over whole clips.

    y = silu(((x - mean) * rstd * weight + bias) * (1 + scale) + shift)

mean and rstd belong to (frame, group) or to (clip, group). The statistics are those of `norm_affine`: per channel,
(count, mean, M2) of tiles merged in a fixed order, in fp32; a clip merges its frames in the same way, so there are as
many blocks as tiles however few groups there are. The mean is subtracted from x before the product: nothing cancels.

Where a convolution follows, the model folds the norm into it (`norm_affine`) and this operator does not run.

Source: Wu & He 2018, "Group Normalization", eq. 1-2; Chan, Golub & LeVeque 1983, eq. 2.1.
Bound by memory: x read twice (once where the statistics are given), y written once.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from pylumiere.kernels import launching, tuning
from pylumiere.kernels.cost import Cost
from pylumiere.kernels.launching import recorded
from pylumiere.kernels.norm_affine import launch_statistics, merge_tiles
from torch import Tensor

OVER = ("frame", "clip")

# ---- reference -----------------------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    over: str = "frame",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    statistics: Tensor | None = None,
) -> Tensor:
    B, T, S, _ = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    grouped = x.to(dtype).unflatten(-1, (num_groups, -1))  # [B, T, S, G, C/G]
    axes = (2, 4) if over == "frame" else (1, 2, 4)
    if statistics is None:
        mean = grouped.mean(axes, keepdim=True)
        variance = (grouped - mean).square().mean(axes, keepdim=True)
    else:
        mean_c, m2_c = statistics.to(dtype).view(B, T, 2, 1, num_groups, -1).unbind(2)
        mean = mean_c.mean(axes, keepdim=True)
        variance = (m2_c / S + (mean_c - mean).square()).mean(axes, keepdim=True)
    y = ((grouped - mean) * (variance + eps).rsqrt()).flatten(-2) * weight.to(dtype) + bias.to(dtype)
    if scale is not None:
        y = y * (1 + scale.to(dtype)[:, :, None]) + shift.to(dtype)[:, :, None]
    return (F.silu(y) if silu else y).to(x.dtype)


# ---- kernels -------------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=(
        "C", "group_size", "frames", "frames_per_row", "stride_scale_b", "stride_scale_t", "stride_shift_b",
        "stride_shift_t",
    )
)  # fmt: skip
def _fold_kernel(
    statistics_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, folded_ptr,
    C, group_size, pixels, frames, frames_per_row, eps,
    stride_scale_b, stride_scale_t, stride_shift_b, stride_shift_t,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """For frame n and group g: mean, factor and addend of each channel, into folded [N, 3, C]."""
    n, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs = tl.arange(0, BLOCK_G)
    mask = offs < group_size
    offs_c = g * group_size + offs
    row = statistics_ptr + (n // frames_per_row) * 2 * C
    mean_c = tl.load(row + offs_c, mask=mask, other=0.0)
    m2_c = tl.load(row + C + offs_c, mask=mask, other=0.0)
    mean = tl.sum(mean_c, axis=0) / group_size
    centred = tl.where(mask, mean_c - mean, 0.0)
    variance = (tl.sum(m2_c, axis=0) / pixels + tl.sum(centred * centred, axis=0)) / group_size
    factor = tl.load(weight_ptr + offs_c, mask=mask, other=0.0).to(tl.float32) / tl.sqrt_rn(variance + eps)
    addend = tl.load(bias_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        b, t = n // frames, n % frames
        scale = tl.load(scale_ptr + b * stride_scale_b + t * stride_scale_t + offs_c, mask=mask, other=0.0)
        shift = tl.load(shift_ptr + b * stride_shift_b + t * stride_shift_t + offs_c, mask=mask, other=0.0)
        scale = 1.0 + scale.to(tl.float32)
        factor, addend = factor * scale, addend * scale + shift.to(tl.float32)
    out = folded_ptr + n * 3 * C + offs_c
    tl.store(out, tl.zeros([BLOCK_G], tl.float32) + mean, mask=mask)
    tl.store(out + C, factor, mask=mask)
    tl.store(out + 2 * C, addend, mask=mask)


@triton.jit(do_not_specialize=("S",))
def _apply_kernel(
    x_ptr, folded_ptr, y_ptr,
    S, C, stride_n, stride_s,
    SILU: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles_c, tiles_s = tl.cdiv(C, BLOCK_C), tl.cdiv(S, BLOCK_S)
    pid = tl.program_id(0)
    n = (pid // (tiles_c * tiles_s)).to(tl.int64)
    offs_s = (((pid // tiles_c) % tiles_s) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None]
    offs_c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_s < S) & mask_c[None, :]
    folded = folded_ptr + n * 3 * C + offs_c
    mean = tl.load(folded, mask=mask_c, other=0.0)[None, :]
    factor = tl.load(folded + C, mask=mask_c, other=0.0)[None, :]
    addend = tl.load(folded + 2 * C, mask=mask_c, other=0.0)[None, :]
    x = tl.load(x_ptr + n * stride_n + offs_s * stride_s + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    y = (x - mean) * factor + addend  # [BLOCK_S, BLOCK_C]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + (n * S + offs_s) * C + offs_c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


# ---- launch --------------------------------------------------------------------------------------------------------


@recorded("groupnorm_silu", reference)
def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    over: str = "frame",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    statistics: Tensor | None = None,
) -> Tensor:
    B, T, S, C = x.shape
    frames = x.flatten(0, 1)  # a view: see _check
    y = torch.empty(B, T, S, C, dtype=x.dtype, device=x.device)
    if statistics is None:
        statistics = launch_statistics(frames)
    if over == "clip":
        statistics = merge_tiles(statistics.view(B, T, 2, C), T * S, S)
    folded = torch.empty(B * T, 3, C, dtype=torch.float32, device=x.device)
    strides = {}
    for name, value in (("scale", scale), ("shift", shift)):
        strides[f"stride_{name}_b"] = 0 if value is None else value.stride(0)
        strides[f"stride_{name}_t"] = 0 if value is None or value.shape[1] == 1 else value.stride(1)
    launching.launch(
        _fold_kernel,
        (B * T, num_groups),
        dict(
            statistics_ptr=statistics, weight_ptr=weight, bias_ptr=bias, scale_ptr=scale, shift_ptr=shift,
            folded_ptr=folded, C=C, group_size=C // num_groups, pixels=float(T * S if over == "clip" else S), frames=T,
            frames_per_row=T if over == "clip" else 1, eps=eps, **strides,
        ),
        dict(BLOCK_G=max(32, triton.next_power_of_2(C // num_groups))),  # at least a warp
        num_warps=1,
    )  # fmt: skip
    config = tuning.choose("groupnorm_silu", launching.arch_of(x), C=C, dtype=x.dtype)
    tiles = triton.cdiv(S, config.constants["BLOCK_S"]) * triton.cdiv(C, config.constants["BLOCK_C"])
    launching.launch(
        _apply_kernel,
        (B * T * tiles,),
        dict(
            x_ptr=x, folded_ptr=folded, y_ptr=y, S=S, C=C, stride_n=frames.stride(0), stride_s=frames.stride(1),
        ),
        dict(SILU=silu, **config.constants),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return y


# ---- op ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pylumiere::groupnorm_silu", mutates_args=())
def groupnorm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    over: str = "frame",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    statistics: Tensor | None = None,
) -> Tensor:
    """GroupNorm with scale, shift and SiLU.

    Args:
        x: [B, T, S, C], the last axis contiguous and the frames evenly spaced in memory.
        weight, bias: [C], contiguous.
        over: what shares its statistics: "frame" or "clip".
        scale, shift: [B, 1 or T, C] or None, together; the last axis contiguous.
        silu: False leaves the SiLU out.
        statistics: [B*T, 2, C] float32 from `channel_statistics` or a convolution's epilogue: mean and sum of squared
            deviations of each frame's channels. Saves one read of x.

    Returns:
        [B, T, S, C], contiguous, dtype of x.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, C not divisible by num_groups, an unknown `over`.
    """
    _check(x, weight, bias, num_groups, over, scale, shift, statistics)
    function = launch if x.is_cuda else reference
    return function(x, weight, bias, num_groups, eps, over, scale, shift, silu, statistics)


@groupnorm_silu.register_fake
def _(x, weight, bias, num_groups, eps=1e-5, over="frame", scale=None, shift=None, silu=True, statistics=None):
    _check(x, weight, bias, num_groups, over, scale, shift, statistics)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(x, weight, bias, num_groups, over, scale, shift, statistics) -> None:
    if x.dim() != 4:
        raise ValueError(f"groupnorm_silu: x has shape {tuple(x.shape)}, expected [B, T, S, C]")
    if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"groupnorm_silu: x has dtype {x.dtype}; a floating dtype is needed")
    if x.numel() == 0:
        raise ValueError(f"groupnorm_silu: x is empty, shape {tuple(x.shape)}")
    B, T, _, C = x.shape
    if over not in OVER:
        raise ValueError(f"groupnorm_silu: over={over!r} is not one of {OVER}")
    if num_groups < 1 or C % num_groups:
        raise ValueError(f"groupnorm_silu: C={C} is not a multiple of num_groups={num_groups}")
    if B > 1 and T > 1 and x.stride(0) != T * x.stride(1):
        raise ValueError(f"groupnorm_silu: x has stride {tuple(x.stride())}; its frames must be evenly spaced")
    if (scale is None) != (shift is None):
        given, missing = ("scale", "shift") if shift is None else ("shift", "scale")
        raise ValueError(f"groupnorm_silu: {given} is given and {missing} is None; they come together")
    wanted = {
        "weight": (weight, ((C,),)),
        "bias": (bias, ((C,),)),
        "scale": (scale, ((B, 1, C), (B, T, C))),
        "shift": (shift, ((B, 1, C), (B, T, C))),
        "statistics": (statistics, ((B * T, 2, C),)),
    }
    for name, (value, allowed) in wanted.items():
        if value is not None and tuple(value.shape) not in allowed:
            expected = " or ".join(map(str, dict.fromkeys(allowed)))
            raise ValueError(f"groupnorm_silu: {name} has shape {tuple(value.shape)}, expected {expected}")
    for name, value in {"x": x, **{name: value for name, (value, _) in wanted.items()}}.items():
        if value is None:
            continue
        if value.stride(-1) != 1 and value.shape[-1] > 1:
            strides = tuple(value.stride())
            raise ValueError(f"groupnorm_silu: {name} has stride {strides}; its last axis must be contiguous")
        if value.device != x.device:
            raise ValueError(f"groupnorm_silu: {name} is on {value.device}, x on {x.device}")
    if statistics is not None:
        if statistics.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"groupnorm_silu: statistics has dtype {statistics.dtype}; float32 is needed")
        if not statistics.is_contiguous():
            raise ValueError(f"groupnorm_silu: statistics has stride {statistics.stride()}; it must be contiguous")


def cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    over: str = "frame",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    statistics: Tensor | None = None,
) -> Cost:
    passes = 3 if statistics is None else 2
    return Cost(flops=(4 * (passes - 2) + 8) * x.numel(), bytes=passes * x.numel() * x.element_size())


def aot_cases(dtype: torch.dtype) -> list:
    """The finest levels of base and SSR, a level with whole tiles of channels, and a narrow one."""

    def case(S: int, C: int):
        def run():
            x, gamma = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((1, 80, S, C), (C,)))
            launch(x, gamma, gamma, 8 if C < 256 else 32, over="clip")
            modulation = torch.empty(1, 1, 2 * C, dtype=dtype, device="meta")
            launch(x, gamma, gamma, 8 if C < 256 else 32, 1e-5, "frame", *modulation.chunk(2, -1))

        return run

    return [(f"C{C}-S{S}", case(S, C)) for S, C in ((128 * 128, 320), (64 * 64, 640), (256 * 256, 32), (256 * 256, 8))]
