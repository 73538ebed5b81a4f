"""factorized_conv: one kernel against two, and against PyTorch's two.

The case's name says what the cost model chose, so that a wrong choice shows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from pylumiere.bench.harness import Case, Site
from pylumiere.kernels import factorized_conv, launching
from pylumiere.kernels.implicit_gemm import pack_weight

TABLE = "factorized_conv"
SIZES = {  # frames, size, channels
    "full": [(8, 256, 32), (8, 256, 64), (16, 128, 64), (8, 256, 128)],
    "small": [(8, 16, 32)],
    "smoke": [(3, 4, 16)],
}


class Layer:
    def __init__(self, site: Site, frames: int, size: int, channels: int):
        self.site = site
        self.x = site.randn(1, frames, size, size, channels)
        self.weight_s = pack_weight(site.randn(channels, channels, 3, 3, scale=(9 * channels) ** -0.5))
        self.weight_t = pack_weight(site.randn(channels, channels, 3, scale=(3 * channels) ** -0.5))
        self.bias = site.randn(channels)

    def one(self) -> torch.Tensor:
        function = self.site.function(factorized_conv)
        return function(self.x, self.weight_s, self.bias, self.weight_t, self.bias, fused=True)

    def two(self) -> torch.Tensor:
        return factorized_conv.launch(self.x, self.weight_s, self.bias, self.weight_t, self.bias, fused=False)

    def eager(self) -> torch.Tensor:
        z = F.conv2d(self.x.flatten(0, 1).permute(0, 3, 1, 2), self.weight_s, self.bias, padding=1)
        z = z.permute(0, 2, 3, 1).view(self.x.shape).flatten(2, 3).permute(0, 3, 1, 2)  # [B, C, T, S]
        y = F.conv2d(z, self.weight_t.unsqueeze(-1), self.bias, padding=(1, 0))
        return y.permute(0, 2, 3, 1).view(self.x.shape)

    def oracle(self) -> torch.Tensor:
        wide = [v.double() for v in (self.weight_s, self.bias, self.weight_t, self.bias)]
        return factorized_conv.reference(self.x[:, :2].double(), *wide)[:, :1]


def cases(site: Site) -> Iterator[Case]:
    for frames, size, channels in SIZES[site.size]:
        layer = Layer(site, frames, size, channels)
        plan = factorized_conv.plan(
            tuple(layer.x.shape), channels, channels, layer.x.dtype, launching.arch_of(layer.x)
        )
        name = f"{frames}x{size}x{size}x{channels}-plan-{'one' if plan.fused else 'two'}"
        print(f"factorized_conv {name}: {plan.reason}", flush=True)
        if site.runs_kernels and "no configuration" in plan.reason:
            continue
        rivals = {"eager": layer.eager} | ({"two_kernels": layer.two} if site.runs_kernels else {})
        cost = factorized_conv.cost(layer.x, layer.weight_s, layer.weight_t)
        yield Case(name, layer.one, rivals, layer.oracle, cost)
