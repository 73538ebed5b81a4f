"""geglu against chunk, F.gelu and a product, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator

from pylumiere.bench.harness import Case, Site
from pylumiere.kernels import geglu
from pylumiere.networks.ops import PlainOps

TABLE = "geglu"
SIZES = {  # tokens, channels of the result: the levels of the public U-Nets for 16 frames, with and without the prompt
    "full": [(32 * 64 * 64, 1280), (32 * 32 * 32, 2560), (32 * 16 * 16, 5120)],
    "small": [(8 * 32 * 32, 1280)],
    "smoke": [(9, 40)],
}


def cases(site: Site) -> Iterator[Case]:
    for tokens, channels in SIZES[site.size]:
        x = site.randn(tokens, 2 * channels)
        yield Case(
            f"{tokens}x{channels}",
            lambda x=x: site.function(geglu)(x),
            {"eager": lambda x=x: PlainOps().geglu(x)},
            lambda x=x: geglu.reference(x[:1000].double()),
            geglu.cost(x),
        )
