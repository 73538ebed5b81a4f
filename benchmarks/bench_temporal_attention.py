"""temporal_attention against PyTorch's SDPA. Run: python benchmarks/bench_temporal_attention.py --json rows.jsonl"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from _bench import Case, main
from pylumiere.kernels import temporal_attention as op
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
SHAPES = [(T, sequences // 8) for T in (5, 10, 20, 40, 80) for sequences in (10**3, 10**4, 10**5, 10**6)]
SMOKE = [(5, 7)]
HEADS, D = 8, 64


def sdpa(qkv: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
    """In groups of pixels below 65,535 sequences, which is the limit of some backends."""
    parts = []
    for part in qkv.split(4096, 2):
        q, k, v = part.unflatten(-1, (3, HEADS, D)).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v)
        parts.append(out.unflatten(0, (1, -1)).permute(0, 3, 1, 2, 4).flatten(3))
    return torch.cat(parts, 2)


def cases(device: str, smoke: bool):
    for T, pixels in SMOKE if smoke else SHAPES:
        qkv = torch.randn(1, T, pixels, 3 * HEADS * D, device=device, dtype=torch.float16 if smoke else torch.bfloat16)
        names = ["math"] if smoke else list(BACKENDS)
        yield Case(
            f"T{T}-sequences{pixels * HEADS}",
            lambda x=qkv: op.launch(x, HEADS),
            {name: lambda x=qkv, b=BACKENDS[name]: sdpa(x, b) for name in names},
            lambda x=qkv: op.reference(x.float(), HEADS),
            op.cost(qkv, HEADS),
        )


if __name__ == "__main__":
    sys.exit(main("temporal_attention", cases))
