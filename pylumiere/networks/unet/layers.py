"""What the public U-Nets are made of. Each takes `[B, T, H, W, C]` and the context of the call.

Modules of torch hold the parameters, under the names of diffusers' files; the backend applies them.

Source: the classes of the same purpose in diffusers 0.42: ResnetBlock2D, Transformer2DModel, BasicTransformerBlock,
TimestepEmbedding, Downsample2D, Upsample2D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pylumiere.networks.ops import Norm, PlainOps, Shift

TRANSFORMER_EPS = 1e-6  # of the GroupNorm before a transformer


@dataclass(frozen=True)
class Context:
    """What a layer may look at besides its input.

    Attributes:
        ops: the backend.
        emb: [B, 1, D] conditioning by the timestep, after SiLU.
        text: [B, L, D_text], one for all frames of a clip; text_mask: [B, L] bool, or None: all of it is seen.
    """

    ops: PlainOps
    emb: Tensor
    text: Tensor
    text_mask: Tensor | None


def norm_spec(norm: nn.GroupNorm) -> Norm:
    return Norm(norm.weight, norm.bias, norm.num_groups, norm.eps)


def timestep_features(timesteps: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: int) -> Tensor:
    """Sinusoids of real-valued timesteps, [B] -> [B, dim] in float32. dim is even.

    Products are rounded in the order of diffusers' `get_timestep_embedding`: at timestep 999 another order changes the
    features in the fourth digit.
    """
    half = dim // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * (exponents / (half - freq_shift)).exp()
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(parts, -1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between them: [B, dim] -> [B, out_dim]."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim, out_dim), nn.Linear(out_dim, out_dim)

    def forward(self, features: Tensor, ops: PlainOps) -> Tensor:
        h = F.silu(ops.matmul(features, self.linear_1.weight, self.linear_1.bias))
        return ops.matmul(h, self.linear_2.weight, self.linear_2.bias)


class ResnetBlock(nn.Module):
    """norm, SiLU, [temporal shift], conv, plus the conditioning, norm, SiLU, conv; plus the input."""

    def __init__(
        self, in_channels: int, channels: int, emb_dim: int, num_groups: int, eps: float, shift: Shift | None = None
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(num_groups, in_channels, eps), nn.GroupNorm(num_groups, channels, eps)
        self.conv1, self.conv2 = nn.Conv2d(in_channels, channels, 3), nn.Conv2d(channels, channels, 3)
        self.time_emb_proj = nn.Linear(emb_dim, channels)
        self.conv_shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else None
        self.temporal_shift = shift

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        ops = ctx.ops
        skip = x if self.conv_shortcut is None else _project(ops, self.conv_shortcut, x)
        h = ops.spatial_conv(
            x, self.conv1.weight, self.conv1.bias,
            norm=norm_spec(self.norm1), silu=True, temporal_shift=self.temporal_shift,
        )  # fmt: skip
        rows = ops.matmul(ctx.emb, self.time_emb_proj.weight, self.time_emb_proj.bias)
        return ops.spatial_conv(
            h, self.conv2.weight, self.conv2.bias,
            row_bias=rows, norm=norm_spec(self.norm2), silu=True, residual=skip,
        )  # fmt: skip


class SpatialTransformer(nn.Module):
    """norm, projection, transformer blocks within each frame, projection; plus the input.

    Args:
        linear: the projections are linear layers and not 1 x 1 convolutions: the same, in another shape.
    """

    def __init__(
        self, channels: int, num_heads: int, depth: int, text_dim: int, num_groups: int, linear: bool, upcast: bool
    ):
        super().__init__()

        def projection() -> nn.Module:
            return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

        self.norm = nn.GroupNorm(num_groups, channels, TRANSFORMER_EPS)
        self.proj_in, self.proj_out = projection(), projection()
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, text_dim, upcast) for _ in range(depth)
        )

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        h = _project(ctx.ops, self.proj_in, x, norm=norm_spec(self.norm))
        for block in self.transformer_blocks:
            h = block(h, ctx)
        return _project(ctx.ops, self.proj_out, h, residual=x)


class TransformerBlock(nn.Module):
    """Attention between the pixels of each frame, attention to the text, feed-forward; each after a LayerNorm, and its
    input is added."""

    def __init__(self, channels: int, num_heads: int, text_dim: int, upcast: bool):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = Attention(channels, channels, num_heads, upcast)
        self.attn2 = Attention(channels, text_dim, num_heads, upcast)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        ops = ctx.ops
        x = self.attn1(_normed(ops, self.norm1, x), x, ops)
        x = self.attn2(_normed(ops, self.norm2, x), x, ops, ctx.text, ctx.text_mask)
        return self.ff(_normed(ops, self.norm3, x), x, ops)


class Attention(nn.Module):
    """Attention of each pixel to those of its frame, or to the text of its clip; plus the residual.

    Args:
        source_dim: width of what is attended to.
        upcast: in float32 at least.
    """

    def __init__(self, channels: int, source_dim: int, num_heads: int, upcast: bool):
        super().__init__()
        self.num_heads, self.upcast = num_heads, upcast
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k, self.to_v = (nn.Linear(source_dim, channels, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(
        self, x: Tensor, residual: Tensor, ops: PlainOps, text: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        batch, frames, *_, channels = x.shape
        if text is None:
            sequences = batch * frames
            k, v = (ops.linear(x, to.weight, None) for to in (self.to_k, self.to_v))
        else:
            sequences = batch  # keys and values once for all frames
            k, v = (ops.matmul(text, to.weight, None) for to in (self.to_k, self.to_v))
        parts = [t.view(sequences, -1, channels) for t in (ops.linear(x, self.to_q.weight, None), k, v)]
        if self.upcast:
            parts = [ops.upcast(t) for t in parts]
        h = ops.attention(*parts, self.num_heads, mask).to(x.dtype).view(x.shape)
        (out,) = self.to_out
        return ops.linear(h, out.weight, out.bias, residual=residual)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back, plus the residual."""

    def __init__(self, channels: int):
        super().__init__()
        gate = nn.Module()
        gate.proj = nn.Linear(channels, 8 * channels)
        self.net = nn.ModuleDict({"0": gate, "2": nn.Linear(4 * channels, channels)})

    def forward(self, x: Tensor, residual: Tensor, ops: PlainOps) -> Tensor:
        up, down = self.net["0"].proj, self.net["2"]
        h = ops.geglu(ops.linear(x, up.weight, up.bias))
        return ops.linear(h, down.weight, down.bias, residual=residual)


class Downsample(nn.Module):
    """A 3 x 3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return ctx.ops.spatial_conv(x, self.conv.weight, self.conv.bias, stride=2)


class Upsample(nn.Module):
    """Nearest neighbour by 2 and a 3 x 3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return ctx.ops.spatial_conv(x, self.conv.weight, self.conv.bias, upsample=True)


def _normed(ops: PlainOps, norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def _project(
    ops: PlainOps, layer: nn.Linear | nn.Conv2d, x: Tensor, *, norm: Norm | None = None, residual: Tensor | None = None
) -> Tensor:
    """A linear layer, or a 1 x 1 convolution, whose weight stays the tensor that backends have prepared."""
    operation = ops.linear if isinstance(layer, nn.Linear) else ops.spatial_conv
    return operation(x, layer.weight, layer.bias, norm=norm, residual=residual)
