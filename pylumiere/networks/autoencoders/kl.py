"""Stable Diffusion's autoencoder: residual blocks on levels of halved height and width, attention on the coarsest.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models"; parameter names and
arithmetic are those of diffusers' AutoencoderKL.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylumiere.config import AutoencoderKLConfig
from pylumiere.networks.autoencoders.base import Autoencoder
from pylumiere.networks.ops import Norm, PlainOps

LOGVAR_RANGE = (-30.0, 20.0)


class GroupNorm(nn.GroupNorm):
    def __init__(self, num_groups: int, channels: int):
        super().__init__(num_groups, channels, eps=1e-6)

    @property
    def spec(self) -> Norm:
        return Norm(self.weight, self.bias, self.num_groups, self.eps)


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv; plus the input."""

    def __init__(self, in_channels: int, channels: int, num_groups: int):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(num_groups, in_channels), nn.Conv2d(in_channels, channels, 3)
        self.norm2, self.conv2 = GroupNorm(num_groups, channels), nn.Conv2d(channels, channels, 3)
        self.conv_shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else None

    def forward(self, x: Tensor, ops: PlainOps) -> Tensor:
        skip = x
        if self.conv_shortcut is not None:
            skip = ops.spatial_conv(x, self.conv_shortcut.weight, self.conv_shortcut.bias)
        h = ops.spatial_conv(x, self.conv1.weight, self.conv1.bias, norm=self.norm1.spec, silu=True)
        return ops.spatial_conv(h, self.conv2.weight, self.conv2.bias, norm=self.norm2.spec, silu=True, residual=skip)


class Attention(nn.Module):
    """Attention of a frame's pixels to each other, with one head; plus the input."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.group_norm = GroupNorm(num_groups, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, ops: PlainOps) -> Tensor:
        y = ops.activate(x, self.group_norm.spec, None, None, False).flatten(2, 3).flatten(0, 1)  # [B*T, H*W, C]
        q, k, v = (ops.matmul(y, layer.weight, layer.bias) for layer in (self.to_q, self.to_k, self.to_v))
        h = ops.attention(q, k, v, num_heads=1).view(x.shape)
        return ops.linear(h, self.to_out[0].weight, self.to_out[0].bias, residual=x)


class MidBlock(nn.Module):
    def __init__(self, channels: int, num_groups: int, add_attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, num_groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, num_groups)] if add_attention else [])

    def forward(self, x: Tensor, ops: PlainOps) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x, ops)
        return x


class Downsample(nn.Module):
    """A convolution with stride 2 that pads below and to the right only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3)

    def forward(self, x: Tensor, ops: PlainOps) -> Tensor:
        # The operator pads all around. A row of zeros above and a column on the left move its grid to the published
        # one; what stands before that grid is cut off. So the weight stays as it is, and backends prepare it once.
        x = F.pad(x, (0, 0, 1, 0, 1, 0))
        return ops.spatial_conv(x, self.conv.weight, self.conv.bias, stride=2)[:, :, 1:, 1:].contiguous()


class Upsample(nn.Module):
    """Nearest neighbours, and a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3)

    def forward(self, x: Tensor, ops: PlainOps) -> Tensor:
        return ops.spatial_conv(x, self.conv.weight, self.conv.bias, upsample=True)


class Level(nn.Module):
    """Residual blocks, then, on all levels but the last, half or twice the height and width."""

    def __init__(
        self, in_channels: int, channels: int, num_layers: int, num_groups: int, *, down: bool = False, up: bool = False
    ):
        super().__init__()
        widths = [in_channels, *[channels] * num_layers]
        self.resnets = nn.ModuleList(ResnetBlock(a, b, num_groups) for a, b in itertools.pairwise(widths))
        self.downsamplers = nn.ModuleList([Downsample(channels)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(channels)] if up else [])

    def forward(self, x: Tensor, ops: PlainOps) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x, ops)
        return x


class Encoder(nn.Module):
    """[B, T, H, W, out_channels] -> [B, T, h, w, 2*latent_channels]: mean and log variance."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.out_channels, widths[0], 3)
        self.down_blocks = nn.ModuleList(
            Level(before, width, config.layers_per_block, groups, down=i + 1 < len(widths))
            for i, (before, width) in enumerate(itertools.pairwise((widths[0], *widths)))
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3)

    def forward(self, x: Tensor, ops: PlainOps) -> Tensor:
        x = ops.spatial_conv(x, self.conv_in.weight, self.conv_in.bias)
        for layer in (*self.down_blocks, self.mid_block):
            x = layer(x, ops)
        return ops.spatial_conv(x, self.conv_out.weight, self.conv_out.bias, norm=self.conv_norm_out.spec, silu=True)


class Decoder(nn.Module):
    """[B, T, h, w, latent_channels] -> [B, T, H, W, out_channels]."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            Level(before, width, config.layers_per_block + 1, groups, up=i + 1 < len(widths))
            for i, (before, width) in enumerate(itertools.pairwise((widths[0], *widths)))
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3)

    def forward(self, x: Tensor, ops: PlainOps) -> Tensor:
        x = ops.spatial_conv(x, self.conv_in.weight, self.conv_in.bias)
        for layer in (self.mid_block, *self.up_blocks):
            x = layer(x, ops)
        return ops.spatial_conv(x, self.conv_out.weight, self.conv_out.bias, norm=self.conv_norm_out.spec, silu=True)


class AutoencoderKL(Autoencoder):
    """Latents with a mean and a variance; `encode` gives the mean, or a sample if it is given noise."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__(config)
        channels = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None

    def _to_frames(self, z: Tensor) -> Tensor:
        if self.post_quant_conv is not None:
            z = self.ops.spatial_conv(z, self.post_quant_conv.weight, self.post_quant_conv.bias)
        return self.decoder(z, self.ops)

    def _to_latents(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        moments = self.encoder(frames, self.ops)
        if self.quant_conv is not None:
            moments = self.ops.spatial_conv(moments, self.quant_conv.weight, self.quant_conv.bias)
        mean, logvar = moments.chunk(2, -1)
        if noise is None:
            return mean
        std = torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE))
        return mean + std * noise.to(std.dtype)
