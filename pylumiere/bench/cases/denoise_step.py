"""denoise_step: guidance, window average, update and noise of one sampler step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pylumiere.bench.harness import Case, Site
from pylumiere.kernels import denoise_step

TABLE = "denoise_step"
SIZES = {  # frames, positions, outputs
    "full": [(80, 128 * 128 * 3, 2), (8, 1024 * 1024 * 3, 1)],
    "small": [(16, 64 * 64 * 3, 2)],
    "smoke": [(2, 100, 2)],
}


def cases(site: Site) -> Iterator[Case]:
    device = site.device
    for F, P, G in SIZES[site.size]:
        rows = torch.arange(F, dtype=torch.int32, device=device)[:, None]
        coef = torch.tensor([1.2, -0.6, 0.7, 0.3, 0.1, 0.2, 7.5, 1.0, 1.0, 1.0], device=device).repeat(F, 1)
        key = torch.zeros(F, 5, dtype=torch.int64, device=device)
        key[:, 3] = torch.arange(F)
        x, prev = (torch.randn(F, P, device=device) for _ in range(2))
        args = (x, prev, site.randn(G, F, P), rows, torch.ones(F, 1, device=device), coef, key)

        def reference(args=args):
            return denoise_step.reference(*args)[0]

        yield Case(
            f"{F}x{P}-G{G}",
            lambda args=args: site.function(denoise_step)(*args)[0],
            {} if device == "cuda" or not site.runs_kernels else {"eager": reference},  # it asks the device for a mask
            reference,
            denoise_step.cost(*args),
            compiled=reference,
        )
