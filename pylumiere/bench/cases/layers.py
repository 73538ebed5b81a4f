"""Layers over frames, whole, beside those of diffusers that compute the same: on the same weights.

`attention`: projection to queries, keys and values, attention over the frames of each pixel, projection back, plus the
input; diffusers' `Attention`, as its motion modules (AnimateDiff) and `TransformerTemporalModel` call it.
`convolution`: SiLU and a convolution over frames; the two modules of diffusers' `TemporalConvLayer` (the U-Net of
text-to-video-ms) that do so. What surrounds them there (norms over time, other feed-forwards) is another function.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

from torch import Tensor

from pylumiere.bench.harness import Case, Site
from pylumiere.kernels.cost import Cost
from pylumiere.networks.ops import PlainOps

TABLE = None  # tiles are the operators'
SIZES = {  # frames, height and width, channels, heads
    "full": [(10, 16, 1280, 20), (20, 32, 960, 15)],
    "small": [(20, 4, 192, 6), (40, 8, 128, 4), (80, 16, 64, 2)],
    "smoke": [(5, 4, 32, 2)],
}


def our_ops(site: Site) -> PlainOps:
    if site.runs_kernels:
        from pylumiere.backends.triton import TritonOps

        return TritonOps()
    from pylumiere.backends.cpu_ops import CpuOps

    return CpuOps()


class Attention:
    def __init__(self, site: Site, frames: int, size: int, channels: int, heads: int):
        self.ops, self.heads = our_ops(site), heads
        self.x = site.randn(1, frames, size, size, channels)
        scale = channels**-0.5
        self.qkv, self.qkv_bias = site.randn(3 * channels, channels, scale=scale), site.randn(3 * channels)
        self.out, self.out_bias = site.randn(channels, channels, scale=scale), site.randn(channels)

    def ours(self) -> Tensor:
        return self._layer(self.ops, self.x)

    def eager(self) -> Tensor:
        return self._layer(PlainOps(), self.x)

    def oracle(self) -> Tensor:
        return self._layer(PlainOps(), self.x.double())

    def _layer(self, ops: PlainOps, x: Tensor) -> Tensor:
        qkv, qkv_bias, out, out_bias = (t.to(x.dtype) for t in (self.qkv, self.qkv_bias, self.out, self.out_bias))
        h = ops.linear(x, qkv, qkv_bias)
        h = ops.temporal_attention(h.flatten(2, 3), self.heads).view(x.shape)
        return ops.linear(h, out, out_bias, residual=x)

    def diffusers(self) -> Callable[[], Tensor]:
        from diffusers.models.attention_processor import Attention as Theirs

        channels = self.x.shape[-1]
        layer = Theirs(channels, heads=self.heads, dim_head=channels // self.heads, bias=True)
        layer = layer.to(self.x.device, self.x.dtype).eval()
        names = ("to_q", "to_k", "to_v")
        for name, weight, bias in zip(names, self.qkv.chunk(3), self.qkv_bias.chunk(3), strict=True):
            getattr(layer, name).weight.data, getattr(layer, name).bias.data = weight, bias
        layer.to_out[0].weight.data, layer.to_out[0].bias.data = self.out, self.out_bias
        b, t, h, w, c = self.x.shape
        # Frames of a pixel side by side, [B*T, C, H, W] to [B*H*W, T, C] and back, as their motion module does.
        x = self.x.permute(0, 1, 4, 2, 3).reshape(b * t, c, h, w).contiguous()

        def run() -> Tensor:
            rows = x.reshape(b, t, c, h, w).permute(0, 3, 4, 1, 2).reshape(b * h * w, t, c)
            rows = layer(rows) + rows
            y = rows.reshape(b, h, w, t, c).permute(0, 3, 4, 1, 2).reshape(b * t, c, h, w)
            return y.reshape(b, t, c, h, w).permute(0, 1, 3, 4, 2)

        return run

    def cost(self) -> Cost:
        frames, channels = self.x.shape[1], self.x.shape[-1]
        flops = 8 * self.x.numel() * channels + 4 * self.x.numel() * frames
        return Cost(flops, (2 * self.x.numel() + 4 * channels * channels) * self.x.element_size())


class Convolution:
    def __init__(self, site: Site, frames: int, size: int, channels: int, heads: int):
        self.ops = our_ops(site)
        self.x = site.randn(1, frames, size, size, channels)
        self.weight, self.bias = site.randn(channels, channels, 3, scale=(3 * channels) ** -0.5), site.randn(channels)
        self.packed = self.weight
        if site.runs_kernels:
            from pylumiere.kernels.implicit_gemm import pack_weight

            self.packed = pack_weight(self.weight)

    def ours(self) -> Tensor:
        return self.ops.temporal_conv(self.x, self.packed, self.bias, silu=True)

    def eager(self) -> Tensor:
        return PlainOps().temporal_conv(self.x, self.weight, self.bias, silu=True)

    def oracle(self) -> Tensor:
        return PlainOps().temporal_conv(self.x.double(), self.weight.double(), self.bias.double(), silu=True)

    def diffusers(self) -> Callable[[], Tensor]:
        from diffusers.models.resnet import TemporalConvLayer

        _, _, _, _, c = self.x.shape
        theirs = TemporalConvLayer(c, c, norm_num_groups=1).to(self.x.device, self.x.dtype).eval()
        norm, silu, conv = theirs.conv1
        conv.weight.data, conv.bias.data = self.weight[..., None, None], self.bias
        x = self.x.permute(0, 4, 1, 2, 3).contiguous()  # [B, C, T, H, W], which is theirs
        return lambda: conv(silu(x)).permute(0, 2, 3, 4, 1)

    def cost(self) -> Cost:
        channels = self.x.shape[-1]
        values = 2 * self.x.numel() + 3 * channels * channels
        return Cost(6 * self.x.numel() * channels, values * self.x.element_size())


def cases(site: Site) -> Iterator[Case]:
    for name, kind in (("attention", Attention), ("convolution", Convolution)):
        for sizes in SIZES[site.size]:
            layer = kind(site, *sizes)
            rivals = {"eager": layer.eager}
            if importlib.util.find_spec("diffusers") is not None:
                rivals["diffusers"] = layer.diffusers()
            frames, size, channels, _ = sizes
            shape = f"{frames}x{size}x{size}x{channels}"
            yield Case(f"{name}-{shape}", layer.ours, rivals, layer.oracle, layer.cost())
