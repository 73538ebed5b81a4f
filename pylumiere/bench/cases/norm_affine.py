"""Channel statistics, the pass that a folded GroupNorm needs. Bound by one read of the tensor.

The rival reads it as often as eager does: var_mean over pixels in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pylumiere.bench.harness import Case, Site
from pylumiere.kernels import norm_affine

TABLE = "channel_statistics"
SIZES = {  # frames, pixels, channels
    "full": [(80, 128 * 128, 320), (40, 64 * 64, 640), (8, 256 * 256, 192), (10, 16 * 16, 1280)],
    "small": [(8, 32 * 32, 64)],
    "smoke": [(2, 70, 32)],
}


def cases(site: Site) -> Iterator[Case]:
    ours = norm_affine.launch_statistics if site.runs_kernels else norm_affine.statistics_reference
    for frames, pixels, channels in SIZES[site.size]:
        x = site.randn(frames, pixels, channels)

        def eager(x=x):
            variance, mean = torch.var_mean(x.float(), 1, correction=0)
            return torch.stack([mean, variance * x.shape[1]], 1)

        yield Case(
            f"{frames}x{pixels}x{channels}",
            lambda x=x: ours(x),
            {"eager": eager},
            lambda x=x: norm_affine.statistics_reference(x[:1].double()),
            norm_affine.cost(x),
        )
