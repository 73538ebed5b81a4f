"""LayerNorm over the channels of each token.

    y = (x - mean) * rstd * weight + bias                  mean, rstd per token

A tile holds whole tokens: the mean is subtracted in registers before anything is squared, so nothing cancels.

Source: Ba, Kiros & Hinton 2016, "Layer Normalization", eq. 3-4. Bound by memory: x read once, y written once.
"""

import itertools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from pylumiere.kernels import launching, tuning
from pylumiere.kernels.cost import Cost
from pylumiere.kernels.launching import recorded
from torch import Tensor

MAX_CHANNELS = 8192


# ---- reference -----------------------------------------------------------------------------------------------------


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps).to(x.dtype).contiguous()


# ---- kernel --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("S",))
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    S, C, eps, stride_s,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_s < S)[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + offs_s[:, None] * stride_s + offs_c[None, :], mask=mask, other=0.0)  # [BLOCK_S, BLOCK_C]
    x = x.to(tl.float32)
    centred = tl.where(mask_c[None, :], x - (tl.sum(x, axis=1) / C)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + offs_s[:, None] * C + offs_c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


# ---- launch --------------------------------------------------------------------------------------------------------


@recorded("layer_norm", reference)
def launch(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    tokens = as_tokens("layer_norm", x)
    S, C = tokens.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = tuning.choose("layer_norm", launching.arch_of(x), C=C, dtype=x.dtype)
    launching.launch(
        _layer_norm_kernel,
        (triton.cdiv(S, config.constants["BLOCK_S"]),),
        dict(x_ptr=x, weight_ptr=weight, bias_ptr=bias, y_ptr=y, S=S, C=C, eps=eps, stride_s=tokens.stride(0)),
        dict(BLOCK_C=max(16, triton.next_power_of_2(C)), **config.constants),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y


def as_tokens(op: str, x: Tensor) -> Tensor:
    """[..., C] as [S, C], a view. Raises ValueError where only a copy has that shape."""
    axes = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    if any(outer != size * stride for (_, outer), (size, stride) in itertools.pairwise(axes)):
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)} and stride {tuple(x.stride())}; its tokens must be evenly spaced"
        )
    return x.view(-1, x.shape[-1])


# ---- op ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pylumiere::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last axis.

    Args:
        x: [..., C], the last axis contiguous and the tokens evenly spaced in memory.
        weight, bias: [C], contiguous.

    Returns:
        The shape and dtype of x, contiguous. Statistics in float32.

    Raises:
        ValueError: C > 8192 (a tile holds whole tokens), shapes, dtypes or strides that do not fit.
    """
    _check(x, weight, bias)
    return (launch if x.is_cuda else reference)(x, weight, bias, eps)


@layer_norm.register_fake
def _(x, weight, bias, eps=1e-5):
    _check(x, weight, bias)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(x, weight, bias) -> None:
    if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"layer_norm: x has dtype {x.dtype}; a floating dtype is needed")
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"layer_norm: x is empty, shape {tuple(x.shape)}")
    C = x.shape[-1]
    if C > MAX_CHANNELS:
        raise ValueError(f"layer_norm: x has C={C} channels, at most {MAX_CHANNELS} fit one tile")
    if x.stride(-1) != 1 and C > 1:
        raise ValueError(f"layer_norm: x has stride {tuple(x.stride())}; its last axis must be contiguous")
    as_tokens("layer_norm", x)
    for name, value in {"weight": weight, "bias": bias}.items():
        if tuple(value.shape) != (C,) or (value.stride(0) != 1 and C > 1):
            raise ValueError(f"layer_norm: {name} has shape {tuple(value.shape)}, expected contiguous {(C,)}")
        if value.device != x.device:
            raise ValueError(f"layer_norm: {name} is on {value.device}, x on {x.device}")


def cost(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Cost:
    return Cost(flops=8 * x.numel(), bytes=2 * (x.numel() + weight.numel()) * x.element_size())


def aot_cases(dtype: torch.dtype) -> list:
    """The levels of the public U-Nets, and the widest token."""

    def case(S: int, C: int):
        def run():
            weight = torch.empty(C, dtype=dtype, device="meta")
            launch(torch.empty(2, 16, S, C, dtype=dtype, device="meta"), weight, weight)

        return run

    sizes = ((64 * 64, 320), (32 * 32, 640), (16 * 16, 1280), (1, MAX_CHANNELS))
    return [(f"C{C}-S{S}", case(S, C)) for S, C in sizes]
