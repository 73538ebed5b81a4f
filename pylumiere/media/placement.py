"""Where a picture lies in a frame of another shape, and its pixels there.

`fit` says how it goes in:

    crop     scaled until it covers the frame, the middle kept
    pad      scaled until all of it is inside, in the middle; the bars beside it are black and are no part of it
    stretch  scaled to the frame, each side by itself
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pylumiere.errors import InvalidRequest
from pylumiere.request import EDGES, MIN_SIDE

Fit = Literal["crop", "pad", "stretch"]


@dataclass(frozen=True)
class Placement:
    """Where a picture of one size lies in a frame of another.

    Attributes:
        frame: height and width of the frame.
        box: rows and columns of the frame that the picture was fitted to.
        inner: rows and columns that show it: the box without the bars that `pad` leaves.
        scaled: height and width that the picture is scaled to; its middle part is shown.
    """

    frame: tuple[int, int]
    box: tuple[slice, slice]
    inner: tuple[slice, slice]
    scaled: tuple[int, int]

    @property
    def shown(self) -> np.ndarray:
        """[*frame, 1] bool: where the frame shows the picture."""
        shown = np.zeros((*self.frame, 1), bool)
        shown[self.inner] = True
        return shown

    @property
    def margins(self) -> np.ndarray:
        """[*frame, 1] bool: what is left free beside the box."""
        margins = np.ones((*self.frame, 1), bool)
        margins[self.box] = False
        return margins

    @property
    def bars(self) -> np.ndarray:
        """[*frame, 1] bool: what `pad` leaves of the box."""
        return ~(self.shown | self.margins)

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """[H, W, C] uint8 or float in 0..1 as float32 [*frame, C]. Bars are 0; beside the box its edge goes on."""
        import torch
        import torch.nn.functional as F

        pixels = picture.astype(np.float32)
        if picture.dtype == np.uint8:
            pixels = pixels / np.float32(255)
        if pixels.shape[:2] != self.scaled:
            planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
            planes = F.interpolate(planes, self.scaled, mode="bilinear", antialias=True)
            pixels = planes[0].permute(1, 2, 0).numpy()
        height, width = (s.stop - s.start for s in self.inner)
        y, x = (self.scaled[0] - height) // 2, (self.scaled[1] - width) // 2
        pixels = pixels[y : y + height, x : x + width]
        bars = [(i.start - b.start, b.stop - i.stop) for i, b in zip(self.inner, self.box, strict=True)]
        margins = [(b.start, size - b.stop) for b, size in zip(self.box, self.frame, strict=True)]
        pixels = np.pad(pixels, [*bars, (0, 0)])
        return np.ascontiguousarray(np.pad(pixels, [*margins, (0, 0)], mode="edge"))

    def cover(self, mask: np.ndarray) -> np.ndarray:
        """[H, W] bool as bool [*frame]: pixels that a True pixel touches with any of its area; False beside `inner`."""
        for axis in (0, 1):
            size, scaled, shown = mask.shape[axis], self.scaled[axis], self.inner[axis].stop - self.inner[axis].start
            first = (scaled - shown) // 2
            edges = np.arange(first, first + shown + 1) * (size / scaled)
            low = np.floor(edges[:-1] + 1e-6).astype(int)
            high = np.maximum(low + 1, np.ceil(edges[1:] - 1e-6).astype(int))
            counts = np.cumsum(np.insert(mask.astype(np.int64), 0, 0, axis), axis)
            mask = counts.take(high, axis) > counts.take(low, axis)
        covered = np.zeros(self.frame, bool)
        covered[self.inner] = mask
        return covered


def place(
    picture: tuple[int, int], frame: tuple[int, int], fit: Fit = "crop", expand: Mapping[str, int] | None = None
) -> Placement:
    """The placement of a picture of (height, width) in a frame of (height, width).

    Args:
        expand: pixels of the frame at its edges that the picture leaves free.

    Raises:
        InvalidRequest: nothing of the frame is left.
    """
    edges = {edge: (expand or {}).get(edge, 0) for edge in EDGES}
    rows, columns = (edges["top"], frame[0] - edges["bottom"]), (edges["left"], frame[1] - edges["right"])
    size = (rows[1] - rows[0], columns[1] - columns[0])
    if min(size) < MIN_SIDE:
        raise InvalidRequest(
            f"expand={_edges_text(edges)}: the frame is {frame[1]} x {frame[0]} (width x height), "
            "which leaves no place for the picture"
        )
    box = slice(*rows), slice(*columns)
    if fit == "stretch":
        return Placement(frame, box, box, size)
    scales = [have / want for have, want in zip(size, picture, strict=True)]
    scale = max(scales) if fit == "crop" else min(scales)
    scaled = tuple(max(1, round(side * scale)) for side in picture)
    if fit == "crop":
        return Placement(frame, box, box, tuple(map(max, scaled, size)))
    scaled = tuple(map(min, scaled, size))
    starts = [b.start + (have - want) // 2 for b, have, want in zip(box, size, scaled, strict=True)]
    inner = tuple(slice(start, start + side) for start, side in zip(starts, scaled, strict=True))
    return Placement(frame, box, inner, scaled)


def square_pixels(frame: np.ndarray, aspect: float, step: int = 1) -> np.ndarray:
    """A frame [H, W, 3] uint8 with square pixels: wider, to a multiple of `step`, where its pixels are wider than high.
    `aspect` is their width over their height."""
    if abs(aspect - 1) < 0.01:
        return frame
    height, width = frame.shape[:2]
    size = height, max(MIN_SIDE, round(width * aspect / step) * step)
    return (place((height, width), size, "stretch").apply(frame) * 255 + 0.5).astype(np.uint8)


def _edges_text(edges: Mapping[str, int]) -> str:
    return ",".join(f"{edge}={pixels}" for edge, pixels in edges.items() if pixels)
