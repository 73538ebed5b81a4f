"""Convolution over frames at each pixel, with temporal stride and frame duplication folded into the loads.

    y[t] = sum_k weight[k] * in[t * stride + k - 1] + bias + residual       in[t] = silu(mul * x + add)[t // upsample]

Three taps, zeros beyond both ends. Identity weights make stride f the selection x[:, ::f] and upsample f the
duplication of frames: Lumiere's temporal resampling.

Source: Bar-Tal et al. 2024 (Lumiere), appendix B; Tran et al. 2018, R(2+1)D. Bound by arithmetic for wide C.
"""

import torch
import torch.nn.functional as F
from pylumiere.kernels.cost import Cost
from pylumiere.kernels.implicit_gemm import check_operands, convolve, out_size, pack_weight, prologue, traffic
from pylumiere.kernels.launching import recorded
from pylumiere.kernels.norm_affine import statistics_reference

Tensor = torch.Tensor
MAX_FACTOR = 8


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
    statistics: bool = False,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = prologue(x.to(dtype), mul, add, silu)
    if upsample > 1:
        y = y.repeat_interleave(upsample, 1)
    y = y.permute(0, 4, 1, 2, 3).flatten(3)  # [B, C, T, S]: a 2-D convolution with kernel (3, 1)
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(y, weight.to(dtype).unsqueeze(-1), bias, stride=(stride, 1), padding=(1, 0))
    y = y.permute(0, 2, 3, 1).unflatten(2, x.shape[2:4])
    y = (y if residual is None else y + residual.to(dtype)).to(x.dtype).contiguous()
    return y, statistics_reference(y.flatten(2, 3).flatten(0, 1)) if statistics else y.new_empty(0, dtype=dtype)


@recorded("temporal_conv", reference)
def launch(
    x, weight, bias=None, mul=None, add=None, residual=None, silu=False, stride=1, upsample=1,
    statistics=False, precision="ieee",
):  # fmt: skip
    """As `reference`; the weight must be packed (`pack_weight`)."""
    return convolve(
        "temporal_conv", x, weight, bias, mul, add, residual, silu=silu, kernel_t=3, stride_t=stride, up_t=upsample,
        statistics=statistics, precision=precision,
    )  # fmt: skip


@torch.library.custom_op("pylumiere::temporal_conv", mutates_args=())
def temporal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mul: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = False,
    stride: int = 1,
    upsample: int = 1,
    statistics: bool = False,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """A three-tap convolution over frames with fused prologue and epilogue.

    Args:
        x: [B, T, H, W, C]; any strides with the last axis contiguous.
        weight: [O, C, 3]. Fastest with C innermost in memory (`pack_weight`), else copied per call.
        bias: [O].
        mul, add: [B*T, C] float32: silu(mul * x + add) is convolved. The ends stay zero.
        residual: [B, T', H, W, O], added at the end.
        stride: 1 to 8; keeps every stride-th frame.
        upsample: 1 to 8; each frame is repeated before the convolution.
        statistics: also return the channel statistics of the result.
        precision: "ieee", or "tf32" for float32 on tensor cores with 10 bits.

    Returns:
        y [B, T', H, W, O] with T' = ceil(T * upsample / stride), contiguous, and its statistics [B*T', 2, O]
        (an empty tensor if not asked for). Sums in float32.

    Raises:
        ValueError: shapes, dtypes, devices, strides or choices that do not fit; the argument is named.
    """
    _check(x, weight, bias, mul, add, residual, stride, upsample, precision)
    run = launch if x.is_cuda else reference
    weight = pack_weight(weight) if x.is_cuda else weight
    return run(x, weight, bias, mul, add, residual, silu, stride, upsample, statistics, precision)


@temporal_conv.register_fake
def _(
    x, weight, bias=None, mul=None, add=None, residual=None, silu=False, stride=1, upsample=1,
    statistics=False, precision="ieee",
):  # fmt: skip
    shape = _check(x, weight, bias, mul, add, residual, stride, upsample, precision)
    rows = (shape[0] * shape[1], 2, weight.shape[0]) if statistics else (0,)
    return x.new_empty(shape), x.new_empty(rows, dtype=torch.promote_types(x.dtype, torch.float32))


def _check(x, weight, bias, mul, add, residual, stride, upsample, precision):
    if x.dim() != 5:
        raise ValueError(f"temporal_conv: x has shape {tuple(x.shape)}, expected [B, T, H, W, C]")
    if weight.dim() != 3 or weight.shape[2] != 3:
        raise ValueError(f"temporal_conv: weight has shape {tuple(weight.shape)}, expected [O, C, 3]")
    for name, value in {"stride": stride, "upsample": upsample}.items():
        if not 1 <= value <= MAX_FACTOR:
            raise ValueError(f"temporal_conv: {name}={value} is not in 1..{MAX_FACTOR}")
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"temporal_conv: precision={precision!r} is not 'ieee' or 'tf32'")
    shape = output_shape(x, weight, stride, upsample)
    check_operands("temporal_conv", x, weight, bias, mul, add, residual, shape)
    return shape


def output_shape(x: Tensor, weight: Tensor, stride: int = 1, upsample: int = 1) -> tuple[int, ...]:
    return (x.shape[0], out_size(x.shape[1], upsample, 3, stride), *x.shape[2:4], weight.shape[0])


def cost(x: Tensor, weight: Tensor, residual: Tensor | None = None, stride: int = 1, upsample: int = 1) -> Cost:
    return traffic(x, weight, output_shape(x, weight, stride, upsample), residual)


def aot_cases(dtype: torch.dtype) -> list:
    """The shapes and fusions that the networks use: name and a call on tensors without data."""

    def case(C, size, fused=True, **options):
        def run():
            x = torch.empty(1, 8, size, size, C, dtype=dtype, device="meta")
            weight, bias = pack_weight(x.new_empty(C, C, 3)), x.new_empty(C)
            if not fused:
                return launch(x, weight, bias, **options)
            mul, add = (torch.empty(8, C, dtype=torch.float32, device="meta") for _ in range(2))
            return launch(x, weight, bias, mul, add, None, True, statistics=True, **options)

        return f"C{C}-{size}x{size}" + "".join(f"-{n}{v}" for n, v in options.items()), run

    return [
        case(64, 64), case(320, 128), case(1280, 8),
        case(640, 64, fused=False, stride=2), case(640, 64, fused=False, upsample=2),
    ]  # fmt: skip
