"""denoise_step against eager PyTorch. Run: python benchmarks/bench_denoise_step.py --json rows.jsonl"""

from __future__ import annotations

import sys

import torch
from _bench import Case, main
from pylumiere.kernels import denoise_step as op

SHAPES = [(80, 128 * 128 * 3, 2), (8, 1024 * 1024 * 3, 1)]  # frames, positions, outputs
SMOKE = [(2, 100, 2)]


def cases(device: str, smoke: bool):
    for F, P, G in SMOKE if smoke else SHAPES:
        rows = torch.arange(F, dtype=torch.int32, device=device)[:, None]
        coef = torch.tensor([1.2, -0.6, 0.7, 0.3, 0.1, 0.2, 7.5, 1.0, 1.0, 1.0], device=device).repeat(F, 1)
        key = torch.zeros(F, 5, dtype=torch.int64, device=device)
        key[:, 3] = torch.arange(F)
        out = torch.randn(G, F, P, device=device, dtype=torch.float16 if smoke else torch.bfloat16)
        x, prev = (torch.randn(F, P, device=device) for _ in range(2))
        args = (x, prev, out, rows, torch.ones(F, 1, device=device), coef, key)

        def reference(args=args):
            return op.reference(*args)[0][None]

        rivals = {} if device == "cuda" else {"eager": reference}  # its noise copies a mask to the host: no CUDA graph
        yield Case(f"{F}x{P}-G{G}", lambda args=args: op.launch(*args)[0][None], rivals, reference, op.cost(*args))


if __name__ == "__main__":
    sys.exit(main("denoise_step", cases))
