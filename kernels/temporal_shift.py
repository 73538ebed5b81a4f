"""Temporal shift: some channels of a frame are read from the next or the previous frame.

    y[t, 0 : fold]          = x[t + 1]      "both"      ("causal": x[t - 1])
    y[t, fold : 2 fold]     = x[t - 1]      "both"      ("causal": x[t])
    y[t, 2 fold : C]        = x[t]                      fold = C // n_div

Beyond the ends stand zeros ("zero"), the other end of the clip ("circular"), the end frame itself ("replicate"), or,
where the caller has them, the neighbour frames of a longer clip (the halo). One frame without a halo stays as it is.

The model does not call the kernel below: `ShiftSpec` travels to `spatial_conv`, which reads each channel block from
the frame that `ShiftSpec.channel_blocks` names, so the shift moves no bytes. The kernel is for networks that need
the shifted tensor itself, and states the semantics on its own.

Source: Lin et al. 2019, "TSM: Temporal Shift Module", sec. 3; An et al. 2023, "Latent-Shift".
Bound by memory: x read once, y written once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


DIRECTIONS = ("both", "causal")
PADS = ("zero", "circular", "replicate")


@dataclass(frozen=True)
class ShiftSpec:
    """How the channels of a frame are shifted.

    Args:
        n_div: 1 / n_div of the channels moves in each direction; C // n_div channels, 0 meaning no shift.
        direction: "both" or "causal".
        pad: what lies beyond the ends: "zero", "circular" or "replicate".
    """

    n_div: int = 8
    direction: str = "both"
    pad: str = "zero"

    def __post_init__(self) -> None:
        least = 1 if self.direction == "causal" else 2
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction={self.direction!r} is not one of {DIRECTIONS}")
        if self.pad not in PADS:
            raise ValueError(f"pad={self.pad!r} is not one of {PADS}")
        if self.n_div < least:
            raise ValueError(f"n_div={self.n_div} is below {least}, the least for direction={self.direction!r}")

    def fold(self, channels: int) -> int:
        """Channels that move in each direction."""
        return channels // self.n_div

    def channel_blocks(self, channels: int) -> list[tuple[int, int, int]]:
        """(first channel, end channel, frame offset), ascending, covering [0, channels)."""
        fold = self.fold(channels)
        if fold == 0:
            return [(0, channels, 0)]
        moved = [(0, fold, -1)] if self.direction == "causal" else [(0, fold, 1), (fold, 2 * fold, -1)]
        end = moved[-1][1]
        return moved if end == channels else [*moved, (end, channels, 0)]


# ---- reference -----------------------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    n_div: int = 8,
    direction: str = "both",
    pad: str = "zero",
    before: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    T, C = x.shape[1], x.shape[3]
    if T == 1 and before is None and after is None:
        return x.clone(memory_format=torch.contiguous_format)
    if pad == "circular":
        first, last = x[:, -1:], x[:, :1]
    elif pad == "replicate":
        first, last = x[:, :1], x[:, -1:]
    else:
        first = last = torch.zeros_like(x[:, :1])
    first = first if before is None else before[:, None]
    last = last if after is None else after[:, None]
    framed = torch.cat([first, x, last], 1)  # [B, T + 2, S, C]; frame t stands at t + 1
    blocks = ShiftSpec(n_div, direction, pad).channel_blocks(C)
    return torch.cat([framed[:, 1 + offset : 1 + offset + T, :, c0:c1] for c0, c1, offset in blocks], -1)
