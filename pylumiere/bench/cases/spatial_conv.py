"""spatial_conv against cuDNN and torch.compile.

`conv` cases compare the convolution alone, with PyTorch's in both layouts. `fused` cases compare GroupNorm + SiLU +
convolution with eager's three kernels and with torch.compile; our time includes the statistics pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from pylumiere.bench.harness import Case, Site
from pylumiere.kernels import norm_affine, spatial_conv
from pylumiere.kernels.implicit_gemm import pack_weight

TABLE = "spatial_conv"
SIZES = {  # frames, size, channels
    "full": [(80, 128, 320), (40, 64, 640), (20, 32, 960), (10, 16, 1280)],
    "small": [(8, 16, 64), (4, 8, 128)],
    "smoke": [(2, 6, 32)],
}


class Layer:
    """One convolution with its norm, in our layout and in those of PyTorch."""

    def __init__(self, site: Site, frames: int, size: int, channels: int):
        self.site, self.groups = site, 32 if site.size == "full" else 4
        self.x = site.randn(1, frames, size, size, channels)
        self.weight = pack_weight(site.randn(channels, channels, 3, 3, scale=(9 * channels) ** -0.5))
        self.bias, self.gamma, self.beta = (site.randn(channels) for _ in range(3))
        self.planar, self.planar_weight = _nchw(self.x).contiguous(), self.weight.contiguous()

    def conv(self) -> torch.Tensor:
        return self.site.function(spatial_conv)(self.x, self.weight, self.bias)[0]

    def nhwc(self) -> torch.Tensor:
        return _frames(F.conv2d(_nchw(self.x), self.weight, self.bias, padding=1))

    def nchw(self) -> torch.Tensor:
        return _frames(F.conv2d(self.planar, self.planar_weight, self.bias, padding=1))

    def conv_oracle(self) -> torch.Tensor:
        return spatial_conv.reference(self.x[:, :1].double(), self.weight.double(), self.bias.double())[0]

    def fused(self) -> torch.Tensor:
        frames = self.x.flatten(2, 3).flatten(0, 1)
        pass_over = norm_affine.launch_statistics if self.site.runs_kernels else norm_affine.statistics_reference
        fold = self.site.function(norm_affine)
        mul, add = fold(pass_over(frames), frames.shape[1], self.gamma, self.beta, self.groups)
        return self.site.function(spatial_conv)(self.x, self.weight, self.bias, mul, add, None, True)[0]

    def eager(self) -> torch.Tensor:
        y = F.silu(F.group_norm(_nchw(self.x), self.groups, self.gamma, self.beta))
        return _frames(F.conv2d(y, self.weight, self.bias, padding=1))

    def fused_oracle(self) -> torch.Tensor:
        x, gamma, beta = _nchw(self.x[:, :1]).double(), self.gamma.double(), self.beta.double()
        y = F.silu(F.group_norm(x, self.groups, gamma, beta))
        return _frames(F.conv2d(y, self.weight.double(), self.bias.double(), padding=1))


def _nchw(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def _frames(y: torch.Tensor) -> torch.Tensor:
    return y.permute(0, 2, 3, 1)[None]


def cases(site: Site) -> Iterator[Case]:
    for frames, size, channels in SIZES[site.size]:
        layer = Layer(site, frames, size, channels)
        name, cost = f"{frames}x{size}x{size}x{channels}", spatial_conv.cost(layer.x, layer.weight)
        rivals = {"nhwc": layer.nhwc, "nchw": layer.nchw}
        yield Case(f"conv-{name}", layer.conv, rivals, layer.conv_oracle, cost, compiled=layer.nhwc)
        yield Case(f"fused-{name}", layer.fused, {"eager": layer.eager}, layer.fused_oracle, cost)
