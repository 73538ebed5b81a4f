"""temporal_shift alone: the shifted tensor itself, which the networks never ask for."""

from __future__ import annotations

from collections.abc import Iterator

from pylumiere.bench.harness import Case, Site
from pylumiere.kernels import temporal_shift
from pylumiere.networks.ops import Shift, shift_frames

TABLE = "temporal_shift"
SIZES = {  # batch, frames, pixels, channels
    "full": [(1, 80, 128 * 128, 320), (1, 8, 256 * 256, 192), (1, 80, 64 * 64, 640)],
    "small": [(1, 16, 32 * 32, 64)],
    "smoke": [(1, 3, 10, 24)],
}


def cases(site: Site) -> Iterator[Case]:
    for shape in SIZES[site.size]:
        x = site.randn(*shape)
        yield Case(
            "x".join(map(str, shape)),
            lambda x=x: site.function(temporal_shift)(x),
            {"eager": lambda x=x: shift_frames(x[:, :, None], Shift()).squeeze(2)},
            lambda x=x: temporal_shift.reference(x[:, :2])[:, :1],
            temporal_shift.cost(x),
        )
