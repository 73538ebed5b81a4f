"""GEGLU: one half of the channels, gated by the GELU of the other.

    y[..., c] = x[..., c] * gelu(x[..., C + c])            gelu(g) = g * (1 + erf(g / sqrt(2))) / 2

Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6; Hendrycks & Gimpel 2016 for the exact GELU.
Bound by memory: x read once, y, half its size, written once.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from pylumiere.kernels import launching, tuning
from pylumiere.kernels.cost import Cost
from pylumiere.kernels.launching import recorded
from pylumiere.kernels.layer_norm import as_tokens
from torch import Tensor

# ---- reference -----------------------------------------------------------------------------------------------------


def reference(x: Tensor) -> Tensor:
    h, g = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return (h * F.gelu(g)).to(x.dtype).contiguous()


# ---- kernel --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("S",))
def _geglu_kernel(
    x_ptr, y_ptr,
    S, C, stride_s,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    offs_s = (pid // tiles_c).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_c = (pid % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_s < S)[:, None] & (offs_c < C)[None, :]
    address = x_ptr + offs_s[:, None] * stride_s + offs_c[None, :]
    h = tl.load(address, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_C]
    g = tl.load(address + C, mask=mask, other=0.0).to(tl.float32)
    y = h * (0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476)))
    tl.store(y_ptr + offs_s[:, None] * C + offs_c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


# ---- launch --------------------------------------------------------------------------------------------------------


@recorded("geglu", reference)
def launch(x: Tensor) -> Tensor:
    tokens = as_tokens("geglu", x)
    S, C = tokens.shape[0], tokens.shape[1] // 2
    y = torch.empty(*x.shape[:-1], C, dtype=x.dtype, device=x.device)
    config = tuning.choose("geglu", launching.arch_of(x), C=C, dtype=x.dtype)
    tiles = triton.cdiv(S, config.constants["BLOCK_S"]) * triton.cdiv(C, config.constants["BLOCK_C"])
    launching.launch(
        _geglu_kernel,
        (tiles,),
        dict(x_ptr=x, y_ptr=y, S=S, C=C, stride_s=tokens.stride(0)),
        config.constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y


# ---- op ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pylumiere::geglu", mutates_args=())
def geglu(x: Tensor) -> Tensor:
    """The first half of the channels times the GELU of the second, by the exact error function.

    Args:
        x: [..., 2*C], the last axis contiguous and the tokens evenly spaced in memory.

    Returns:
        [..., C], contiguous, dtype of x. Computed in float32.

    Raises:
        ValueError: an odd number of channels, dtypes or strides that do not fit.
    """
    _check(x)
    return (launch if x.is_cuda else reference)(x)


@geglu.register_fake
def _(x):
    _check(x)
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _check(x) -> None:
    if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"geglu: x has dtype {x.dtype}; a floating dtype is needed")
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"geglu: x is empty, shape {tuple(x.shape)}")
    if x.shape[-1] % 2:
        raise ValueError(f"geglu: x has {x.shape[-1]} channels, not two halves")
    if x.stride(-1) != 1:
        raise ValueError(f"geglu: x has stride {tuple(x.stride())}; its last axis must be contiguous")
    as_tokens("geglu", x)


def cost(x: Tensor) -> Cost:
    """The error function counts as ten operations."""
    return Cost(flops=14 * (x.numel() // 2), bytes=3 * (x.numel() // 2) * x.element_size())


def aot_cases(dtype: torch.dtype) -> list:
    """The feed-forward layers of the public U-Nets: four times the width of their levels."""

    def case(S: int, C: int):
        return f"C{C}-S{S}", lambda: launch(torch.empty(2, 16, S, 2 * C, dtype=dtype, device="meta"))

    return [case(64 * 64, 1280), case(16 * 16, 5120)]
