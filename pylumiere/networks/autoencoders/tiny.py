"""A small distilled autoencoder (TAESD): 3 x 3 convolutions and ReLU, no norm and no attention.

Source: madebyollin/taesd; parameter names and arithmetic are those of diffusers' AutoencoderTiny.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylumiere.config import AutoencoderTinyConfig
from pylumiere.networks.autoencoders.base import Autoencoder
from pylumiere.networks.ops import PlainOps

LATENT_RANGE = 3.0  # the decoder bends its latents into -3..3


class Conv(nn.Conv2d):
    """3 x 3; with `upsample` on the nearest neighbours of half the height and width."""

    def __init__(self, in_channels: int, channels: int, *, bias: bool = True, stride: int = 1, upsample: bool = False):
        super().__init__(in_channels, channels, 3, stride, bias=bias)
        self.upsample = upsample

    def forward(self, x: Tensor, ops: PlainOps, residual: Tensor | None = None) -> Tensor:
        return ops.spatial_conv(
            x, self.weight, self.bias, stride=self.stride[0], upsample=self.upsample, residual=residual
        )


class Block(nn.Module):
    """relu(x + conv(relu(conv(relu(conv(x))))))."""

    def __init__(self, channels: int):
        super().__init__()
        first, second, third = (Conv(channels, channels) for _ in range(3))
        self.conv = _numbered([first, None, second, None, third])

    def forward(self, x: Tensor, ops: PlainOps) -> Tensor:
        first, second, third = self.conv.values()
        h = F.relu(second(F.relu(first(x, ops)), ops))
        return F.relu(third(h, ops, residual=x))


class Encoder(nn.Module):
    """[B, T, H, W, out_channels] in -1..1 -> [B, T, h, w, latent_channels]."""

    def __init__(self, config: AutoencoderTinyConfig):
        super().__init__()
        width = config.encoder_block_out_channels[0]
        self.layers = nn.ModuleList()
        for i, num_blocks in enumerate(config.num_encoder_blocks):
            first = Conv(config.out_channels, width) if i == 0 else Conv(width, width, stride=2, bias=False)
            self.layers.extend([first, *(Block(width) for _ in range(num_blocks))])
        self.layers.append(Conv(width, config.latent_channels))

    def forward(self, x: Tensor, ops: PlainOps) -> Tensor:
        x = (x + 1) / 2  # the layers know pictures in 0..1
        for layer in self.layers:
            x = layer(x, ops)
        return x


class Decoder(nn.Module):
    """[B, T, h, w, latent_channels] -> [B, T, H, W, out_channels]."""

    def __init__(self, config: AutoencoderTinyConfig):
        super().__init__()
        width, levels = config.decoder_block_out_channels[0], len(config.num_decoder_blocks)
        layers = [Conv(config.latent_channels, width), None]
        for i, num_blocks in enumerate(config.num_decoder_blocks):
            layers += [Block(width) for _ in range(num_blocks)]
            if i + 1 < levels:
                layers += [None, Conv(width, width, bias=False, upsample=True)]
        self.layers = _numbered([*layers, Conv(width, config.out_channels)])

    def forward(self, x: Tensor, ops: PlainOps) -> Tensor:
        first, *others = self.layers.values()
        x = F.relu(first(torch.tanh(x / LATENT_RANGE) * LATENT_RANGE, ops))
        for layer in others:
            x = layer(x, ops)
        return x * 2 - 1


def _numbered(layers: list[nn.Module | None]) -> nn.ModuleDict:
    """Layers by their place in the published list; None is one without parameters (ReLU, upsampling)."""
    return nn.ModuleDict({str(i): layer for i, layer in enumerate(layers) if layer is not None})


class AutoencoderTiny(Autoencoder):
    """Latents without a variance; `encode` reads no noise."""

    def __init__(self, config: AutoencoderTinyConfig):
        super().__init__(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def _to_frames(self, z: Tensor) -> Tensor:
        return self.decoder(z, self.ops)

    def _to_latents(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        return self.encoder(frames, self.ops)
