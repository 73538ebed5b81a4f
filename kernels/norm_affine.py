"""GroupNorm per frame as one multiply and one add per (frame, channel), for the convolution that follows.

    mul[n, c] = rstd * gamma * (1 + scale)                 mean, rstd per (frame n, group of c)
    add[n, c] = (beta - mean * rstd * gamma) * (1 + scale) + shift

Statistics travel per channel, [N, 2, C]: mean and sum of squared deviations over the S pixels of frame n. Tiles of
pixels are merged in a fixed order by Chan's formula, so nothing cancels and results do not depend on timing. They come
from `channel_statistics`, or from the epilogue of the convolution that wrote the tensor.

Source: Wu & He 2018, "Group Normalization"; Chan, Golub & LeVeque 1983, eq. 2.1. Bound by memory: x read once.
"""

import torch
import triton
import triton.language as tl
from pylumiere.kernels import launching, tuning
from pylumiere.kernels.cost import Cost
from pylumiere.kernels.launching import recorded

Tensor = torch.Tensor
MERGE = 64  # tiles that one program merges


# ---- references ----------------------------------------------------------------------------------------------------


def statistics_reference(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(1)
    return torch.stack([mean, (x - mean[:, None]).square().sum(1)], 1)


def reference(
    statistics: Tensor,
    pixels: int,
    gamma: Tensor,
    beta: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    N, _, C = statistics.shape
    dtype = statistics.dtype
    mean_c, m2_c = statistics.unflatten(-1, (num_groups, -1)).unbind(1)  # [N, G, C/G]
    mean = mean_c.mean(-1, keepdim=True)
    m2 = (m2_c + pixels * (mean_c - mean).square()).sum(-1, keepdim=True)
    rstd = (m2 / (pixels * (C // num_groups)) + eps).rsqrt()
    mul = (rstd * gamma.to(dtype).view(num_groups, -1)).view(N, C)
    add = beta.to(dtype) - mean.expand_as(mean_c).reshape(N, C) * mul
    if scale is not None:
        frames = N // scale.shape[0]
        scale, shift = (v.to(dtype).expand(-1, frames, -1).reshape(N, C) for v in (scale, shift))
        mul, add = mul * (1 + scale), add * (1 + scale) + shift
    return mul, add


# ---- kernels -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("S",))
def _tile_statistics_kernel(
    x_ptr, partial_ptr,
    S, C, stride_n, stride_s,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles_s = tl.cdiv(S, BLOCK_S)
    pid = tl.program_id(0)
    n = pid // (tiles_c * tiles_s)
    tile_s = (pid // tiles_c) % tiles_s
    offs_c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_s = tile_s * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = (offs_s < S)[:, None] & (offs_c < C)[None, :]
    offs = offs_s.to(tl.int64)[:, None] * stride_s + offs_c[None, :]
    x = tl.load(x_ptr + n.to(tl.int64) * stride_n + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_C]
    count = tl.minimum(S - tile_s * BLOCK_S, BLOCK_S).to(tl.float32)
    mean = tl.sum(x, axis=0) / count
    centred = tl.where(mask, x - mean[None, :], 0.0)
    row = partial_ptr + (n.to(tl.int64) * tiles_s + tile_s) * 2 * C
    tl.store(row + offs_c, mean, mask=offs_c < C)
    tl.store(row + C + offs_c, tl.sum(centred * centred, axis=0), mask=offs_c < C)


@triton.jit(do_not_specialize=("S", "tiles", "span"))
def _merge_kernel(
    partial_ptr, merged_ptr,
    S, C, tiles, span,
    MERGE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles_c = tl.cdiv(C, BLOCK_C)
    rows_out = tl.cdiv(tiles, MERGE)
    pid = tl.program_id(0)
    n = pid // (tiles_c * rows_out)
    row_out = (pid // tiles_c) % rows_out
    offs_c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = row_out * MERGE + tl.arange(0, MERGE)
    mask = (tile < tiles)[:, None] & (offs_c < C)[None, :]
    rows = partial_ptr + (n.to(tl.int64) * tiles + tile)[:, None] * 2 * C + offs_c[None, :]
    mean = tl.load(rows, mask=mask, other=0.0)  # [MERGE, BLOCK_C]
    m2 = tl.load(rows + C, mask=mask, other=0.0)
    count = tl.maximum(tl.minimum(S - tile * span, span), 0).to(tl.float32)[:, None]
    total_mean = tl.sum(mean * count, axis=0) / tl.sum(tl.broadcast_to(count, [MERGE, BLOCK_C]), axis=0)
    centred = tl.where(mask, mean - total_mean[None, :], 0.0)
    total_m2 = tl.sum(m2 + count * centred * centred, axis=0)
    out = merged_ptr + (n.to(tl.int64) * rows_out + row_out) * 2 * C
    tl.store(out + offs_c, total_mean, mask=offs_c < C)
    tl.store(out + C + offs_c, total_m2, mask=offs_c < C)


@triton.jit(
    do_not_specialize=(
        "C", "group_size", "pixels", "frames", "stride_scale_b", "stride_scale_t", "stride_shift_b", "stride_shift_t",
    )
)  # fmt: skip
def _affine_kernel(
    statistics_ptr, gamma_ptr, beta_ptr, scale_ptr, shift_ptr, mul_ptr, add_ptr,
    C, group_size, pixels, frames, eps,
    stride_scale_b, stride_scale_t, stride_shift_b, stride_shift_t,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    n, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs = tl.arange(0, BLOCK_G)
    mask = offs < group_size
    offs_c = g * group_size + offs
    mean_c = tl.load(statistics_ptr + n * 2 * C + offs_c, mask=mask, other=0.0)
    m2_c = tl.load(statistics_ptr + n * 2 * C + C + offs_c, mask=mask, other=0.0)
    mean = tl.sum(mean_c, axis=0) / group_size
    centred = tl.where(mask, mean_c - mean, 0.0)
    pixels_f = pixels.to(tl.float32)
    variance = tl.sum(m2_c + pixels_f * centred * centred, axis=0) / (pixels_f * group_size)
    rstd = 1.0 / tl.sqrt(variance + eps)
    mul = rstd * tl.load(gamma_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    add = tl.load(beta_ptr + offs_c, mask=mask, other=0.0).to(tl.float32) - mean * mul
    if scale_ptr is not None:
        b, t = n // frames, n % frames
        scale_offset = b * stride_scale_b + t * stride_scale_t + offs_c
        scale = 1.0 + tl.load(scale_ptr + scale_offset, mask=mask, other=0.0).to(tl.float32)
        shift_offset = b * stride_shift_b + t * stride_shift_t + offs_c
        shift = tl.load(shift_ptr + shift_offset, mask=mask, other=0.0).to(tl.float32)
        mul, add = mul * scale, add * scale + shift
    tl.store(mul_ptr + n * C + offs_c, mul, mask=mask)
    tl.store(add_ptr + n * C + offs_c, add, mask=mask)


# ---- launch --------------------------------------------------------------------------------------------------------


@recorded("channel_statistics", statistics_reference)
def launch_statistics(x: Tensor) -> Tensor:
    N, S, C = x.shape
    config = tuning.choose("channel_statistics", launching.arch_of(x), C=C, pixels=S)
    block_s, block_c = config.constants["BLOCK_S"], config.constants["BLOCK_C"]
    tiles = triton.cdiv(S, block_s)
    partial = torch.empty(N, tiles, 2, C, dtype=torch.float32, device=x.device)
    launching.launch(
        _tile_statistics_kernel,
        (N * tiles * triton.cdiv(C, block_c),),
        dict(x_ptr=x, partial_ptr=partial, S=S, C=C, stride_n=x.stride(0), stride_s=x.stride(1)),
        config.constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return merge_tiles(partial, S, block_s)


def merge_tiles(partial: Tensor, pixels: int, span: int) -> Tensor:
    """Launches that merge [N, tiles, 2, C], each tile holding `span` pixels (the last the rest), into [N, 2, C]."""
    N, tiles, _, C = partial.shape
    while tiles > 1:
        rows = triton.cdiv(tiles, MERGE)
        merged = torch.empty(N, rows, 2, C, dtype=torch.float32, device=partial.device)
        block_c = 16
        launching.launch(
            _merge_kernel,
            (N * rows * triton.cdiv(C, block_c),),
            dict(partial_ptr=partial, merged_ptr=merged, S=pixels, C=C, tiles=tiles, span=span),
            dict(MERGE=MERGE, BLOCK_C=block_c),
            num_warps=4,
        )
        partial, tiles, span = merged, rows, span * MERGE
    return partial.view(N, 2, C)


@recorded("norm_affine", reference)
def launch(
    statistics: Tensor,
    pixels: int,
    gamma: Tensor,
    beta: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    N, _, C = statistics.shape
    mul, add = (torch.empty(N, C, dtype=torch.float32, device=statistics.device) for _ in range(2))
    strides = {}
    for name, value in (("scale", scale), ("shift", shift)):
        strides[f"stride_{name}_b"] = 0 if value is None else value.stride(0)
        strides[f"stride_{name}_t"] = 0 if value is None or value.shape[1] == 1 else value.stride(1)
    launching.launch(
        _affine_kernel,
        (N, num_groups),
        dict(
            statistics_ptr=statistics, gamma_ptr=gamma, beta_ptr=beta, scale_ptr=scale, shift_ptr=shift, mul_ptr=mul,
            add_ptr=add, C=C, group_size=C // num_groups, pixels=pixels,
            frames=1 if scale is None else N // scale.shape[0], eps=eps, **strides,
        ),
        dict(BLOCK_G=max(32, triton.next_power_of_2(C // num_groups))),  # at least a warp
        num_warps=1,
    )  # fmt: skip
    return mul, add


# ---- ops -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pylumiere::channel_statistics", mutates_args=())
def channel_statistics(x: Tensor) -> Tensor:
    """Mean and sum of squared deviations over the pixels of each frame.

    Args:
        x: [N, S, C], the last axis contiguous.

    Returns:
        [N, 2, C] float32 (float64 for a float64 x).

    Raises:
        ValueError: wrong rank, dtype or stride, or an empty x.
    """
    _check_statistics(x)
    return (launch_statistics if x.is_cuda else statistics_reference)(x)


@channel_statistics.register_fake
def _(x):
    _check_statistics(x)
    return x.new_empty(x.shape[0], 2, x.shape[2], dtype=torch.promote_types(x.dtype, torch.float32))


def _check_statistics(x: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"channel_statistics: x has shape {tuple(x.shape)}, expected [N, S, C]")
    if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"channel_statistics: x has dtype {x.dtype}; a floating dtype is needed")
    if x.numel() == 0:
        raise ValueError(f"channel_statistics: x is empty, shape {tuple(x.shape)}")
    if x.stride(2) != 1 and x.shape[2] > 1:
        raise ValueError(f"channel_statistics: x has stride {tuple(x.stride())}; its last axis must be contiguous")


@torch.library.custom_op("pylumiere::norm_affine", mutates_args=())
def norm_affine(
    statistics: Tensor,
    pixels: int,
    gamma: Tensor,
    beta: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GroupNorm and the timestep's scale and shift as `mul * x + add`.

    Args:
        statistics: [N, 2, C] from `channel_statistics`; N = B*T frames.
        pixels: S, the pixels that each statistic covers.
        gamma, beta: [C].
        scale, shift: [B, 1 or T, C] or None, together; the last axis contiguous.

    Returns:
        mul, add: [N, C] in the dtype of `statistics`.

    Raises:
        ValueError: shapes that do not fit, C not divisible by num_groups, or pixels < 1.
    """
    _check(statistics, pixels, gamma, beta, num_groups, scale, shift)
    function = launch if statistics.is_cuda else reference
    return function(statistics, pixels, gamma, beta, num_groups, eps, scale, shift)


@norm_affine.register_fake
def _(statistics, pixels, gamma, beta, num_groups, eps=1e-5, scale=None, shift=None):
    _check(statistics, pixels, gamma, beta, num_groups, scale, shift)
    shape = (statistics.shape[0], statistics.shape[2])
    return statistics.new_empty(shape), statistics.new_empty(shape)


def _check(statistics, pixels, gamma, beta, num_groups, scale, shift) -> None:
    if statistics.dim() != 3 or statistics.shape[1] != 2 or not statistics.is_contiguous():
        raise ValueError(f"norm_affine: statistics has shape {tuple(statistics.shape)}, expected contiguous [N, 2, C]")
    if statistics.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"norm_affine: statistics has dtype {statistics.dtype}; float32 is needed")
    N, _, C = statistics.shape
    if num_groups < 1 or C % num_groups:
        raise ValueError(f"norm_affine: C={C} is not a multiple of num_groups={num_groups}")
    if pixels < 1:
        raise ValueError(f"norm_affine: pixels={pixels} must be at least 1")
    for name, value in {"gamma": gamma, "beta": beta, "scale": scale, "shift": shift}.items():
        if value is not None and value.device != statistics.device:
            raise ValueError(f"norm_affine: {name} is on {value.device}, statistics on {statistics.device}")
    for name, value in {"gamma": gamma, "beta": beta}.items():
        if tuple(value.shape) != (C,) or (value.stride(0) != 1 and C > 1):
            raise ValueError(f"norm_affine: {name} has shape {tuple(value.shape)}, expected contiguous {(C,)}")
    if (scale is None) != (shift is None):
        raise ValueError(f"norm_affine: scale and shift come together, got scale={scale is not None}")
    for name, value in {"scale": scale, "shift": shift}.items():
        if value is None:
            continue
        shape, stride = tuple(value.shape), tuple(value.stride())
        if len(shape) != 3 or shape[2] != C or shape[0] < 1 or N % shape[0] or shape[1] not in (1, N // shape[0]):
            raise ValueError(f"norm_affine: {name} has shape {shape}, expected [B, 1 or T, {C}] with B*T={N}")
        if stride[2] != 1 and C > 1:
            raise ValueError(f"norm_affine: {name} has stride {stride}; its last axis must be contiguous")
    if scale is not None and scale.shape[0] != shift.shape[0]:
        raise ValueError(f"norm_affine: scale has B={scale.shape[0]}, shift has B={shift.shape[0]}")


def cost(x: Tensor) -> Cost:
    """Of `channel_statistics`; the fold itself touches only [N, C]."""
    return Cost(flops=4 * x.numel(), bytes=x.numel() * x.element_size() + 8 * x.shape[0] * x.shape[2])


def aot_cases(dtype: torch.dtype) -> list:
    """Statistics, merge and fold as the networks use them, on tensors without data."""

    def run():
        statistics = launch_statistics(torch.empty(80, 128 * 128, 320, dtype=dtype, device="meta"))
        gamma = torch.empty(320, dtype=dtype, device="meta")
        modulation = torch.empty(1, 1, 640, dtype=dtype, device="meta")
        launch(statistics, 128 * 128, gamma, gamma, 32)
        launch(statistics, 128 * 128, gamma, gamma, 32, 1e-5, *modulation.chunk(2, -1))

    return [("C320-128x128", run)]
