"""temporal_shift alone against eager PyTorch. Run: python benchmarks/bench_temporal_shift.py --json rows.jsonl"""

from __future__ import annotations

import sys

import torch
from _bench import Case, main
from pylumiere.kernels import temporal_shift as op

SHAPES = [(1, 80, 128 * 128, 320), (1, 80, 256 * 256, 64), (1, 80, 64 * 64, 640)]
SMOKE = [(1, 3, 10, 24)]


def cases(device: str, smoke: bool):
    for shape in SMOKE if smoke else SHAPES:
        x = torch.randn(*shape, device=device, dtype=torch.float16 if smoke else torch.bfloat16)
        rivals = {"eager": lambda x=x: op.reference(x)}
        yield Case("x".join(map(str, shape)), lambda x=x: op.launch(x), rivals, rivals["eager"], op.cost(x))


if __name__ == "__main__":
    sys.exit(main("temporal_shift", cases))
