"""factorized_conv: one kernel against two. Run: python benchmarks/bench_factorized_conv.py --json rows.jsonl

The case's name says what the cost model chose, so that a wrong choice shows.
"""

from __future__ import annotations

import sys

import torch
from _bench import Case, main
from pylumiere.kernels import factorized_conv, launching
from pylumiere.kernels.implicit_gemm import pack_weight

SHAPES = [(8, 256, 32), (8, 256, 64), (16, 128, 64), (8, 256, 128)]  # frames, size, channels
SMOKE = [(3, 4, 16)]


class Layer:
    def __init__(self, frames: int, size: int, channels: int, dtype: torch.dtype, device: str):
        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(*shape, device=device)).to(dtype)

        self.x = random(1, frames, size, size, channels)
        self.weight_s = pack_weight(random(channels, channels, 3, 3, scale=(9 * channels) ** -0.5))
        self.weight_t = pack_weight(random(channels, channels, 3, scale=(3 * channels) ** -0.5))
        self.bias = random(channels)

    def one(self) -> torch.Tensor:
        return factorized_conv.launch(self.x, self.weight_s, self.bias, self.weight_t, self.bias, fused=True)

    def two(self) -> torch.Tensor:
        return factorized_conv.launch(self.x, self.weight_s, self.bias, self.weight_t, self.bias, fused=False)

    def oracle(self) -> torch.Tensor:
        wide = [v.float() for v in (self.weight_s, self.bias, self.weight_t, self.bias)]
        return factorized_conv.reference(self.x[:, :2].float(), *wide)[:, :1]


def cases(device: str, smoke: bool):
    for frames, size, channels in SMOKE if smoke else SHAPES:
        layer = Layer(frames, size, channels, torch.float16 if smoke else torch.bfloat16, device)
        arch = launching.arch_of(layer.x)
        plan = factorized_conv.plan(tuple(layer.x.shape), channels, channels, layer.x.dtype, arch)
        if "no configuration" in plan.reason:
            print(f"factorized_conv {channels} channels: {plan.reason}")
            continue
        name = f"{frames}x{size}x{size}x{channels}-plan-{'one' if plan.fused else 'two'}"
        cost = factorized_conv.cost(layer.x, layer.weight_s, layer.weight_t)
        yield Case(name, layer.one, {"two_kernels": layer.two}, layer.oracle, cost)


if __name__ == "__main__":
    sys.exit(main("factorized_conv", cases))
