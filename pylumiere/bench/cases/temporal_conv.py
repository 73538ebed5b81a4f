"""temporal_conv against PyTorch and torch.compile.

The rival sees the same memory as a 2-D convolution with kernel (3, 1) on [B, C, T, S], channels-last: no copies.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from pylumiere.bench.harness import Case, Site
from pylumiere.kernels import temporal_conv
from pylumiere.kernels.implicit_gemm import pack_weight

TABLE = "temporal_conv"
SIZES = {  # frames, size, channels, stride
    "full": [(80, 128, 320, 1), (80, 64, 640, 2), (40, 64, 640, 1), (20, 32, 960, 1)],
    "small": [(16, 16, 64, 1), (16, 16, 64, 2)],
    "smoke": [(3, 4, 32, 1), (4, 4, 32, 2)],
}


class Layer:
    """One convolution over frames after a SiLU."""

    def __init__(self, site: Site, frames: int, size: int, channels: int, stride: int):
        self.site, self.stride = site, stride
        self.x = site.randn(1, frames, size, size, channels)
        self.weight = pack_weight(site.randn(channels, channels, 3, scale=(3 * channels) ** -0.5))
        self.bias = site.randn(channels)

    def ours(self) -> torch.Tensor:
        return self.site.function(temporal_conv)(self.x, self.weight, self.bias, silu=True, stride=self.stride)[0]

    def eager(self) -> torch.Tensor:
        return self._by_conv2d(self.x, self.weight, self.bias)

    def oracle(self) -> torch.Tensor:
        return self._by_conv2d(self.x[:, :2].double(), self.weight.double(), self.bias.double())[:, :1]

    def _by_conv2d(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = F.silu(x).flatten(2, 3).permute(0, 3, 1, 2)
        y = F.conv2d(y, weight.unsqueeze(-1), bias, stride=(self.stride, 1), padding=(1, 0))
        return y.permute(0, 2, 3, 1).unflatten(2, x.shape[2:4])


def cases(site: Site) -> Iterator[Case]:
    for frames, size, channels, stride in SIZES[site.size]:
        layer = Layer(site, frames, size, channels, stride)
        name = f"{frames}x{size}x{size}x{channels}-stride{stride}"
        cost = temporal_conv.cost(layer.x, layer.weight, stride=stride)
        yield Case(name, layer.ours, {"eager": layer.eager}, layer.oracle, cost)
