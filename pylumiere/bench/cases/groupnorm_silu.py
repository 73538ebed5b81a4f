"""groupnorm_silu against F.group_norm and F.silu, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

from pylumiere.bench.harness import Case, Site
from pylumiere.kernels import groupnorm_silu

TABLE = "groupnorm_silu"
SIZES = {  # batch, frames, pixels, channels, groups
    "full": [
        (1, 80, 128 * 128, 320, 32), (1, 8, 256 * 256, 192, 32), (1, 40, 64 * 64, 640, 32), (1, 10, 16 * 16, 1280, 32),
    ],
    "small": [(1, 8, 32 * 32, 64, 4)],
    "smoke": [(1, 2, 20, 64, 4)],
}  # fmt: skip


def cases(site: Site) -> Iterator[Case]:
    for *shape, groups in SIZES[site.size]:
        x, weight, bias = site.randn(*shape), site.randn(shape[-1]), site.randn(shape[-1])
        args = (weight, bias, groups)

        def eager(x=x, args=args):
            weight, bias, groups = args
            frames = x.flatten(0, 1).transpose(1, 2).unsqueeze(-1)  # [N, C, S, 1], channels-last
            normed = F.group_norm(frames, groups, weight, bias)
            return F.silu(normed).squeeze(-1).transpose(1, 2).unflatten(0, x.shape[:2])

        yield Case(
            "x".join(map(str, shape)),
            lambda x=x, args=args: site.function(groupnorm_silu)(x, *args),
            {"eager": eager},
            lambda x=x, args=args: groupnorm_silu.reference(x[:, :1].double(), *args),
            groupnorm_silu.cost(x, *args),
        )
