"""GroupNorm as one multiply and one add per (frame, channel), for the convolution that follows.

    mul[n, c] = rstd * gamma * (1 + scale)
    add[n, c] = (beta - (mean - row_bias) * rstd * gamma) * (1 + scale) + shift

mean and rstd are those of x + row_bias over a group of channels: in frame n, or in all frames of its clip.

Statistics travel per channel, [N, 2, C]: mean and sum of squared deviations over the S pixels of frame n. Tiles of
pixels are merged in a fixed order by Chan's formula, so nothing cancels and results do not depend on timing. They come
from `channel_statistics`, or from the epilogue of the convolution that wrote the tensor. They are those of x: a row
bias, which is the same at every pixel, moves a channel's mean and leaves its deviations as they are, and the frames of
a clip are merged as the channels of a group are.

Source: Wu & He 2018, "Group Normalization"; Chan, Golub & LeVeque 1983, eq. 2.1. Bound by memory: x read once.
"""

import itertools

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
    row_bias: Tensor | None = None,
    over_frames: int = 1,
) -> tuple[Tensor, Tensor]:
    N, _, C = statistics.shape
    dtype = statistics.dtype

    def rows(value: Tensor) -> Tensor:
        return value.to(dtype).expand(-1, N // value.shape[0], -1).reshape(N, C)

    mean_c, m2_c = statistics.unbind(1)
    if row_bias is not None:
        mean_c = mean_c + rows(row_bias)
    mean_c, m2_c = (v.reshape(-1, over_frames, num_groups, C // num_groups) for v in (mean_c, m2_c))
    mean = mean_c.mean((1, 3), keepdim=True)
    m2 = (m2_c + pixels * (mean_c - mean).square()).sum((1, 3), keepdim=True)
    rstd = (m2 / (pixels * over_frames * (C // num_groups)) + eps).rsqrt()
    mul = (rstd * gamma.to(dtype).view(num_groups, -1)).expand_as(mean_c).reshape(N, C)
    centre = mean.expand_as(mean_c).reshape(N, C)
    add = beta.to(dtype) - (centre if row_bias is None else centre - rows(row_bias)) * mul
    if scale is not None:
        scale, shift = rows(scale), rows(shift)
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


@triton.jit
def _channel_means(
    statistics_ptr, row_bias_ptr, rows, offs_c, mask, C, frames, stride_row_bias_b, stride_row_bias_t,
):  # fmt: skip
    """Means of the channels offs_c in these frames, with the row bias in them: [BLOCK_T, BLOCK_G]."""
    mean = tl.load(statistics_ptr + rows.to(tl.int64) * 2 * C + offs_c, mask=mask, other=0.0)
    if row_bias_ptr is not None:
        b, t = (rows // frames).to(tl.int64), (rows % frames).to(tl.int64)
        offset = b * stride_row_bias_b + t * stride_row_bias_t + offs_c
        mean += tl.load(row_bias_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    return mean


@triton.jit(
    do_not_specialize=(
        "C", "group_size", "pixels", "frames", "merged", "stride_scale_b", "stride_scale_t", "stride_shift_b",
        "stride_shift_t", "stride_row_bias_b", "stride_row_bias_t",
    )
)  # fmt: skip
def _affine_kernel(
    statistics_ptr, gamma_ptr, beta_ptr, scale_ptr, shift_ptr, row_bias_ptr, mul_ptr, add_ptr,
    C, group_size, pixels, frames, merged, eps,
    stride_scale_b, stride_scale_t, stride_shift_b, stride_shift_t, stride_row_bias_b, stride_row_bias_t,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    n, g = tl.program_id(0), tl.program_id(1)
    offs = tl.arange(0, BLOCK_G)
    offs_c, mask_c = g * group_size + offs, offs < group_size
    first = n - n % merged  # of the frames that share their statistics
    steps = tl.arange(0, BLOCK_T)[:, None]
    pixels_f = pixels.to(tl.float32)
    count = merged.to(tl.float32) * group_size

    total = tl.zeros([BLOCK_T, BLOCK_G], tl.float32)
    for start in range(0, merged, BLOCK_T):
        mask = (start + steps < merged) & mask_c[None, :]
        total += _channel_means(
            statistics_ptr, row_bias_ptr, first + start + steps, offs_c[None, :], mask, C, frames,
            stride_row_bias_b, stride_row_bias_t,
        )  # fmt: skip
    mean = tl.sum(total) / count

    total = tl.zeros([BLOCK_T, BLOCK_G], tl.float32)
    for start in range(0, merged, BLOCK_T):
        mask = (start + steps < merged) & mask_c[None, :]
        rows = first + start + steps
        mean_c = _channel_means(
            statistics_ptr, row_bias_ptr, rows, offs_c[None, :], mask, C, frames, stride_row_bias_b, stride_row_bias_t
        )
        m2_c = tl.load(statistics_ptr + (rows.to(tl.int64) * 2 + 1) * C + offs_c[None, :], mask=mask, other=0.0)
        centred = tl.where(mask, mean_c - mean, 0.0)
        total += m2_c + pixels_f * centred * centred
    variance = tl.sum(total) / (pixels_f * count)

    rstd = 1.0 / tl.sqrt(variance + eps)
    mul = rstd * tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    b, t = (n // frames).to(tl.int64), (n % frames).to(tl.int64)
    centre = mean
    if row_bias_ptr is not None:
        row_bias_offset = b * stride_row_bias_b + t * stride_row_bias_t + offs_c
        centre = mean - tl.load(row_bias_ptr + row_bias_offset, mask=mask_c, other=0.0).to(tl.float32)
    add = tl.load(beta_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) - centre * mul
    if scale_ptr is not None:
        scale_offset = b * stride_scale_b + t * stride_scale_t + offs_c
        scale = 1.0 + tl.load(scale_ptr + scale_offset, mask=mask_c, other=0.0).to(tl.float32)
        shift_offset = b * stride_shift_b + t * stride_shift_t + offs_c
        shift = tl.load(shift_ptr + shift_offset, mask=mask_c, other=0.0).to(tl.float32)
        mul, add = mul * scale, add * scale + shift
    out = n.to(tl.int64) * C + offs_c
    tl.store(mul_ptr + out, mul, mask=mask_c)
    tl.store(add_ptr + out, add, mask=mask_c)


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
    row_bias: Tensor | None = None,
    over_frames: int = 1,
) -> tuple[Tensor, Tensor]:
    N, _, C = statistics.shape
    mul, add = (torch.empty(N, C, dtype=torch.float32, device=statistics.device) for _ in range(2))
    given = {"scale": scale, "shift": shift, "row_bias": row_bias}
    clips = next((value.shape[0] for value in given.values() if value is not None), N)
    strides = {}
    for name, value in given.items():
        strides[f"stride_{name}_b"] = 0 if value is None else value.stride(0)
        strides[f"stride_{name}_t"] = 0 if value is None or value.shape[1] == 1 else value.stride(1)
    block_g = max(32, triton.next_power_of_2(C // num_groups))  # at least a warp
    launching.launch(
        _affine_kernel,
        (N, num_groups),
        dict(
            statistics_ptr=statistics, gamma_ptr=gamma, beta_ptr=beta, scale_ptr=scale, shift_ptr=shift,
            row_bias_ptr=row_bias, mul_ptr=mul, add_ptr=add, C=C, group_size=C // num_groups, pixels=pixels,
            frames=N // clips, merged=over_frames, eps=eps, **strides,
        ),
        dict(BLOCK_T=min(triton.next_power_of_2(over_frames), max(1, 512 // block_g)), BLOCK_G=block_g),
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
    row_bias: Tensor | None = None,
    over_frames: int = 1,
) -> tuple[Tensor, Tensor]:
    """GroupNorm of x + row_bias and the timestep's scale and shift as `mul * x + add`.

    Args:
        statistics: [N, 2, C] of x, from `channel_statistics`; N = B*T frames.
        pixels: S, the pixels that each statistic covers.
        gamma, beta: [C].
        scale, shift: [B, 1 or T, C] or None, together; the last axis contiguous.
        row_bias: [B, 1 or T, C] or None; the last axis contiguous.
        over_frames: frames, one after the other, that share a mean and a variance: 1, or the T of each clip.

    Returns:
        mul, add: [N, C] in the dtype of `statistics`.

    Raises:
        ValueError: shapes that do not fit, C not divisible by num_groups, N not by over_frames, or pixels < 1.
    """
    _check(statistics, pixels, gamma, beta, num_groups, scale, shift, row_bias, over_frames)
    function = launch if statistics.is_cuda else reference
    return function(statistics, pixels, gamma, beta, num_groups, eps, scale, shift, row_bias, over_frames)


@norm_affine.register_fake
def _(statistics, pixels, gamma, beta, num_groups, eps=1e-5, scale=None, shift=None, row_bias=None, over_frames=1):
    _check(statistics, pixels, gamma, beta, num_groups, scale, shift, row_bias, over_frames)
    shape = (statistics.shape[0], statistics.shape[2])
    return statistics.new_empty(shape), statistics.new_empty(shape)


def _check(statistics, pixels, gamma, beta, num_groups, scale, shift, row_bias, over_frames) -> None:
    if statistics.dim() != 3 or statistics.shape[1] != 2 or not statistics.is_contiguous():
        raise ValueError(f"norm_affine: statistics has shape {tuple(statistics.shape)}, expected contiguous [N, 2, C]")
    if statistics.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"norm_affine: statistics has dtype {statistics.dtype}; float32 is needed")
    N, _, C = statistics.shape
    if num_groups < 1 or C % num_groups:
        raise ValueError(f"norm_affine: C={C} is not a multiple of num_groups={num_groups}")
    if pixels < 1:
        raise ValueError(f"norm_affine: pixels={pixels} must be at least 1")
    if over_frames < 1 or N % over_frames:
        raise ValueError(f"norm_affine: over_frames={over_frames} does not divide the {N} frames")
    rows = {"scale": scale, "shift": shift, "row_bias": row_bias}
    for name, value in {"gamma": gamma, "beta": beta, **rows}.items():
        if value is not None and value.device != statistics.device:
            raise ValueError(f"norm_affine: {name} is on {value.device}, statistics on {statistics.device}")
    for name, value in {"gamma": gamma, "beta": beta}.items():
        if tuple(value.shape) != (C,) or (value.stride(0) != 1 and C > 1):
            raise ValueError(f"norm_affine: {name} has shape {tuple(value.shape)}, expected contiguous {(C,)}")
    if (scale is None) != (shift is None):
        raise ValueError(f"norm_affine: scale and shift come together, got scale={scale is not None}")
    rows = {name: value for name, value in rows.items() if value is not None}
    for name, value in rows.items():
        shape, stride = tuple(value.shape), tuple(value.stride())
        if len(shape) != 3 or shape[2] != C or shape[0] < 1 or N % shape[0] or shape[1] not in (1, N // shape[0]):
            raise ValueError(f"norm_affine: {name} has shape {shape}, expected [B, 1 or T, {C}] with B*T={N}")
        if stride[2] != 1 and C > 1:
            raise ValueError(f"norm_affine: {name} has stride {stride}; its last axis must be contiguous")
    for (first, one), (second, other) in itertools.pairwise(rows.items()):
        if one.shape[0] != other.shape[0]:
            raise ValueError(f"norm_affine: {first} has B={one.shape[0]}, {second} has B={other.shape[0]}")


def cost(x: Tensor) -> Cost:
    """Of `channel_statistics`; the fold, with a row bias and over frames too, touches only [N, C]."""
    return Cost(flops=4 * x.numel(), bytes=x.numel() * x.element_size() + 8 * x.shape[0] * x.shape[2])


def aot_cases(dtype: torch.dtype) -> list:
    """Statistics, merge and fold as the networks use them, on tensors without data."""

    def run():
        statistics = launch_statistics(torch.empty(80, 128 * 128, 320, dtype=dtype, device="meta"))
        gamma = torch.empty(320, dtype=dtype, device="meta")
        modulation = torch.empty(1, 1, 640, dtype=dtype, device="meta")
        launch(statistics, 128 * 128, gamma, gamma, 32)
        launch(statistics, 128 * 128, gamma, gamma, 32, 1e-5, *modulation.chunk(2, -1))

    def run_rows(frames: int, C: int, over_frames: int):
        """A timestep that is added before the norm, as the public U-Nets do."""
        statistics = torch.empty(2 * frames, 2, C, dtype=torch.float32, device="meta")
        gamma, rows = (torch.empty(*size, C, dtype=dtype, device="meta") for size in ((), (2, 1)))
        launch(statistics, 32 * 32, gamma, gamma, 32, row_bias=rows, over_frames=over_frames)
        launch(statistics, 32 * 32, gamma, gamma, 32, over_frames=over_frames)

    cases = [("C320-128x128", run), ("C320-rows", lambda: run_rows(16, 320, 1))]
    return cases + [(f"C{C}-over-frames", lambda C=C: run_rows(16, C, 16)) for C in (320, 1280, 2560)]
