"""spatial_conv against cuDNN and torch.compile. Run: python benchmarks/bench_spatial_conv.py --json rows.jsonl

`conv` cases compare the convolution alone with cuDNN in both layouts. `fused` cases compare GroupNorm + SiLU +
convolution with eager's three kernels and with torch.compile; our time includes the statistics pass.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from _bench import Case, main, tune_convolution
from pylumiere.kernels import norm_affine, spatial_conv
from pylumiere.kernels.implicit_gemm import pack_weight

# Levels of stunet-l: frames, size, channels.
LEVELS = [(80, 128, 320), (40, 64, 640), (20, 32, 960), (10, 16, 1280)]
SMOKE = [(2, 6, 32), (1, 5, 48)]


class Layer:
    """One convolution with its norm, in our layout and in those of cuDNN."""

    def __init__(self, frames: int, size: int, channels: int, groups: int, dtype: torch.dtype, device: str):
        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(*shape, device=device)).to(dtype)

        self.x = random(1, frames, size, size, channels)
        self.weight = pack_weight(random(channels, channels, 3, 3, scale=(9 * channels) ** -0.5))
        self.bias, self.gamma, self.beta = (random(channels) for _ in range(3))
        self.groups = groups
        self.planar, self.planar_weight = _nchw(self.x).contiguous(), self.weight.contiguous()

    def conv(self) -> torch.Tensor:
        return spatial_conv.launch(self.x, self.weight, self.bias)[0]

    def cudnn_nhwc(self) -> torch.Tensor:
        return _frames(F.conv2d(_nchw(self.x), self.weight, self.bias, padding=1))

    def cudnn_nchw(self) -> torch.Tensor:
        return _frames(F.conv2d(self.planar, self.planar_weight, self.bias, padding=1))

    def conv_oracle(self) -> torch.Tensor:
        return spatial_conv.reference(self.x[:, :1].float(), self.weight.float(), self.bias.float())[0]

    def fused(self) -> torch.Tensor:
        frames = self.x.flatten(2, 3).flatten(0, 1)
        statistics = norm_affine.launch_statistics(frames)
        mul, add = norm_affine.launch(statistics, frames.shape[1], self.gamma, self.beta, self.groups)
        return spatial_conv.launch(self.x, self.weight, self.bias, mul, add, None, True)[0]

    def eager(self) -> torch.Tensor:
        y = F.silu(F.group_norm(_nchw(self.x), self.groups, self.gamma, self.beta))
        return _frames(F.conv2d(y, self.weight, self.bias, padding=1))

    def fused_oracle(self) -> torch.Tensor:
        x, gamma, beta = _nchw(self.x[:, :1]).float(), self.gamma.float(), self.beta.float()
        y = F.silu(F.group_norm(x, self.groups, gamma, beta))
        return _frames(F.conv2d(y, self.weight.float(), self.bias.float(), padding=1))


def _nchw(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def _frames(y: torch.Tensor) -> torch.Tensor:
    return y.permute(0, 2, 3, 1)[None]


def cases(device: str, smoke: bool):
    for frames, size, channels in SMOKE if smoke else LEVELS:
        dtype = torch.float16 if smoke else torch.bfloat16
        layer = Layer(frames, size, channels, 4 if smoke else 32, dtype, device)
        name, cost = f"{frames}x{size}x{size}x{channels}", spatial_conv.cost(layer.x, layer.weight)
        rivals = {"cudnn_nhwc": layer.cudnn_nhwc, "cudnn_nchw": layer.cudnn_nchw}
        yield Case(f"conv-{name}", layer.conv, rivals, layer.conv_oracle, cost)
        rivals = {"eager": layer.eager}
        if not smoke:
            rivals["compile"] = torch.compile(layer.eager)
        yield Case(f"fused-{name}", layer.fused, rivals, layer.fused_oracle, cost)


def tune(device: str) -> None:
    for frames, size, channels in LEVELS:
        layer = Layer(frames, size, channels, 32, torch.bfloat16, device)
        tune_convolution("spatial_conv", f"{frames}x{size}x{size}x{channels}", layer.fused)


if __name__ == "__main__":
    sys.exit(main("spatial_conv", cases, tune))
