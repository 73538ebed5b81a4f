"""The matrix-product core that spatial_conv and temporal_conv share.

A convolution over channels-last frames [B, T, H, W, C] is a matrix product of gathered pixels [pixels, taps * C] with
weights [taps * C, O]. The gather is address arithmetic in the loads: stride, nearest upsampling, frame duplication,
temporal stride and temporal shift all cost no memory traffic of their own.

    y[n, p, o] = sum over tap, c of  prologue(x)[source(n, p, tap, c), c] * weight[o, tap, c]  (+ bias + residual)
    prologue(x) = silu(mul[n, c] * x + add[n, c]), and zero outside the frame and the clip

Bound by arithmetic for C of some hundreds, by memory below.
"""

import torch
import triton
import triton.language as tl
from pylumiere.kernels import launching, tuning
from pylumiere.kernels.cost import Cost
from pylumiere.kernels.norm_affine import merge_tiles

ENDS = ("zero", "circular", "replicate")


@triton.jit
def gather_pixels(
    x_batch, mul_ptr, add_ptr, T, H, W, C, b, t_out, h_out, w_out, mask_m, tap, offs_c,
    stride_t, stride_h, stride_w, fold_next, fold_prev,
    KT: tl.constexpr, KS: tl.constexpr, STRIDE_T: tl.constexpr, STRIDE_S: tl.constexpr,
    UP_T: tl.constexpr, UP_S: tl.constexpr,
    SILU: tl.constexpr, SHIFT: tl.constexpr, ENDS: tl.constexpr, FOLD_ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The activated inputs [BLOCK_M, BLOCK_C] of one tap for pixels (h_out, w_out) of frame t_out, channels offs_c."""
    # Position on the upsampled grid, tested before the division: in C, -1 // 2 is 0.
    t_up = t_out * STRIDE_T + tap // (KS * KS) - KT // 2
    h_up = h_out * STRIDE_S + (tap // KS) % KS - KS // 2
    w_up = w_out * STRIDE_S + tap % KS - KS // 2
    mask_x = mask_m & (h_up >= 0) & (h_up < H * UP_S) & (w_up >= 0) & (w_up < W * UP_S)
    is_inside = ((t_up >= 0) & (t_up < T * UP_T)).to(tl.int32)
    mask_c = offs_c < C * is_inside
    h = h_up // UP_S
    w = w_up // UP_S
    t = t_up // UP_T

    frame = t
    channel_offset = offs_c
    if SHIFT:  # the frame depends on the channel
        delta = tl.where(offs_c < fold_next, 1, tl.where(offs_c < fold_next + fold_prev, -1, 0))
        if FOLD_ALIGN > 1:
            delta = tl.max_constancy(delta, [FOLD_ALIGN])  # keeps the loads vectorised
        frame = t + delta
        if ENDS == 1:
            frame = (frame + T) % T
        elif ENDS == 2:
            frame = tl.minimum(tl.maximum(frame, 0), T - 1)
        mask_c = mask_c & (frame >= 0) & (frame < T)
        offs_frame = (frame - t).to(tl.int64) if WIDE else frame - t
        channel_offset = offs_c + offs_frame * stride_t

    if WIDE:
        h, w = h.to(tl.int64), w.to(tl.int64)
    pixel_offset = h * stride_h + w * stride_w
    mask = mask_x[:, None] & mask_c[None, :]
    x_tile = x_batch + t.to(tl.int64) * stride_t
    x = tl.load(x_tile + pixel_offset[:, None] + channel_offset[None, :], mask=mask, other=0.0)  # [M, C]
    if mul_ptr is not None:
        affine_row = (b * T + t).to(tl.int64) * C
        affine_offset = (frame - t) * C + offs_c
        mul = tl.load(mul_ptr + affine_row + affine_offset, mask=mask_c, other=0.0)
        add = tl.load(add_ptr + affine_row + affine_offset, mask=mask_c, other=0.0)
        value = x.to(tl.float32) * mul[None, :] + add[None, :]
        if SILU:
            value = value * tl.sigmoid(value)
        x = tl.where(mask, value, 0.0).to(x.dtype)  # padding is zero after the prologue
    elif SILU:
        value = x.to(tl.float32)
        x = (value * tl.sigmoid(value)).to(x.dtype)
    return x


@triton.jit(do_not_specialize=("T", "H", "W", "T_out", "H_out", "W_out", "fold_next", "fold_prev"))
def implicit_gemm_kernel(
    x_ptr, weight_ptr, bias_ptr, mul_ptr, add_ptr, residual_ptr, y_ptr, partial_ptr,
    T, H, W, C, T_out, H_out, W_out, O,
    stride_b, stride_t, stride_h, stride_w,
    fold_next, fold_prev,
    KT: tl.constexpr, KS: tl.constexpr, STRIDE_T: tl.constexpr, STRIDE_S: tl.constexpr,
    UP_T: tl.constexpr, UP_S: tl.constexpr,
    SILU: tl.constexpr, SHIFT: tl.constexpr, ENDS: tl.constexpr, FOLD_ALIGN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KT * KS * KS
    pixels_out = H_out * W_out
    tiles_o = tl.cdiv(O, BLOCK_O)
    tiles_m = tl.cdiv(pixels_out, BLOCK_M)
    pid = tl.program_id(0)
    tile_o = pid % tiles_o  # fastest, so that one tile of pixels is read by neighbours in time
    tile_m = (pid // tiles_o) % tiles_m
    n_out = pid // (tiles_o * tiles_m)
    b = n_out // T_out
    t_out = n_out % T_out

    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_m = offs_m < pixels_out
    mask_o = offs_o < O
    h_out = offs_m // W_out
    w_out = offs_m % W_out
    x_batch = x_ptr + b.to(tl.int64) * stride_b

    acc = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    for i in range(0, tl.cdiv(C, BLOCK_C) * TAPS):
        tap = i % TAPS
        offs_c = (i // TAPS) * BLOCK_C + tl.arange(0, BLOCK_C)
        x = gather_pixels(
            x_batch, mul_ptr, add_ptr, T, H, W, C, b, t_out, h_out, w_out, mask_m, tap, offs_c,
            stride_t, stride_h, stride_w, fold_next, fold_prev,
            KT, KS, STRIDE_T, STRIDE_S, UP_T, UP_S, SILU, SHIFT, ENDS, FOLD_ALIGN, WIDE,
        )  # fmt: skip
        weight_row = offs_o.to(tl.int64) if WIDE else offs_o
        weight_offset = weight_row[None, :] * (TAPS * C) + tap * C + offs_c[:, None]
        mask_w = (offs_c < C)[:, None] & mask_o[None, :]
        weight = tl.load(weight_ptr + weight_offset, mask=mask_w, other=0.0)  # [C, O]
        if UPCAST:  # the interpreter has no bfloat16 product; in float32 the products are the same
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)[None, :]
    mask_y = mask_m[:, None] & mask_o[None, :]
    y_frame = n_out.to(tl.int64) * pixels_out * O
    offs_y = (offs_m.to(tl.int64) if WIDE else offs_m)[:, None] * O + offs_o[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + y_frame + offs_y, mask=mask_y, other=0.0).to(tl.float32)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + y_frame + offs_y, y, mask=mask_y)

    if partial_ptr is not None:  # statistics of this tile for the next GroupNorm, of the values as stored
        count = tl.minimum(pixels_out - tile_m * BLOCK_M, BLOCK_M).to(tl.float32)
        stored = tl.where(mask_y, y.to(tl.float32), 0.0)
        mean = tl.sum(stored, axis=0) / count
        centred = tl.where(mask_y, stored - mean[None, :], 0.0)
        row = (n_out.to(tl.int64) * tiles_m + tile_m) * 2 * O
        tl.store(partial_ptr + row + offs_o, mean, mask=mask_o)
        tl.store(partial_ptr + row + O + offs_o, tl.sum(centred * centred, axis=0), mask=mask_o)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """The same values with the input channels innermost in memory: what the kernel reads. No copy if already so."""
    order = (0, *range(2, weight.dim()), 1)
    back = (0, weight.dim() - 1, *range(1, weight.dim() - 1))
    return weight.permute(order).contiguous().permute(back)


def convolve(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mul: torch.Tensor | None,
    add: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    silu: bool,
    kernel_t: int = 1,
    kernel_s: int = 1,
    stride_t: int = 1,
    stride_s: int = 1,
    up_t: int = 1,
    up_s: int = 1,
    fold_next: int = 0,
    fold_prev: int = 0,
    ends: str = "zero",
    statistics: bool = False,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on x [B, T, H, W, C] with a packed weight [O, C, ...taps].

    Returns:
        y [B, T_out, H_out, W_out, O], contiguous, and its channel statistics [B * T_out, 2, O], empty if not asked for.
    """
    B, T, H, W, C = x.shape
    O = weight.shape[0]
    T_out = out_size(T, up_t, kernel_t, stride_t)
    H_out, W_out = (out_size(n, up_s, kernel_s, stride_s) for n in (H, W))
    y = torch.empty(B, T_out, H_out, W_out, O, dtype=x.dtype, device=x.device)
    pixels = H_out * W_out
    config = tuning.choose(op, launching.arch_of(x), dtype=x.dtype, C=C, O=O, pixels=pixels, prologue=mul is not None)
    tiles = triton.cdiv(pixels, config.constants["BLOCK_M"])
    partial = torch.empty(B * T_out, tiles, 2, O, dtype=torch.float32, device=x.device) if statistics else None
    shift = fold_next + fold_prev > 0
    reach = (H - 1) * abs(x.stride(2)) + (W - 1) * abs(x.stride(3)) + C + (T * abs(x.stride(1)) if shift else 0)
    launching.launch(
        implicit_gemm_kernel,
        (B * T_out * tiles * triton.cdiv(O, config.constants["BLOCK_O"]),),
        dict(
            x_ptr=x, weight_ptr=weight, bias_ptr=bias, mul_ptr=mul, add_ptr=add, residual_ptr=residual, y_ptr=y,
            partial_ptr=partial, T=T, H=H, W=W, C=C, T_out=T_out, H_out=H_out, W_out=W_out, O=O,
            stride_b=x.stride(0), stride_t=x.stride(1), stride_h=x.stride(2), stride_w=x.stride(3),
            fold_next=fold_next, fold_prev=fold_prev,
        ),
        dict(
            KT=kernel_t, KS=kernel_s, STRIDE_T=stride_t, STRIDE_S=stride_s, UP_T=up_t, UP_S=up_s, SILU=silu,
            SHIFT=shift, ENDS=ENDS.index(ends), FOLD_ALIGN=8 if fold_next % 8 == fold_prev % 8 == 0 else 1,
            WIDE=max(reach, pixels * O, weight.numel()) >= 2**31, PRECISION=precision,
            UPCAST=launching.arch_of(x) == 0 and x.dtype == torch.bfloat16, **config.constants,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    if partial is None:
        return y, torch.empty(0, dtype=torch.float32, device=x.device)
    return y, merge_tiles(partial, pixels, config.constants["BLOCK_M"])


def out_size(size: int, up: int, kernel: int, stride: int) -> int:
    """Output length of a convolution with padding kernel // 2 over `size * up` positions."""
    return (size * up - 1 + (kernel % 2 == 0)) // stride + 1


def prologue(x: torch.Tensor, mul: torch.Tensor | None, add: torch.Tensor | None, silu: bool) -> torch.Tensor:
    """The reference of the prologue on x [B, T, H, W, C] with mul, add [B * T, C]; x has the dtype to compute in."""
    if mul is not None:
        B, T, C = x.shape[0], x.shape[1], x.shape[-1]
        x = x * mul.to(x.dtype).view(B, T, 1, 1, C) + add.to(x.dtype).view(B, T, 1, 1, C)
    return torch.nn.functional.silu(x) if silu else x


def check_operands(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mul: torch.Tensor | None,
    add: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_shape: tuple[int, ...],
) -> None:
    """The checks that the convolutions share. Raises ValueError naming the argument and its value."""
    B, T, C = x.shape[0], x.shape[1], x.shape[-1]
    if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{op}: x has dtype {x.dtype}; float32, float16 or bfloat16 is needed (float64 on the CPU)")
    if x.stride(-1) != 1 and C > 1:
        raise ValueError(f"{op}: x has stride {tuple(x.stride())}; its last axis must be contiguous")
    if x.numel() == 0:
        raise ValueError(f"{op}: x is empty, shape {tuple(x.shape)}")
    if weight.shape[1] != C:
        raise ValueError(f"{op}: weight has {weight.shape[1]} input channels, x has C={C}")
    shapes = {"bias": (bias, (weight.shape[0],)), "mul": (mul, (B * T, C)), "add": (add, (B * T, C))}
    shapes["residual"] = (residual, out_shape)
    for name, (tensor, expected) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(expected):
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} has stride {tuple(tensor.stride())}; it must be contiguous")
    if (mul is None) != (add is None):
        raise ValueError(f"{op}: mul and add come together, got mul={mul is not None}, add={add is not None}")
    for name, tensor in {"weight": weight, "bias": bias, "residual": residual}.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, x has {x.dtype}")
    for name, tensor in {"mul": mul, "add": add}.items():
        if tensor is not None and tensor.dtype != torch.promote_types(x.dtype, torch.float32):
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; float32 is needed (float64 for a float64 x)")
    for name, tensor in {"weight": weight, "bias": bias, "mul": mul, "add": add, "residual": residual}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x is on {x.device}")


def traffic(x: torch.Tensor, weight: torch.Tensor, out_shape: tuple[int, ...], residual: torch.Tensor | None) -> Cost:
    """Multiplications and additions of a convolution; each operand crosses the bus once."""
    out, size = torch.Size(out_shape).numel(), x.element_size()
    written = out * (2 if residual is not None else 1)
    return Cost(2 * out * weight[0].numel(), size * (x.numel() + weight.numel() + written))
