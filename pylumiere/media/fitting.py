"""A request's pictures, clip and mask, fitted to one frame. This happens once; what comes after has arrays only.

Three sizes meet here: that of what the user gave (H', W'), that of the result (H, W) and that of the first network's
frame (h, w). One position of the last is a cell: `scale` x `scale` pixels of the result. A pixel that the mask touches
in part belongs to the mask, and so does a cell.

Where a mask or `expand` keeps pixels, they come back in the result: outside the mask the user's pixels, fitted to the
result's size, to the bit. Inside it, over a rim of half a cell, they fade into what was made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from pylumiere.errors import InvalidRequest
from pylumiere.media.placement import Placement, place
from pylumiere.request import GenerationRequest


@dataclass(frozen=True)
class Frame:
    """Sizes: of the result, the whole number of its pixels along a cell, and the clip's length.

    Height and width are multiples of the scale.
    """

    height: int
    width: int
    scale: int
    num_frames: int

    @property
    def result(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width of the first network's frame."""
        return self.height // self.scale, self.width // self.scale

    @property
    def rim(self) -> int:
        """Pixels over which the user's pixels fade into what was made, inside the mask."""
        return max(1, self.scale // 2)


@dataclass(frozen=True)
class Kept:
    """Pixels of the result that are the user's. They are placed as they are needed: a clip is not held as floats.

    Attributes:
        source: [k, H', W', 3], the user's pictures as they came; frame t shows `source[t % k]`, k is 1 or T.
        placement: where they lie in the result.
        made: [j, H, W, 1] float32, the share of what was made: 0 is the user's pixel; j is 1 or T.
    """

    source: np.ndarray
    placement: Placement
    made: np.ndarray

    def compose(self, start: int, clip: np.ndarray) -> np.ndarray:
        """The frames from `start` on, [n, H, W, 3] float32 in -1..1, with the user's pixels in their places."""
        out = np.empty_like(clip)
        for i, frame in enumerate(clip):
            mine = self.placement.apply(self.source[(start + i) % len(self.source)]) * np.float32(2) - np.float32(1)
            share = self.made[(start + i) % len(self.made)]
            # Not mine + share * (frame - mine): at 0 and at 1 the result is one of the two to the bit.
            out[i] = share * frame + (1 - share) * mine
        return out


@dataclass(frozen=True)
class Fitted:
    """What a user gave, as arrays for one frame: k pictures, which are the k frames of a clip where that was given.

    Attributes:
        sources: as they came: each picture [1, H', W', 3], or the clip [k, H', W', 3].
        placements: where each source lies in the result.
        positions: [k], which frame of the result each picture is.
        pixels: [k, h, w, 3] float32 in -1..1, the pictures at the first network's size; k is 0 for a text alone.
        whole: [k, h, w, 1] float32, 1 where a cell shows nothing but the picture.
        masks: [j, H, W, 1] bool, True where the result is made anew: the mask, and what `expand` adds; j is 1 or T.
        unmasked: [j, h, w, 1] float32, 1 where nothing of a cell is made anew.
    """

    frame: Frame
    sources: tuple[np.ndarray, ...]
    placements: tuple[Placement, ...]
    positions: np.ndarray
    pixels: np.ndarray
    whole: np.ndarray
    masks: np.ndarray
    unmasked: np.ndarray

    def kept(self) -> Kept:
        """The user's pixels outside the mask, and the bars beside them; of one picture or clip."""
        (source,), (placement,) = self.sources, self.placements
        made = _rising(self.masks, self.frame.rim)
        return Kept(source, placement, np.where(placement.bars, np.float32(0), made))

    def black_bars(self) -> Kept | None:
        """Black bars in every frame, where all pictures have them."""
        bars = [placement.bars for placement in self.placements]
        if not bars or not (black := np.logical_and.reduce(bars)).any():
            return None
        size = self.frame.result
        return Kept(np.zeros((1, *size, 3), np.uint8), place(size, size), (~black).astype(np.float32)[None])


def fit(request: GenerationRequest, frame: Frame) -> Fitted:
    """Fits all that the request gives of pictures.

    Raises:
        InvalidRequest: a keyframe outside the clip or given twice, edges to `expand` that leave no place, a mask of
            another length than the clip, or of which nothing, or nothing but white, is left in the frame.
    """
    positions, sources = _given(request, frame.num_frames)
    placements = tuple(place(source.shape[1:3], frame.result, request.fit, request.expand) for source in sources)
    masks = _masks(request.mask, placements, frame)
    pixels, whole = [np.zeros((0, *frame.cells, 3), np.float32)], [np.zeros((0, *frame.cells, 1), np.float32)]
    for source, placement in zip(sources, placements, strict=True):
        pixels.append(_network_pixels(source, placement, request, frame))
        whole.append(np.repeat(_whole_cells(placement.shown[None], frame), len(source), 0))
    return Fitted(
        frame, sources, placements, positions, np.concatenate(pixels), np.concatenate(whole), masks,
        _whole_cells(~masks, frame),
    )  # fmt: skip


def _given(request: GenerationRequest, num_frames: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Which frames are given, and the sources that show them."""
    if request.video is not None:
        return np.arange(len(request.video)), (request.video,)
    given = {}
    if request.image is not None:
        given[0] = request.image
    for index, picture in (request.keyframes or {}).items():
        position = index + num_frames if index < 0 else index
        if not 0 <= position < num_frames:
            raise InvalidRequest(f"keyframes: frame {index} is outside the clip, which has {num_frames} frames")
        if position in given:
            raise InvalidRequest(f"keyframes: frame {position} is given twice")
        given[position] = picture
    return np.array(list(given), np.int64), tuple(picture[None] for picture in given.values())


def _masks(mask: np.ndarray | None, placements: tuple[Placement, ...], frame: Frame) -> np.ndarray:
    """`Fitted.masks`. The margins are those of every picture; beside a mask there is one picture or clip."""
    if not placements:
        return np.zeros((1, *frame.result, 1), bool)
    placement = placements[0]
    margins = placement.margins
    if mask is None:
        return margins[None]
    layers = mask.reshape(-1, *mask.shape[-2:]) > 0
    if len(layers) not in (1, frame.num_frames):
        raise InvalidRequest(f"mask has {len(layers)} frames and the clip {frame.num_frames}; give equal numbers")
    fitted = np.stack([placement.cover(layer) for layer in layers])
    inside = fitted[:, placement.inner[0], placement.inner[1]]
    if not inside.any() and not margins.any():
        raise InvalidRequest("mask: nothing white is left of it in the frame, so there is nothing to make")
    if inside.all():
        raise InvalidRequest("mask: all that is left of it in the frame is white, so nothing would be kept")
    return margins | fitted[..., None]


def _network_pixels(source: np.ndarray, placement: Placement, request: GenerationRequest, frame: Frame) -> np.ndarray:
    """[n, H', W', 3] at the first network's size, [n, h, w, 3] in -1..1.

    By way of the result's size, so that a picture lies where the result will show it; one that is smaller than the
    result and fills it goes there directly and is not blurred twice.
    """
    size = source.shape[1:3]
    is_smaller = any(have < want for have, want in zip(size, frame.result, strict=True))
    if is_smaller and request.fit != "pad" and not request.expand:
        direct = place(size, frame.cells, request.fit)
        small = [direct.apply(picture) for picture in source]
    else:
        small = [_cell_means(placement.apply(picture), frame.scale) for picture in source]
    return np.stack(small) * np.float32(2) - np.float32(1)


def _cell_means(pixels: np.ndarray, scale: int) -> np.ndarray:
    """[H, W, C] -> [h, w, C]."""
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return F.avg_pool2d(planes, scale)[0].permute(1, 2, 0).numpy()


def _whole_cells(pixels: np.ndarray, frame: Frame) -> np.ndarray:
    """[n, H, W, 1] bool as [n, h, w, 1] float32: 1 where all pixels of a cell are True."""
    rows, columns = frame.cells
    cells = pixels.reshape(len(pixels), rows, frame.scale, columns, frame.scale, 1)
    return cells.all((2, 4)).astype(np.float32)


def _rising(masks: np.ndarray, rim: int) -> np.ndarray:
    """[j, H, W, 1] bool as float32: 0 outside the mask; inside it 1, after rising over `rim` pixels."""
    near = torch.from_numpy(~masks).permute(0, 3, 1, 2).float()
    depth = torch.zeros_like(near)
    for _ in range(rim + 1):
        depth += 1 - near
        near = F.max_pool2d(near, 3, 1, 1)
    return (depth / (rim + 1)).permute(0, 2, 3, 1).contiguous().numpy()
