"""The operations that the networks are made of, in plain PyTorch: the definition that every backend must match.

Activations are `[B, T, H, W, C]` and contiguous. A spatial op sees `[B*T, H, W, C]`, a temporal op `[B, T, H*W, C]`;
PyTorch's convolutions see permuted views with channels-last strides, so nothing is copied between layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(NamedTuple):
    """GroupNorm: statistics over H, W and the group's channels of one frame, or of all frames of a clip."""

    weight: Tensor  # [C]
    bias: Tensor  # [C]
    num_groups: int
    eps: float
    over_frames: bool = False


class Shift(NamedTuple):
    """Temporal shift: channels [0, C/div) take the next frame, [C/div, 2C/div) the previous one ("causal": the first
    fold takes the previous frame). The ends see zeros, the other end of the clip, or the end frame again."""

    div: int = 8
    direction: str = "both"  # both | causal
    pad: str = "zero"  # zero | circular | replicate


def shift_frames(x: Tensor, shift: Shift) -> Tensor:
    """Temporal shift of `[B, T, H, W, C]` (Lin et al. 2019, TSM). Unchanged for one frame."""
    fold = x.shape[-1] // shift.div
    if x.shape[1] == 1 or fold == 0:
        return x

    def moved(part: Tensor, step: int) -> Tensor:
        """Frame t of `part` from its frame t - step, by a pad or a concatenation and a slice: graphs have these."""
        first, last = part[:, :1], part[:, -1:]
        if shift.pad == "zero":
            longer = F.pad(part, (0, 0, 0, 0, 0, 0, 1, 1))
        else:
            longer = torch.cat([last, part, first] if shift.pad == "circular" else [first, part, last], 1)
        return longer[:, :-2] if step == 1 else longer[:, 2:]

    if shift.direction == "causal":
        return torch.cat([moved(x[..., :fold], 1), x[..., fold:]], -1)
    return torch.cat([moved(x[..., :fold], -1), moved(x[..., fold : 2 * fold], 1), x[..., 2 * fold :]], -1)


def _frames(x: Tensor) -> Tensor:
    """[B, T, H, W, C] as an NCHW-shaped view with channels-last strides: [B*T, C, H, W]."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def _times(x: Tensor) -> Tensor:
    """[B, T, H, W, C] as a view for a convolution over frames: [B, C, T, H*W]."""
    return x.flatten(2, 3).permute(0, 3, 1, 2)


class PlainOps:
    """Eager PyTorch. Stateless; a backend is a class with the same methods."""

    name = "torch"

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
        """silu(groupnorm(x + row_bias) * (1 + scale) + shift); row_bias, scale and shift are [B, 1 or T, C]."""
        if row_bias is not None:
            x = x + row_bias[:, :, None, None]
        if norm is not None:
            y = _frames(x.flatten(1, 2).unsqueeze(1) if norm.over_frames else x)
            y = F.group_norm(y, norm.num_groups, norm.weight, norm.bias, norm.eps)
            x = y.permute(0, 2, 3, 1).view(x.shape)
        if scale is not None:
            x = torch.addcmul(shift[:, :, None, None], x, 1 + scale[:, :, None, None])
        return F.silu(x) if silu else x

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
        """A k x k convolution within each frame, weight [O, C, k, k], zero padding k // 2.

        row_bias, norm, scale, shift, silu and the temporal shift come before it, nearest upsampling by 2 with
        `upsample`; `residual` is added after it. Returns [B, T, H', W', O].
        """
        y = self.activate(x, norm, scale, shift, silu, row_bias=row_bias)
        if temporal_shift is not None:
            y = self._shifted(y, temporal_shift, is_own=y is not x)
        v = _frames(y)
        if upsample:
            v = F.interpolate(v, scale_factor=2.0, mode="nearest")
        padding = weight.shape[-1] // 2
        v = self._conv2d(
            v, weight, bias, (stride, stride), (padding, padding), None if residual is None else _frames(residual)
        )
        return v.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])

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
        """A convolution over frames, weight [O, C, 3], zero ends, optional stride or frame duplication before it."""
        y = self.activate(x, norm, scale, shift, silu, row_bias=row_bias)
        if upsample > 1:
            y = y.repeat_interleave(upsample, 1)
        height, width = y.shape[2:4]
        v = self._conv2d(_times(y), weight, bias, (stride, 1), (1, 0), None if residual is None else _times(residual))
        return v.permute(0, 2, 3, 1).unflatten(2, (height, width))

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
        """A linear layer on the channels of [B, T, H, W, C], with the same prologue and epilogue."""
        return self.matmul(self.activate(x, norm, scale, shift, silu, row_bias=row_bias), weight, bias, residual)

    def _conv2d(
        self,
        v: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        residual: Tensor | None,
    ) -> Tensor:
        """On NCHW-shaped views; weight [O, C, kh, kw], or [O, C, kh] where kw is 1."""
        y = F.conv2d(v, weight if weight.ndim == 4 else weight.unsqueeze(-1), bias, stride, padding)
        return y if residual is None else y + residual

    def _shifted(self, x: Tensor, shift: Shift, is_own: bool) -> Tensor:
        """`shift_frames`; x may be overwritten where it is nobody else's."""
        return shift_frames(x, shift)

    def matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """x [..., C] weight^T + bias + residual: a linear layer alone, of any shape."""
        y = F.linear(x, weight, bias)
        return y if residual is None else y + residual

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        """LayerNorm over the last axis."""
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def geglu(self, x: Tensor) -> Tensor:
        """h * gelu(g) of x [..., 2*C] = (h, g), by the exact error function: [..., C]."""
        h, g = x.chunk(2, -1)
        return h * F.gelu(g)

    def upcast(self, x: Tensor) -> Tensor:
        """In float32 at least."""
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
        """softmax(q k^T / sqrt(D)) v. q [N, Sq, C], k and v [N, Sk, C]; mask [N, Sk] is True where keys are seen."""
        q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        keep = None if mask is None else mask[:, None, None, :]
        if torch.is_grad_enabled():  # the CPU's fused attention has a slow backward for small heads
            scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
            if keep is not None:
                scores = scores.masked_fill(~keep, float("-inf"))
            out = scores.float().softmax(-1).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return out.transpose(1, 2).flatten(2)

    def temporal_attention(self, qkv: Tensor, num_heads: int) -> Tensor:
        """Attention over frames, one sequence per pixel: packed qkv [B, T, S, 3*C] -> [B, T, S, C]."""
        batch, frames, pixels, _ = qkv.shape
        rows = qkv.transpose(1, 2).reshape(batch * pixels, frames, -1)
        out = self.attention(*rows.chunk(3, -1), num_heads)
        return out.view(batch, pixels, frames, -1).transpose(1, 2).contiguous()
