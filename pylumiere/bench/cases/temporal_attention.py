"""temporal_attention against PyTorch's SDPA, each of its backends."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pylumiere.bench.harness import Case, Site
from pylumiere.kernels import temporal_attention

TABLE = "temporal_attention"
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
HEADS, D = 8, 64
SIZES = {  # frames, sequences
    "full": [(frames, sequences) for frames in (5, 10, 20, 40, 80) for sequences in (10**3, 10**4, 10**5, 10**6)],
    "small": [(10, 512), (20, 512)],
    "smoke": [(5, 56)],
}


def sdpa(qkv: torch.Tensor, backend: SDPBackend | None) -> torch.Tensor:
    """In groups of pixels below 65,535 sequences, which is the limit of some backends; None lets PyTorch choose."""
    parts = []
    for part in qkv.split(4096, 2):
        q, k, v = part.unflatten(-1, (3, HEADS, D)).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
        if backend is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v)
        parts.append(out.unflatten(0, (1, -1)).permute(0, 3, 1, 2, 4).flatten(3))
    return torch.cat(parts, 2)


def cases(site: Site) -> Iterator[Case]:
    names = list(BACKENDS) if site.size == "full" else ["math"]
    for frames, sequences in SIZES[site.size]:
        qkv = site.randn(1, frames, sequences // HEADS, 3 * HEADS * D)
        yield Case(
            f"T{frames}-sequences{sequences}",
            lambda x=qkv: site.function(temporal_attention)(x, HEADS),
            {name: lambda x=qkv, b=BACKENDS[name]: sdpa(x, b) for name in names},
            lambda x=qkv: temporal_attention.reference(x[:, :, :1000].double(), HEADS),
            temporal_attention.cost(qkv, HEADS),
            compiled=lambda x=qkv: sdpa(x, None),
        )
