"""The typed blocks of a STUNet. Each takes `[B, T, H, W, C]` and the context of the level it stands on.

Sources: Bar-Tal et al. 2024 (Lumiere), section 3.1 and appendix B: inflation blocks end in a projection that starts at
zero, temporal resampling starts as nearest neighbour. Lin et al. 2019 for the temporal shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pylumiere.networks.ops import Norm, PlainOps, Shift


@dataclass
class Context:
    """What a block may look at besides its input.

    Attributes:
        ops: the backend.
        emb: [B, 1 or T, D] conditioning of each frame at this level, after SiLU.
        text: [B, L, D_text] or None; text_mask: [B, L] bool.
        frame_times: [T] time of this level's frames, in frames of the whole clip.
    """

    ops: PlainOps
    emb: Tensor
    text: Tensor | None
    text_mask: Tensor | None
    frame_times: Tensor


def sinusoid(values: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal features of `values`, appended as a last axis of size dim (even), in float32."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) / half * torch.arange(half, device=values.device, dtype=torch.float32))
    angles = values.float()[..., None] * freqs
    return torch.cat([angles.cos(), angles.sin()], -1)


class GroupNorm(nn.Module):
    def __init__(self, channels: int, num_groups: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.num_groups, self.eps = num_groups, eps

    @property
    def spec(self) -> Norm:
        return Norm(self.weight, self.bias, self.num_groups, self.eps)


class Conv2d(nn.Module):
    """Weight [O, C, k, k] and bias; applied by the backend."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, zero: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        bound = 1 / math.sqrt(in_channels * kernel * kernel)
        nn.init.zeros_(self.weight) if zero else nn.init.uniform_(self.weight, -bound * 3**0.5, bound * 3**0.5)


class TemporalConv(nn.Module):
    """Weight [O, C, 3] and bias. `identity` starts it as the frame itself."""

    def __init__(self, in_channels: int, out_channels: int, identity: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        bound = (1 / (in_channels * 3)) ** 0.5 * 3**0.5
        nn.init.dirac_(self.weight) if identity else nn.init.uniform_(self.weight, -bound, bound)


def _zero_linear(inp: int, out: int) -> nn.Linear:
    layer = nn.Linear(inp, out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResnetBlock(nn.Module):
    """norm, SiLU, [temporal shift], conv, norm with scale and shift of the conditioning, SiLU, conv; plus the input."""

    def __init__(self, in_channels: int, channels: int, emb_dim: int, num_groups: int, shift: Shift | None = None):
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(in_channels, num_groups), GroupNorm(channels, num_groups)
        self.conv1, self.conv2 = Conv2d(in_channels, channels, 3), Conv2d(channels, channels, 3, zero=True)
        self.modulation = _zero_linear(emb_dim, 2 * channels)
        self.shortcut = nn.Linear(in_channels, channels) if in_channels != channels else None
        self.temporal_shift = shift

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        scale, shift = ctx.ops.matmul(ctx.emb, self.modulation.weight, self.modulation.bias).chunk(2, -1)
        skip = x if self.shortcut is None else ctx.ops.linear(x, self.shortcut.weight, self.shortcut.bias)
        h = ctx.ops.spatial_conv(
            x, self.conv1.weight, self.conv1.bias, norm=self.norm1.spec, silu=True, temporal_shift=self.temporal_shift
        )
        return ctx.ops.spatial_conv(
            h,
            self.conv2.weight,
            self.conv2.bias,
            norm=self.norm2.spec,
            scale=scale,
            shift=shift,
            silu=True,
            residual=skip,
        )


class SpatialTransformer(nn.Module):
    """Within each frame: self-attention, attention to the text, feed-forward. Positions are 2-D sinusoids in -1..1."""

    def __init__(
        self,
        channels: int,
        emb_dim: int,
        num_groups: int,
        head_dim: int,
        text_dim: int,
        self_attention: bool,
        cross_attention: bool,
    ):
        super().__init__()
        self.num_heads = channels // head_dim
        self.position = nn.Linear(32, channels)
        if self_attention:
            self.norm1, self.qkv, self.out1 = (
                GroupNorm(channels, num_groups),
                nn.Linear(channels, 3 * channels),
                _zero_linear(channels, channels),
            )
        if cross_attention:
            self.norm2, self.query = GroupNorm(channels, num_groups), nn.Linear(channels, channels)
            self.key_value, self.out2 = nn.Linear(text_dim, 2 * channels), _zero_linear(channels, channels)
        self.norm3, self.modulation = GroupNorm(channels, num_groups), _zero_linear(emb_dim, 2 * channels)
        self.up, self.down = nn.Linear(channels, 2 * channels), _zero_linear(2 * channels, channels)
        self.has_self, self.has_cross = self_attention, cross_attention

    def _positions(self, x: Tensor) -> Tensor:
        def axis(size: int) -> Tensor:
            points = (torch.arange(size, device=x.device, dtype=torch.float32) * 2 + 1 - size) / size
            return sinusoid(points * 8, 16, 64.0)

        height, width = x.shape[2:4]
        rows, columns = axis(height)[:, None].expand(height, width, 16), axis(width)[None].expand(height, width, 16)
        return torch.cat([rows, columns], -1).to(x.dtype)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        batch, frames, height, width, channels = x.shape
        x = x + self.position(self._positions(x))
        if self.has_self:
            qkv = ctx.ops.linear(x, self.qkv.weight, self.qkv.bias, norm=self.norm1.spec).view(
                batch * frames, height * width, 3 * channels
            )
            h = ctx.ops.attention(*qkv.chunk(3, -1), self.num_heads).view(x.shape)
            x = ctx.ops.linear(h, self.out1.weight, self.out1.bias, residual=x)
        if self.has_cross:
            q = ctx.ops.linear(x, self.query.weight, self.query.bias, norm=self.norm2.spec).view(batch, -1, channels)
            k, v = ctx.ops.matmul(ctx.text, self.key_value.weight, self.key_value.bias).chunk(2, -1)
            h = ctx.ops.attention(q, k, v, self.num_heads, ctx.text_mask).view(x.shape)
            x = ctx.ops.linear(h, self.out2.weight, self.out2.bias, residual=x)
        scale, shift = ctx.ops.matmul(ctx.emb, self.modulation.weight, self.modulation.bias).chunk(2, -1)
        h = ctx.ops.linear(x, self.up.weight, self.up.bias, norm=self.norm3.spec, scale=scale, shift=shift)
        return ctx.ops.linear(h, self.down.weight, self.down.bias, silu=True, residual=x)


class ConvolutionInflationBlock(nn.Module):
    """Factorised (2+1)D convolution: 3 x 3 in space, 3 in time, a projection that starts at zero, plus the input."""

    def __init__(self, channels: int, emb_dim: int, num_groups: int):
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(channels, num_groups), GroupNorm(channels, num_groups)
        self.spatial, self.temporal = Conv2d(channels, channels, 3), TemporalConv(channels, channels)
        self.modulation = _zero_linear(emb_dim, 2 * channels)
        self.proj = _zero_linear(channels, channels)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        scale, shift = ctx.ops.matmul(ctx.emb, self.modulation.weight, self.modulation.bias).chunk(2, -1)
        h = ctx.ops.spatial_conv(x, self.spatial.weight, self.spatial.bias, norm=self.norm1.spec, silu=True)
        h = ctx.ops.temporal_conv(
            h, self.temporal.weight, self.temporal.bias, norm=self.norm2.spec, scale=scale, shift=shift, silu=True
        )
        return ctx.ops.linear(h, self.proj.weight, self.proj.bias, residual=x)


class AttentionInflationBlock(nn.Module):
    """`depth` blocks of attention over frames at absolute times, a projection that starts at zero, plus the input."""

    def __init__(self, channels: int, emb_dim: int, num_groups: int, head_dim: int, depth: int):
        super().__init__()
        self.num_heads, self.depth = channels // head_dim, depth
        self.position = nn.Linear(64, channels)
        for i in range(depth):
            layer = nn.Module()
            layer.norm1, layer.qkv, layer.out = (
                GroupNorm(channels, num_groups),
                nn.Linear(channels, 3 * channels),
                nn.Linear(channels, channels),
            )
            layer.norm2, layer.modulation = GroupNorm(channels, num_groups), _zero_linear(emb_dim, 2 * channels)
            layer.up, layer.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
            self.add_module(str(i), layer)
        self.proj = _zero_linear(channels, channels)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        positions = self.position(sinusoid(ctx.frame_times, 64, 400.0).to(x.dtype))  # [T, C]
        h = x + positions[:, None, None]
        for i in range(self.depth):
            layer = getattr(self, str(i))
            qkv = ctx.ops.linear(h, layer.qkv.weight, layer.qkv.bias, norm=layer.norm1.spec)
            a = ctx.ops.temporal_attention(qkv.flatten(2, 3), self.num_heads).view(h.shape)
            h = ctx.ops.linear(a, layer.out.weight, layer.out.bias, residual=h)
            scale, shift = ctx.ops.matmul(ctx.emb, layer.modulation.weight, layer.modulation.bias).chunk(2, -1)
            f = ctx.ops.linear(h, layer.up.weight, layer.up.bias, norm=layer.norm2.spec, scale=scale, shift=shift)
            h = ctx.ops.linear(f, layer.down.weight, layer.down.bias, silu=True, residual=h)
        return ctx.ops.linear(h, self.proj.weight, self.proj.bias, residual=x)


class SpatialDownsample(nn.Module):
    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv = Conv2d(in_channels, channels, 3)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return ctx.ops.spatial_conv(x, self.conv.weight, self.conv.bias, stride=2)


class SpatialUpsample(nn.Module):
    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv = Conv2d(in_channels, channels, 3)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return ctx.ops.spatial_conv(x, self.conv.weight, self.conv.bias, upsample=True)


class TemporalDownsample(nn.Module):
    """A temporal convolution with stride; starts as x[:, ::factor]."""

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.conv, self.factor = TemporalConv(channels, channels, identity=True), factor

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return ctx.ops.temporal_conv(x, self.conv.weight, self.conv.bias, stride=self.factor)


class TemporalUpsample(nn.Module):
    """Frame duplication and a temporal convolution; starts as nearest neighbour."""

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.conv, self.factor = TemporalConv(channels, channels, identity=True), factor

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return ctx.ops.temporal_conv(x, self.conv.weight, self.conv.bias, upsample=self.factor)


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """[B, T, H, W, C] -> [B, T, H/f, W/f, f*f*C]; the only copy at the model's input."""
    if factor == 1:
        return x
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h // factor, factor, w // factor, factor, c)
    return x.permute(0, 1, 2, 4, 3, 5, 6).reshape(b, t, h // factor, w // factor, factor * factor * c)


def depth_to_space(x: Tensor, factor: int) -> Tensor:
    """The inverse of `space_to_depth`."""
    if factor == 1:
        return x
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h, w, factor, factor, c // factor**2)
    return x.permute(0, 1, 2, 4, 3, 5, 6).reshape(b, t, h * factor, w * factor, c // factor**2)


__all__ = [
    "AttentionInflationBlock",
    "Context",
    "ConvolutionInflationBlock",
    "ResnetBlock",
    "SpatialDownsample",
    "SpatialTransformer",
    "SpatialUpsample",
    "TemporalDownsample",
    "TemporalUpsample",
    "depth_to_space",
    "sinusoid",
    "space_to_depth",
]
