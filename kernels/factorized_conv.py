"""(2+1)D convolution: 3 x 3 in space, then 3 taps in time, in one kernel where channels allow.

    z = conv2d(silu(mul * x + add)) + bias_s
    y[t] = sum_k weight_t[k] * act(z[t + k - 1]) + bias_t + residual

The fused kernel walks along time with one tile of pixels. Each z[t] stays on the chip and is multiplied at once into
the three frames that need it, in rolling accumulators. It saves writing and reading z, and costs two extra frames of
the spatial convolution per chunk of frames. `plan` weighs the two and says why. act is SiLU or nothing: a GroupNorm
between the two needs all of z first, so there the two kernels are the only way. The STUNet has such a norm and calls
`spatial_conv` and `temporal_conv`; this operator is for networks that have none.

Source: Tran et al. 2018, R(2+1)D. Fused: bound by memory at small C.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from pylumiere.kernels import launching, spatial_conv, temporal_conv, tuning
from pylumiere.kernels.cost import Cost
from pylumiere.kernels.implicit_gemm import check_operands, gather_pixels, pack_weight, traffic
from pylumiere.kernels.launching import recorded

Tensor = torch.Tensor
MAX_CHANNELS = 128


def reference(
    x: Tensor,
    weight_s: Tensor,
    bias_s: Tensor | None,
    weight_t: Tensor,
    bias_t: Tensor | None = None,
    mul: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = False,
    silu_between: bool = False,
    fused: bool | None = None,
) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = [None if v is None else v.to(dtype) for v in (x, weight_s, bias_s, mul, add)]
    z, _ = spatial_conv.reference(*wide, silu=silu)
    wide = [None if v is None else v.to(dtype) for v in (weight_t, bias_t, residual)]
    y, _ = temporal_conv.reference(z, wide[0], wide[1], residual=wide[2], silu=silu_between)
    return y.to(x.dtype)


# ---- kernel --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("T", "H", "W"))
def _factorized_kernel(
    x_ptr, weight_s_ptr, bias_s_ptr, weight_t_ptr, bias_t_ptr, mul_ptr, add_ptr, residual_ptr, y_ptr,
    T, H, W, C, M, O,
    stride_b, stride_t, stride_h, stride_w,
    SILU: tl.constexpr, SILU_BETWEEN: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, FRAMES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    pixels = H * W
    tiles = tl.cdiv(pixels, BLOCK_P)
    chunks = tl.cdiv(T, FRAMES)
    pid = tl.program_id(0)
    tile = pid % tiles
    t_first = ((pid // tiles) % chunks) * FRAMES
    b = pid // (tiles * chunks)

    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_m = tl.arange(0, BLOCK_M)
    offs_o = tl.arange(0, BLOCK_O)
    mask_p = offs_p < pixels
    mask_w = (offs_m < M)[:, None] & (offs_o < O)[None, :]
    mask_y = mask_p[:, None] & (offs_o < O)[None, :]
    h = offs_p // W
    w = offs_p % W
    x_batch = x_ptr + b.to(tl.int64) * stride_b
    offs_y = (offs_p.to(tl.int64) if WIDE else offs_p)[:, None] * O + offs_o[None, :]
    offs_wt = offs_o[None, :] * (3 * M) + offs_m[:, None]

    before = tl.zeros([BLOCK_P, BLOCK_O], dtype=tl.float32)  # frame t - 1, still to receive z[t]
    now = tl.zeros([BLOCK_P, BLOCK_O], dtype=tl.float32)  # frame t, has received z[t - 1]
    for step in range(0, FRAMES + 2):
        t = t_first - 1 + step
        z = tl.zeros([BLOCK_P, BLOCK_M], dtype=tl.float32)
        for i in range(0, tl.cdiv(C, BLOCK_C) * 9):
            tap = i % 9
            offs_c = (i // 9) * BLOCK_C + tl.arange(0, BLOCK_C)
            x = gather_pixels(
                x_batch, mul_ptr, add_ptr, T, H, W, C, b, t, h, w, mask_p, tap, offs_c,
                stride_t, stride_h, stride_w, 0, 0,
                1, 3, 1, 1, 1, 1, SILU, False, 0, 1, WIDE,
            )  # fmt: skip
            mask_ws = (offs_c < C)[:, None] & (offs_m < M)[None, :]
            weight_s = tl.load(
                weight_s_ptr + offs_m[None, :] * (9 * C) + tap * C + offs_c[:, None], mask=mask_ws, other=0.0
            )
            if UPCAST:
                x, weight_s = x.to(tl.float32), weight_s.to(tl.float32)
            z = tl.dot(x, weight_s, z, input_precision="ieee")
        if bias_s_ptr is not None:
            z += tl.load(bias_s_ptr + offs_m, mask=offs_m < M, other=0.0).to(tl.float32)[None, :]
        if SILU_BETWEEN:
            z = z * tl.sigmoid(z)
        is_inside = ((t >= 0) & (t < T)).to(tl.float32)
        z = (z * is_inside).to(x_ptr.dtype.element_ty)  # beyond the clip stand zeros, not the bias

        weight_0 = tl.load(weight_t_ptr + offs_wt, mask=mask_w, other=0.0)
        weight_1 = tl.load(weight_t_ptr + M + offs_wt, mask=mask_w, other=0.0)
        weight_2 = tl.load(weight_t_ptr + 2 * M + offs_wt, mask=mask_w, other=0.0)
        if UPCAST:
            z = z.to(tl.float32)
            weight_0, weight_1, weight_2 = weight_0.to(tl.float32), weight_1.to(tl.float32), weight_2.to(tl.float32)
        before = tl.dot(z, weight_2, before, input_precision="ieee")
        now = tl.dot(z, weight_1, now, input_precision="ieee")

        t_out = t - 1
        is_mine = ((step >= 2) & (t_out < T)).to(tl.int32)
        mask_out = mask_y & (offs_p < pixels * is_mine)[:, None]
        frame = (b * T + t_out).to(tl.int64) * pixels * O
        if bias_t_ptr is not None:
            before += tl.load(bias_t_ptr + offs_o, mask=offs_o < O, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            before += tl.load(residual_ptr + frame + offs_y, mask=mask_out, other=0.0).to(tl.float32)
        tl.store(y_ptr + frame + offs_y, before.to(y_ptr.dtype.element_ty), mask=mask_out)
        before = now
        now = tl.dot(z, weight_0, tl.zeros([BLOCK_P, BLOCK_O], dtype=tl.float32), input_precision="ieee")


# ---- plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Whether one kernel or two, and why."""

    fused: bool
    reason: str


def plan(
    shape: tuple[int, ...], mid: int, out: int, dtype: torch.dtype, arch: int, norm_between: bool = False
) -> Plan:
    """Weigh one kernel against two for x of `shape` [B, T, H, W, C], `mid` and `out` channels.

    `norm_between`: a GroupNorm stands between the two convolutions, as in the STUNet.

    Each way takes the longer of its arithmetic and its memory time. The model knows bytes, recomputed frames, and that
    the fused kernel's narrow tiles reach a smaller part of the arithmetic rate; it has not been fitted on a GPU.
    """
    B, T, H, W, C = shape
    if norm_between:
        return Plan(False, "a GroupNorm between the convolutions needs the whole intermediate before its first value")
    if max(mid, out) > MAX_CHANNELS:
        return Plan(False, f"{max(mid, out)} channels are more than the {MAX_CHANNELS} that fit on the chip")
    if dtype == torch.float32:
        return Plan(False, "float32 has no matrix instruction that would pay for the extra frames")
    if not tuning.has_row("factorized_conv", arch, mid=mid, out=out, dtype=dtype):
        return Plan(False, f"no configuration without spills for {max(mid, out)} channels on sm {arch}")
    frames = tuning.choose("factorized_conv", arch, mid=mid, out=out, dtype=dtype).constants["FRAMES"]
    flops_rate, bytes_rate = tuning.RATES[arch or 90]
    points = B * T * H * W
    spatial, temporal = 2 * points * 9 * C * mid, 2 * points * 3 * mid * out
    size = dtype.itemsize
    two = Cost(spatial, size * points * (C + mid)).seconds(0.65 * flops_rate, bytes_rate)
    two += Cost(temporal, size * points * (mid + out)).seconds(0.65 * flops_rate, bytes_rate)
    chunks = -(-T // frames)
    extra = (T + 2 * chunks) / T
    one = Cost(int((spatial + temporal) * extra), int(size * points * (C * extra + out)))
    fused = one.seconds(0.4 * flops_rate, bytes_rate)
    text = f"estimated {1e6 * fused:.0f} us in one kernel against {1e6 * two:.0f} us in two"
    return Plan(fused < two, text)


# ---- launch --------------------------------------------------------------------------------------------------------


@recorded("factorized_conv", reference)
def launch(
    x, weight_s, bias_s, weight_t, bias_t=None, mul=None, add=None, residual=None, silu=False, silu_between=False,
    fused=None,
):  # fmt: skip
    """As `reference`; weights packed. `fused` forces one kernel (True) or two (False); None asks `plan`."""
    B, T, H, W, C = x.shape
    M, O = weight_s.shape[0], weight_t.shape[0]
    arch = launching.arch_of(x)
    if fused is None:
        fused = plan(tuple(x.shape), M, O, x.dtype, arch).fused
    if not fused:
        z, _ = spatial_conv.launch(x, weight_s, bias_s, mul, add, silu=silu)
        return temporal_conv.launch(z, weight_t, bias_t, residual=residual, silu=silu_between)[0]
    config = tuning.choose("factorized_conv", arch, mid=M, out=O, dtype=x.dtype)
    y = torch.empty(B, T, H, W, O, dtype=x.dtype, device=x.device)
    reach = (H - 1) * abs(x.stride(2)) + (W - 1) * abs(x.stride(3)) + C
    tiles = triton.cdiv(H * W, config.constants["BLOCK_P"])
    launching.launch(
        _factorized_kernel,
        (B * triton.cdiv(T, config.constants["FRAMES"]) * tiles,),
        dict(
            x_ptr=x, weight_s_ptr=weight_s, bias_s_ptr=bias_s, weight_t_ptr=weight_t, bias_t_ptr=bias_t, mul_ptr=mul,
            add_ptr=add, residual_ptr=residual, y_ptr=y, T=T, H=H, W=W, C=C, M=M, O=O, stride_b=x.stride(0),
            stride_t=x.stride(1), stride_h=x.stride(2), stride_w=x.stride(3),
        ),
        dict(
            SILU=silu, SILU_BETWEEN=silu_between, WIDE=max(reach, H * W * O) >= 2**31,
            UPCAST=arch == 0 and x.dtype == torch.bfloat16, BLOCK_M=max(16, triton.next_power_of_2(M)),
            BLOCK_O=max(16, triton.next_power_of_2(O)), **config.constants,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return y


# ---- op ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pylumiere::factorized_conv", mutates_args=())
def factorized_conv(
    x: Tensor,
    weight_s: Tensor,
    bias_s: Tensor | None,
    weight_t: Tensor,
    bias_t: Tensor | None = None,
    mul: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = False,
    silu_between: bool = False,
    fused: bool | None = None,
) -> Tensor:
    """3 x 3 convolution within frames, then 3 taps over frames.

    Args:
        x: [B, T, H, W, C]; any strides with the last axis contiguous.
        weight_s, bias_s: [M, C, 3, 3], [M].
        weight_t, bias_t: [O, M, 3], [O].
        mul, add: [B*T, C] float32: silu(mul * x + add) enters the spatial convolution.
        residual: [B, T, H, W, O], added at the end.
        silu_between: SiLU between the two convolutions.
        fused: one kernel (True) or two (False); None leaves it to `plan`. One kernel takes up to 128 channels.

    Returns:
        [B, T, H, W, O], contiguous. Sums in float32; the intermediate is rounded to the dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit; the argument is named.
    """
    _check(x, weight_s, bias_s, weight_t, bias_t, mul, add, residual, fused)
    if not x.is_cuda:
        return reference(x, weight_s, bias_s, weight_t, bias_t, mul, add, residual, silu, silu_between)
    weight_s, weight_t = pack_weight(weight_s), pack_weight(weight_t)
    return launch(x, weight_s, bias_s, weight_t, bias_t, mul, add, residual, silu, silu_between, fused)


@factorized_conv.register_fake
def _(
    x, weight_s, bias_s, weight_t, bias_t=None, mul=None, add=None, residual=None, silu=False, silu_between=False,
    fused=None,
):  # fmt: skip
    return x.new_empty(_check(x, weight_s, bias_s, weight_t, bias_t, mul, add, residual, fused))


def _check(x, weight_s, bias_s, weight_t, bias_t, mul, add, residual, fused) -> tuple[int, ...]:
    if x.dim() != 5:
        raise ValueError(f"factorized_conv: x has shape {tuple(x.shape)}, expected [B, T, H, W, C]")
    if weight_s.dim() != 4 or tuple(weight_s.shape[2:]) != (3, 3):
        raise ValueError(f"factorized_conv: weight_s has shape {tuple(weight_s.shape)}, expected [M, C, 3, 3]")
    if weight_t.dim() != 3 or weight_t.shape[1:] != (weight_s.shape[0], 3):
        raise ValueError(
            f"factorized_conv: weight_t has shape {tuple(weight_t.shape)}, expected [O, {weight_s.shape[0]}, 3]"
        )
    channels = max(weight_s.shape[0], weight_t.shape[0])
    if fused and channels > MAX_CHANNELS:
        raise ValueError(f"factorized_conv: fused=True with {channels} channels; one kernel takes {MAX_CHANNELS}")
    check_operands("factorized_conv", x, weight_s, bias_s, mul, add, None, ())
    shape = (*x.shape[:4], weight_t.shape[0])
    check_operands("factorized_conv", x.new_empty((*x.shape[:4], weight_s.shape[0])), weight_t, bias_t, None, None,
                   residual, shape)  # fmt: skip
    return shape


def cost(x: Tensor, weight_s: Tensor, weight_t: Tensor, residual: Tensor | None = None) -> Cost:
    """Of the fused form: the intermediate crosses no bus."""
    shape = (*x.shape[:4], weight_s.shape[0])
    temporal = 2 * torch.Size(shape).numel() * weight_t[:, 0].numel()
    outer = traffic(x, weight_s, (*shape[:4], weight_t.shape[0]), residual)
    spatial = 2 * torch.Size(shape).numel() * weight_s[0].numel()
    return Cost(spatial + temporal, outer.bytes + weight_t.numel() * x.element_size())


def aot_cases(dtype: torch.dtype) -> list:
    """The fused kernel where it is listed, on tensors without data."""

    def case(C):
        def run():
            x = torch.empty(1, 16, 64, 64, C, dtype=dtype, device="meta")
            if not tuning.has_row("factorized_conv", launching.arch_of(x), mid=C, out=C, dtype=dtype):
                return
            bias, mul = x.new_empty(C), torch.empty(16, C, device="meta", dtype=torch.float32)
            weight_s, weight_t = pack_weight(x.new_empty(C, C, 3, 3)), pack_weight(x.new_empty(C, C, 3))
            launch(x, weight_s, bias, weight_t, bias, mul, mul, x.new_empty(x.shape), True, True, True)

        return f"C{C}", run

    return [case(32), case(64), case(96), case(128)]
