"""groupnorm_silu against eager and torch.compile. Run: python benchmarks/bench_groupnorm_silu.py --json rows.jsonl"""

from __future__ import annotations

import sys

import torch
from _bench import Case, main
from pylumiere.kernels import groupnorm_silu as op

SHAPES = [(1, 80, 128 * 128, 320), (1, 80, 256 * 256, 64), (1, 40, 64 * 64, 640), (1, 10, 16 * 16, 1280)]
SMOKE = [(1, 2, 20, 64)]


def cases(device: str, smoke: bool):
    for shape in SMOKE if smoke else SHAPES:
        x = torch.randn(*shape, device=device, dtype=torch.float16 if smoke else torch.bfloat16)
        weight, bias = torch.randn(2, shape[-1], device=device).to(x.dtype)
        args = (weight, bias, 32)
        rivals = {"eager": lambda x=x, args=args: op.reference(x, *args)}
        if not smoke:
            compiled = torch.compile(op.reference)
            rivals["compile"] = lambda x=x, args=args, compiled=compiled: compiled(x, *args)
        yield Case(
            "x".join(map(str, shape)),
            lambda x=x, args=args: op.launch(x, *args),
            rivals,
            lambda x=x, args=args: op.reference(x[:, :1].double(), *args),
            op.cost(x, *args),
        )


if __name__ == "__main__":
    sys.exit(main("groupnorm_silu", cases))
