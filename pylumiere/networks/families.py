"""The families of networks: what the rest of the package asks of them, and where each one lives.

A family is its configuration (`pylumiere.config`) and one class here. Backends, memory planning, adapters and the
exporter ask the family; none of them knows a network's class. Modules are imported when a network is built.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from pylumiere.config import DecodingConfig, NetworkConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

AnyConfig = NetworkConfig | DecodingConfig


@dataclass(frozen=True)
class Port:
    """An input or output of a network.

    Attributes:
        dtype: "fp32" or "bool".
        axes: names of dynamic axes (B batch, T frames, H, W), multiples of them ("8*H"), or fixed sizes.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else _length(axis, sizes) for axis in self.axes)

    def fixed(self, sizes: dict[str, int]) -> Port:
        """The same port with the axes that `sizes` names as numbers."""

        def fix(axis: str | int) -> str | int:
            return axis if isinstance(axis, int) or _name(axis) not in sizes else _length(axis, sizes)

        return replace(self, axes=tuple(map(fix, self.axes)))


def _name(axis: str) -> str:
    return axis.rpartition("*")[2]


def _length(axis: str, sizes: dict[str, int]) -> int:
    factor, _, name = axis.rpartition("*")
    return int(factor or 1) * sizes[name]


@dataclass(frozen=True)
class Ports:
    """What a network's `forward` takes, in order and by name, and what it gives."""

    inputs: tuple[Port, ...]
    output: Port

    def operands(self, sizes: dict[str, int], device: str = "meta") -> dict[str, torch.Tensor]:
        """Uninitialised inputs of these sizes; masks are all True."""
        import torch

        return {
            port.name: torch.ones(port.shape(sizes), dtype=torch.bool, device=device)
            if port.dtype == "bool"
            else torch.empty(port.shape(sizes), device=device)
            for port in self.inputs
        }


class Family(Protocol):
    """What is asked of a family. Implementations hold no state."""

    name: str

    def build(self, config: AnyConfig) -> nn.Module:
        """The network on the current default device, with an attribute `ops` (`networks.ops.PlainOps`) that a backend
        may replace. Parameter names are those of the family's public layout."""
        ...

    def ports(self, config: AnyConfig, text_tokens: int) -> Ports:
        """The inputs and the output of the network's `forward`."""
        ...

    def is_temporal(self, config: AnyConfig, parameter: str) -> bool:
        """Whether a parameter belongs to layers that see more than one frame."""
        ...


_HOMES = {
    "autoencoder_kl": "pylumiere.networks.autoencoders.family:AutoencoderKLFamily",
    "autoencoder_tiny": "pylumiere.networks.autoencoders.family:AutoencoderTinyFamily",
    "stunet": "pylumiere.networks.stunet.family:STUNetFamily",
    "unet2d": "pylumiere.networks.unet.family:UNet2DFamily",
}
_families: dict[str, Family] = {}


def family_of(config: AnyConfig) -> Family:
    """The family of a network's configuration."""
    name = config.family
    if name not in _families:
        module, _, attribute = _HOMES[name].partition(":")
        _families[name] = getattr(importlib.import_module(module), attribute)()
    return _families[name]


def register_family(family: Family) -> None:
    """Adds a family of another package. Its configuration is made known by `pylumiere.config.register_config`."""
    _families[family.name] = family


def build_network(config: AnyConfig, weights: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """A network in eval mode that holds the given tensors themselves; nothing is initialised or copied. Without weights
    its parameters are on the meta device: shapes and no memory."""
    import torch

    with torch.device("meta"):
        network = family_of(config).build(config)
    if weights is not None:
        network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def computing_dtype(config: AnyConfig, dtype: torch.dtype) -> torch.dtype:
    """What a network computes in, where an engine's other networks compute in `dtype`."""
    import torch

    return torch.float32 if getattr(config, "force_upcast", False) else dtype


def expected_shapes(config: AnyConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a network, without allocating it."""
    return {name: tuple(tensor.shape) for name, tensor in build_network(config).state_dict().items()}


def denoiser_ports(config: NetworkConfig, text_tokens: int) -> Ports:
    """What every denoising network takes, as far as its configuration asks for it."""
    inputs = [Port("sample", "fp32", ("B", "T", "H", "W", config.in_channels)), Port("timesteps", "fp32", ("B",))]
    if config.text_dim:
        inputs.append(Port("text", "fp32", ("B", text_tokens, config.text_dim)))
        if config.masks_text:
            inputs.append(Port("text_mask", "bool", ("B", text_tokens)))
    if config.noise_level:
        inputs.append(Port("noise_level", "fp32", ("B",)))
    return Ports(tuple(inputs), Port("prediction", "fp32", ("B", "T", "H", "W", config.out_channels)))


def decoder_ports(config: DecodingConfig) -> Ports:
    """What every decoder takes and gives."""
    height, width = (axis if config.scale == 1 else f"{config.scale}*{axis}" for axis in "HW")
    latents = Port("latents", "fp32", ("B", "T", "H", "W", config.latent_channels))
    return Ports((latents,), Port("frames", "fp32", ("B", "T", height, width, config.out_channels)))
