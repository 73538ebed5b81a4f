"""The operations of the networks by the Triton kernels, and the one place where a network changes its backend.

A GroupNorm, with a row bias before it, becomes one multiply and one add per (frame, channel) inside the convolution
that follows it. Its statistics come from the epilogue of the kernel that wrote the tensor, or from one pass over it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pylumiere.backends.torch import TorchBackend
from pylumiere.config import NetworkConfig
from pylumiere.errors import UnsupportedDevice
from pylumiere.kernels import (
    geglu,
    groupnorm_silu,
    launching,
    layer_norm,
    norm_affine,
    spatial_conv,
    temporal_attention,
    temporal_conv,
)
from pylumiere.kernels.implicit_gemm import pack_weight
from pylumiere.networks.families import AnyConfig, build_network, computing_dtype, family_of
from pylumiere.networks.ops import Norm, PlainOps, Shift
from pylumiere.networks.stunet.presets import stage_preset
from pylumiere.networks.unet import presets as unet


class TritonOps(PlainOps):
    """The methods of `PlainOps` by fused kernels. Attention within frames and to the text stays PyTorch's.

    Args:
        precision: of float32 products: "ieee", or "tf32" for tensor cores with 10 bits.
    """

    name = "triton"

    def __init__(self, precision: str = "ieee"):
        if precision not in ("ieee", "tf32"):
            raise ValueError(f"precision={precision!r} is not 'ieee' or 'tf32'")
        self.precision = precision

    def activate(
        self,
        x: Tensor,
        norm: Norm | None,
        scale: Tensor | None,
        shift: Tensor | None,
        silu: bool,
        *,
        row_bias: Tensor | None = None,
    ) -> Tensor:
        """For what no operation of ours follows; the others fold it into their loads."""
        if row_bias is not None:
            x = x + row_bias[:, :, None, None]
        if norm is None:
            return super().activate(x, None, scale, shift, silu)
        y = _call(groupnorm_silu, "groupnorm_silu")(
            x.flatten(2, 3), norm.weight, norm.bias, norm.num_groups, norm.eps, "clip" if norm.over_frames else "frame",
            scale, shift, silu, getattr(x, "channel_statistics", None),
        )  # fmt: skip
        return y.view(x.shape)

    def spatial_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        norm: Norm | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        silu: bool = False,
        row_bias: Tensor | None = None,
        temporal_shift: Shift | None = None,
        stride: int = 1,
        upsample: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        mul, add = self._affine(x, norm, scale, shift, row_bias)
        fold_next, fold_prev = _folds(temporal_shift, x.shape[-1])
        y, statistics = _call(spatial_conv, "spatial_conv")(
            x, pack_weight(weight), bias, mul, add, residual, silu, stride, 2 if upsample else 1, fold_next, fold_prev,
            temporal_shift.pad if temporal_shift else "zero", True, self.precision,
        )  # fmt: skip
        return _with_statistics(y, statistics)

    def temporal_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        norm: Norm | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        silu: bool = False,
        row_bias: Tensor | None = None,
        stride: int = 1,
        upsample: int = 1,
        residual: Tensor | None = None,
    ) -> Tensor:
        mul, add = self._affine(x, norm, scale, shift, row_bias)
        y, _ = _call(temporal_conv, "temporal_conv")(
            x, pack_weight(weight), bias, mul, add, residual, silu, stride, upsample, False, self.precision
        )
        return y

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        norm: Norm | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        silu: bool = False,
        row_bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        mul, add = self._affine(x, norm, scale, shift, row_bias)
        ends_branch = residual is not None  # what follows is a norm
        y, statistics = _call(spatial_conv, "spatial_conv")(
            x, weight[:, :, None, None], bias, mul, add, residual, silu, 1, 1, 0, 0, "zero", ends_branch, self.precision
        )
        return _with_statistics(y, statistics) if ends_branch else y

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        return _call(layer_norm, "layer_norm")(x, weight, bias, eps)

    def geglu(self, x: Tensor) -> Tensor:
        return _call(geglu, "geglu")(x)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
        return _attention(q, k, v, num_heads, mask)

    def temporal_attention(self, qkv: Tensor, num_heads: int) -> Tensor:
        return _call(temporal_attention, "temporal_attention")(qkv, num_heads)

    def _affine(
        self, x: Tensor, norm: Norm | None, scale: Tensor | None, shift: Tensor | None, row_bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Row bias, GroupNorm, scale and shift as `mul * x + add`; None, None without a norm or a row bias."""
        if norm is None:
            if scale is not None:
                raise ValueError("scale and shift need a norm before them")
            if row_bias is None:
                return None, None
            add = row_bias.to(torch.promote_types(x.dtype, torch.float32))
            add = add.expand(-1, x.shape[1], -1).flatten(0, 1).contiguous()  # [B*T, C]
            return torch.ones_like(add), add
        frames = x.flatten(2, 3).flatten(0, 1)  # [B*T, S, C]
        statistics = getattr(x, "channel_statistics", None)
        if statistics is None:
            statistics = _call(norm_affine, "channel_statistics", "launch_statistics")(frames)
        return _call(norm_affine, "norm_affine")(
            statistics, frames.shape[1], norm.weight, norm.bias, norm.num_groups, norm.eps, scale, shift, row_bias,
            x.shape[1] if norm.over_frames else 1,
        )  # fmt: skip


class TritonBackend(TorchBackend):
    """The networks of a checkpoint on one GPU, by the Triton kernels."""

    name = "triton"

    def _ops(self) -> TritonOps:
        return TritonOps()


@launching.recorded("attention", PlainOps().attention)
def _attention(q, k, v, num_heads, mask):
    """PyTorch's own attention: one call without launches in a recording, instead of its parts."""
    return PlainOps().attention(q, k, v, num_heads, mask)


def _call(module, op: str, launch: str = "launch"):
    """The operator; or its launch where kernels run by name: in a recording and under the interpreter."""
    return getattr(module, launch if launching.is_recording() or launching.interpreted() else op)


def _with_statistics(y: Tensor, statistics: Tensor) -> Tensor:
    y.channel_statistics = statistics  # travels with the tensor object; views do not have it
    return y


def _folds(shift: Shift | None, channels: int) -> tuple[int, int]:
    if shift is None:
        return 0, 0
    fold = channels // shift.div
    return (0, fold) if shift.direction == "causal" else (fold, fold)


def record_network(
    config: AnyConfig,
    arch: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    batch: int = 1,
    text_tokens: int = 77,
    sizes: Mapping[str, int] | None = None,
) -> launching.Recording:
    """A call of a network as a flat list of launches, for compute capability `arch`: no weights, no data, no GPU. Of a
    decoder, the decoding of latents.

    The recording's inputs are named as the network's ports, its weights as in its state dict.

    Args:
        sizes: T, H and W of the first input; None: what the network is made for. A decoder is made for no size.

    Raises:
        ValueError: a decoder without sizes.
    """
    if sizes is None:
        if not isinstance(config, NetworkConfig):
            raise ValueError(f"{config.family} is made for no size: sizes must give T, H and W of its latents")
        sizes = {"T": config.num_frames, "H": config.height, "W": config.width}
    model = set_backend(build_network(config).to(dtype), "triton")
    values = family_of(config).ports(config, text_tokens).operands({**sizes, "B": batch})
    with launching.record(arch) as recording:
        recording.name_tensors(model.state_dict(), "weight")
        recording.name_tensors(values, "input")
        recording.mark_outputs(model(**values))
    return recording


def record_preset(name: str, arch: int, dtype: torch.dtype = torch.bfloat16) -> launching.Recording:
    """`record_network` of a network by name: of one that `stage_preset` knows, such as "stunet-l", or of a public
    model's U-Net, "sd-1.5" or "sd-2.1", or of its decoder, "sd-1.5-decoder", for one frame."""
    model = name.removesuffix("-decoder")
    if model not in unet.MODELS:
        return record_network(stage_preset(name).network, arch, dtype)
    config = unet.model_preset(model)
    first = config.first.network
    if name == model:
        return record_network(first, arch, dtype)
    decoder = config.decoder.network
    sizes = {"T": 1, "H": first.height, "W": first.width}
    return record_network(decoder, arch, computing_dtype(decoder, dtype), sizes=sizes)


# ---- the switch ----------------------------------------------------------------------------------------------------


def set_backend(model: torch.nn.Module, backend: str, *, precision: str = "ieee") -> torch.nn.Module:
    """Make a network run on "torch" (plain PyTorch) or on "triton". Returns it.

    `model` is what a family builds: a module whose attribute `ops` holds its operations.

    For "triton" convolution weights are laid out with the input channels innermost, in place; their values, and what
    the plain path computes from them, stay the same.

    Raises:
        ValueError: an unknown backend.
        UnsupportedDevice: "triton" for a model that is not on a GPU, without the interpreter.
    """
    if backend == "torch":
        model.ops = PlainOps()
        return model
    if backend != "triton":
        raise ValueError(f"backend={backend!r} is not 'torch' or 'triton'")
    parameter = next(model.parameters())
    if not (parameter.is_cuda or parameter.is_meta or launching.interpreted()):
        raise UnsupportedDevice(
            f"the Triton backend needs a GPU, the model is on {parameter.device}; move it there, or use backend='torch'"
        )
    for parameter in model.parameters():
        if parameter.dim() in (3, 4):
            parameter.data = pack_weight(parameter.data)
    model.ops = TritonOps(precision)
    return model
