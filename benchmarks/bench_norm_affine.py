"""Channel statistics and the folded GroupNorm. Run: python benchmarks/bench_norm_affine.py --json rows.jsonl

Bound by one read of the tensor. The rival reads it as often as eager does: var_mean over pixels in float32.
"""

from __future__ import annotations

import sys

import torch
from _bench import Case, main
from pylumiere.kernels import norm_affine

SHAPES = [(80, 128 * 128, 320), (40, 64 * 64, 640), (8, 1024 * 1024, 64), (10, 16 * 16, 1280)]  # frames, pixels, C
SMOKE = [(2, 70, 32)]


def cases(device: str, smoke: bool):
    for frames, pixels, channels in SMOKE if smoke else SHAPES:
        x = torch.randn(frames, pixels, channels, device=device).to(torch.float16 if smoke else torch.bfloat16)

        def ours(x=x):
            return norm_affine.launch_statistics(x)

        def eager(x=x):
            variance, mean = torch.var_mean(x.float(), 1, correction=0)
            return torch.stack([mean, variance * x.shape[1]], 1)

        def oracle(x=x):
            return norm_affine.statistics_reference(x.double())

        yield Case(f"{frames}x{pixels}x{channels}", ours, {"eager": eager}, oracle, norm_affine.cost(x))


if __name__ == "__main__":
    sys.exit(main("norm_affine", cases))
