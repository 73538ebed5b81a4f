"""temporal_conv against cuDNN and torch.compile. Run: python benchmarks/bench_temporal_conv.py --json rows.jsonl

The rival sees the same memory as a 2-D convolution with kernel (3, 1) on [B, C, T, S], channels-last: no copies.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from _bench import Case, main, tune_convolution
from pylumiere.kernels import temporal_conv
from pylumiere.kernels.implicit_gemm import pack_weight

LEVELS = [(80, 128, 320, 1), (80, 64, 640, 2), (40, 64, 640, 1), (20, 32, 960, 1)]  # frames, size, channels, stride
SMOKE = [(3, 4, 32, 1), (4, 4, 32, 2)]


class Layer:
    """One convolution over frames: SiLU, three taps, and the residual where the frame rate stays."""

    def __init__(self, frames: int, size: int, channels: int, stride: int, dtype: torch.dtype, device: str):
        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(*shape, device=device)).to(dtype)

        self.x = random(1, frames, size, size, channels)
        self.weight = pack_weight(random(channels, channels, 3, scale=(3 * channels) ** -0.5))
        self.bias, self.stride = random(channels), stride

    def ours(self) -> torch.Tensor:
        return temporal_conv.launch(self.x, self.weight, self.bias, silu=True, stride=self.stride)[0]

    def eager(self) -> torch.Tensor:
        return self._by_conv2d(self.x, self.weight, self.bias)

    def oracle(self) -> torch.Tensor:
        return self._by_conv2d(self.x[:, :2].float(), self.weight.float(), self.bias.float())[:, :1]

    def _by_conv2d(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = F.silu(x).flatten(2, 3).permute(0, 3, 1, 2)
        y = F.conv2d(y, weight.unsqueeze(-1), bias, stride=(self.stride, 1), padding=(1, 0))
        return y.permute(0, 2, 3, 1).unflatten(2, x.shape[2:4])


def cases(device: str, smoke: bool):
    for frames, size, channels, stride in SMOKE if smoke else LEVELS:
        layer = Layer(frames, size, channels, stride, torch.float16 if smoke else torch.bfloat16, device)
        rivals = {"eager": layer.eager}
        if not smoke:
            rivals["compile"] = torch.compile(layer.eager)
        name = f"{frames}x{size}x{size}x{channels}-stride{stride}"
        yield Case(name, layer.ours, rivals, layer.oracle, temporal_conv.cost(layer.x, layer.weight, stride=stride))


def tune(device: str) -> None:
    for frames, size, channels, stride in LEVELS:
        layer = Layer(frames, size, channels, stride, torch.bfloat16, device)
        tune_convolution("temporal_conv", f"{frames}x{size}x{size}x{channels}-stride{stride}", layer.ours)


if __name__ == "__main__":
    sys.exit(main("temporal_conv", cases, tune))
