"""layer_norm against F.layer_norm, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

from pylumiere.bench.harness import Case, Site
from pylumiere.kernels import layer_norm

TABLE = "layer_norm"
SIZES = {  # tokens, channels: the levels of the public U-Nets for 16 frames, with and without the prompt
    "full": [(32 * 64 * 64, 320), (32 * 32 * 32, 640), (32 * 16 * 16, 1280)],
    "small": [(8 * 32 * 32, 320)],
    "smoke": [(9, 40)],
}


def cases(site: Site) -> Iterator[Case]:
    for tokens, channels in SIZES[site.size]:
        x, weight, bias = site.randn(tokens, channels), site.randn(channels), site.randn(channels)
        yield Case(
            f"{tokens}x{channels}",
            lambda args=(x, weight, bias): site.function(layer_norm)(*args),
            {"eager": lambda x=x, w=weight, b=bias: F.layer_norm(x, w.shape, w, b)},
            lambda args=(x[:1000], weight, bias): layer_norm.reference(*(v.double() for v in args)),
            layer_norm.cost(x, weight, bias),
        )
