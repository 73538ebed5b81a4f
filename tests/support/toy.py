"""Models of a few thousand weights beyond the preset "tiny": one whose stage makes latents, and one of three stages.

Importing this makes the family "toy_decoder" known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from pylumiere.config import (
    DecoderConfig,
    DecodingConfig,
    ModelConfig,
    SamplerConfig,
    WindowConfig,
    register_config,
)
from pylumiere.networks.families import Ports, decoder_ports, register_family
from pylumiere.networks.ops import PlainOps
from pylumiere.networks.stunet.presets import stage_preset

LATENTS = 4  # channels


@register_config
@dataclass(frozen=True)
class ToyDecoderConfig(DecodingConfig):
    """A decoder that mixes the channels of each latent into a colour and repeats it `scale` times to both sides."""

    family: ClassVar[str] = "toy_decoder"

    latent_channels: int = LATENTS
    scale: int = 2


class ToyDecoder(nn.Module):
    """[B, T, h, w, latent_channels] -> [B, T, h*scale, w*scale, 3] in -1..1."""

    def __init__(self, config: ToyDecoderConfig):
        super().__init__()
        self.config, self.ops = config, PlainOps()
        self.mix = nn.Parameter(torch.empty(config.latent_channels, config.out_channels))

    def forward(self, latents: Tensor) -> Tensor:
        colours = torch.tanh(latents.to(self.mix.dtype) @ self.mix).to(latents.dtype)
        scale = self.config.scale
        return colours.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


class ToyDecoderFamily:
    """See `pylumiere.networks.families.Family`."""

    name = "toy_decoder"

    def build(self, config: ToyDecoderConfig) -> ToyDecoder:
        return ToyDecoder(config)

    def ports(self, config: ToyDecoderConfig, text_tokens: int) -> Ports:
        return decoder_ports(config)

    def is_temporal(self, config: ToyDecoderConfig, parameter: str) -> bool:
        return False


register_family(ToyDecoderFamily())


def latent_model(group_frames: int = 2, **fields) -> ModelConfig:
    """Clips of 8 frames of 32 x 32 from latents of 16 x 16 x 4. The stage is given nothing beside its noise.

    Args:
        fields: replaced in the only stage.
    """
    stage = stage_preset("tiny-base")
    network = replace(stage.network, in_channels=LATENTS, out_channels=LATENTS)
    schedule = replace(stage.schedule, clip=None)
    stage = replace(stage, name="latents", network=network, schedule=schedule, **fields)
    decoder = DecoderConfig(ToyDecoderConfig(), group_frames=group_frames)
    return ModelConfig("latent", (stage,), decoder, text_encoder="hash", text_tokens=8)


def three_stages(*, reads_text: bool = False) -> ModelConfig:
    """Clips of 8 frames of 64 x 64: 16 x 16, enlarged twice. The middle stage takes a clip of 8 frames at once and the
    last one works in windows of 4.

    Args:
        reads_text: the middle stage is guided by the prompt, too; such a model cannot enlarge a video alone.
    """
    base, ssr = stage_preset("tiny-base"), stage_preset("tiny-ssr")
    sampling = SamplerConfig("ddim", 2, 1.0)
    middle = replace(
        ssr, name="middle", network=replace(ssr.network, num_frames=8), sampling=sampling, windows=None,
        augmentation=0.2,
    )  # fmt: skip
    if reads_text:
        levels = tuple(replace(level, cross_attention=level is middle.network.levels[-1])
                       for level in middle.network.levels)  # fmt: skip
        middle = replace(
            middle,
            network=replace(middle.network, levels=levels, text_dim=base.network.text_dim),
            sampling=replace(sampling, guidance_scale=1.5),
        )
    last = replace(ssr, name="last", network=replace(ssr.network, height=64, width=64), augmentation=0.1,
                   windows=WindowConfig(4, overlap=1, weights="gaussian"))  # fmt: skip
    return ModelConfig("three", (base, middle, last), text_encoder="hash", text_tokens=8)
