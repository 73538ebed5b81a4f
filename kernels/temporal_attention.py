"""Attention over the frames of a clip: one short sequence per pixel and head.

    out[b, :, s] = softmax(q k^T / sqrt(D) + position) v         q, k, v [T, D] of pixel s and one head

A sequence of 10 or 20 frames would leave most of a matrix instruction's rows empty, so a tile holds as many whole
pixels as fit: row r is frame r % T of pixel r // T, and scores between different pixels are masked. The scores that
are thrown away cost arithmetic which a kernel bound by memory has to spare. Where there is no matrix instruction
(float32, and float16 on sm 75) the rows walk through the key frames of their pixel instead.

Source: Bar-Tal et al. 2024 (Lumiere), sec. 3.1; Vaswani et al. 2017, eq. 1; relative positions as in Raffel et al.
2020 (T5), sec. 2.1, one value for each distance and head.
Bound by memory: the packed tensor read once, the output written once.
"""

import torch
import triton
import triton.language as tl
from pylumiere.kernels import launching, tuning
from pylumiere.kernels.cost import Cost
from pylumiere.kernels.launching import recorded

Tensor = torch.Tensor
MAX_FRAMES = 128
MAX_HEAD_DIM = 128
MAX_PIXELS = 2**31 - 1 - MAX_FRAMES  # the last tile counts beyond its last pixel, in 32 bits

# ---- reference -----------------------------------------------------------------------------------------------------


def reference(qkv: Tensor, num_heads: int, position: Tensor | None = None) -> Tensor:
    T = qkv.shape[1]
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(dtype).permute(0, 2, 1, 3).unflatten(-1, (3, num_heads, -1)).unbind(3)  # [B, S, T, heads, D]
    q, k, v = (part.transpose(2, 3) for part in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # [B, S, heads, T, T]
    if position is not None:
        if position.dim() == 2:
            frames = torch.arange(T, device=qkv.device)
            position = position[:, frames[None, :] - frames[:, None] + T - 1]
        scores = scores + position.to(dtype)
    out = scores.softmax(-1) @ v
    return out.permute(0, 3, 1, 2, 4).flatten(3).to(qkv.dtype).contiguous()


# ---- kernel --------------------------------------------------------------------------------------------------------


@triton.jit
def _position_address(position_ptr, head, T, query, key, RELATIVE: tl.constexpr):
    if RELATIVE:
        address = position_ptr + head * (2 * T - 1) + (key - query + T - 1)
    else:
        address = position_ptr + head * T * T + query * T + key
    return address


@triton.jit(do_not_specialize=("T", "S", "num_pixels", "num_heads"))
def _temporal_attention_kernel(
    qkv_ptr, position_ptr, out_ptr,
    T, S, num_pixels, num_heads, D, scale,
    stride_b, stride_t, stride_s,
    RELATIVE: tl.constexpr, MATRIX: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Heads vary fastest: programs that run at the same time read neighbouring memory.
    pid = tl.program_id(0)
    head = pid % num_heads
    pack = BLOCK_M // T
    C = num_heads * D
    rows = tl.arange(0, BLOCK_M)
    local, t = rows // T, rows % T
    pixel = (pid // num_heads) * pack + local
    mask_m = (local < pack) & (pixel < num_pixels)
    b, s = (pixel // S).to(tl.int64), pixel % S
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    base = b * stride_b + t.to(tl.int64) * stride_t + s.to(tl.int64) * stride_s + head * D
    address = qkv_ptr + base[:, None] + offs_d[None, :]
    q = tl.load(address, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]

    scale *= 1.4426950408889634  # scores in powers of two
    if MATRIX:
        k = tl.load(address + C, mask=mask, other=0.0)
        v = tl.load(address + 2 * C, mask=mask, other=0.0)
        if UPCAST:  # the interpreter has no bfloat16 product; in float32 the products are the same
            q, k = q.to(tl.float32), k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_M]
        same = local[:, None] == local[None, :]
        if position_ptr is not None:
            address = _position_address(position_ptr, head, T, t[:, None], t[None, :], RELATIVE)
            scores += tl.load(address, mask=same, other=0.0).to(tl.float32) * 1.4426950408889634
        scores = tl.where(same, scores, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
        total = tl.sum(weights, axis=1)
        weights = weights.to(v.dtype)
        if UPCAST:
            weights, v = weights.to(tl.float32), v.to(tl.float32)
        out = tl.dot(weights, v, input_precision="ieee") / total[:, None]
    else:
        # No matrix instruction for this dtype: one key frame after the other, running maximum and sum.
        q = q.to(tl.float32) * scale
        address = qkv_ptr + (base - t.to(tl.int64) * stride_t)[:, None] + offs_d[None, :]
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for key_frame in range(T):
            k = tl.load(address + C, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(address + 2 * C, mask=mask, other=0.0).to(tl.float32)
            score = tl.sum(q * k, axis=1)
            if position_ptr is not None:
                position = _position_address(position_ptr, head, T, t, key_frame, RELATIVE)
                score += tl.load(position).to(tl.float32) * 1.4426950408889634
            higher = tl.maximum(highest, score)
            kept, weight = tl.exp2(highest - higher), tl.exp2(score - higher)
            total = total * kept + weight
            out = out * kept[:, None] + weight[:, None] * v
            highest = higher
            address += stride_t
        out = out / total[:, None]

    offs_out = ((b * T + t) * S + s) * C + head * D
    tl.store(out_ptr + offs_out[:, None] + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


# ---- launch --------------------------------------------------------------------------------------------------------


@recorded("temporal_attention", reference)
def launch(qkv: Tensor, num_heads: int, position: Tensor | None = None) -> Tensor:
    B, T, S, C3 = qkv.shape
    C = C3 // 3
    D = C // num_heads
    out = torch.empty(B, T, S, C, dtype=qkv.dtype, device=qkv.device)
    config = tuning.choose("temporal_attention", launching.arch_of(qkv), T=T, D=D, dtype=qkv.dtype)
    pack = config.constants["BLOCK_M"] // T
    launching.launch(
        _temporal_attention_kernel,
        (triton.cdiv(B * S, pack) * num_heads,),
        dict(
            qkv_ptr=qkv, position_ptr=position, out_ptr=out, T=T, S=S, num_pixels=B * S, num_heads=num_heads, D=D,
            scale=D**-0.5, stride_b=qkv.stride(0), stride_t=qkv.stride(1), stride_s=qkv.stride(2),
        ),
        dict(
            RELATIVE=position is not None and position.dim() == 2,
            UPCAST=launching.interpreted() and qkv.dtype == torch.bfloat16 and not launching.is_symbolic(qkv),
            BLOCK_D=max(16, triton.next_power_of_2(D)), **config.constants,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return out


# ---- op ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pylumiere::temporal_attention", mutates_args=())
def temporal_attention(qkv: Tensor, num_heads: int, position: Tensor | None = None) -> Tensor:
    """Attention over frames, one sequence per pixel.

    Args:
        qkv: [B, T, S, 3*C], q, k and v one after the other, each num_heads x D; the last axis contiguous.
        num_heads: C // D.
        position: added to the scores before the softmax: [num_heads, T, T] for query and key frame (absolute), or
            [num_heads, 2*T - 1] for key frame - query frame + T - 1 (relative); contiguous.

    Returns:
        [B, T, S, C], contiguous, dtype of qkv. Softmax and sums in float32.

    Raises:
        ValueError: T > 128 or D > 128 (a tile holds whole sequences), about 2^31 pixels or more, shapes, dtypes or
            strides that do not fit.
    """
    _check(qkv, num_heads, position)
    return (launch if qkv.is_cuda else reference)(qkv, num_heads, position)


@temporal_attention.register_fake
def _(qkv, num_heads, position=None):
    _check(qkv, num_heads, position)
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


def _check(qkv, num_heads, position) -> None:
    if qkv.dim() != 4:
        raise ValueError(f"temporal_attention: qkv has shape {tuple(qkv.shape)}, expected [B, T, S, 3*C]")
    if qkv.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"temporal_attention: qkv has dtype {qkv.dtype}; a floating dtype is needed")
    if qkv.numel() == 0:
        raise ValueError(f"temporal_attention: qkv is empty, shape {tuple(qkv.shape)}")
    B, T, S, C3 = qkv.shape
    if T > MAX_FRAMES:
        raise ValueError(f"temporal_attention: qkv has T={T} frames, at most {MAX_FRAMES} fit one tile")
    if num_heads < 1 or C3 % (3 * num_heads):
        raise ValueError(f"temporal_attention: qkv has {C3} channels, not a multiple of 3 * num_heads={3 * num_heads}")
    D = C3 // (3 * num_heads)
    if D > MAX_HEAD_DIM:
        raise ValueError(f"temporal_attention: num_heads={num_heads} gives heads of {D}, at most {MAX_HEAD_DIM} fit")
    if B * S > MAX_PIXELS:
        raise ValueError(f"temporal_attention: qkv has B*S={B * S} pixels, at most {MAX_PIXELS} can be counted")
    if qkv.stride(3) != 1:
        raise ValueError(f"temporal_attention: qkv has stride {tuple(qkv.stride())}; its last axis must be contiguous")
    if position is None:
        return
    allowed = ((num_heads, T, T), (num_heads, 2 * T - 1))
    if tuple(position.shape) not in allowed:
        raise ValueError(
            f"temporal_attention: position has shape {tuple(position.shape)}, expected {allowed[0]} or {allowed[1]}"
        )
    if not position.is_floating_point():
        raise ValueError(f"temporal_attention: position has dtype {position.dtype}; a floating dtype is needed")
    if not position.is_contiguous():
        raise ValueError(f"temporal_attention: position has stride {tuple(position.stride())}; it must be contiguous")
    if position.device != qkv.device:
        raise ValueError(f"temporal_attention: position is on {position.device}, qkv on {qkv.device}")


def cost(qkv: Tensor, num_heads: int, position: Tensor | None = None) -> Cost:
    B, T, S, C3 = qkv.shape
    return Cost(flops=4 * B * S * T * T * (C3 // 3), bytes=4 * qkv.numel() // 3 * qkv.element_size())


def aot_cases(dtype: torch.dtype) -> list:
    """The coarsest levels of 80 frames (10 and 20), and the lengths that a benchmark sweeps."""

    def case(T: int, heads: int, D: int):
        return lambda: launch(torch.empty(1, T, 256, 3 * heads * D, dtype=dtype, device="meta"), heads)

    return [(f"T{T}-D{D}", case(T, heads, D)) for T in (5, 10, 20, 40, 80) for heads, D in ((8, 32), (20, 64))]
