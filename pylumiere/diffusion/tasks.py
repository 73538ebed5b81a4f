"""Applications: from a user's pictures, clips and masks to what the networks take. The pipeline knows no application.

The base network reads `<J, C, M>` on its channels: 3 noisy, 3 given pixels, 1 mask. M is 1 where C is given and 0 where
the clip is to be made; C is 0 there. (A user's mask is the other way round, as in other tools: white is made anew.)
Given pixels are also held: at every step the network's idea of them is replaced by C.

    image to video, keyframes   C, M: the given frames, whole
    inpainting, outpainting     C, M: every frame outside the mask, or inside the box that `expand` leaves
    cinemagraph                 C, M: the picture in every frame; all of frame 0, and outside the mask after it
    video to video              start: the clip, noised to the level of `strength`; nothing is given (SDEdit)
    stylised                    weights: a * W_style + (1 - a) * W_orig, see `pylumiere.checkpoints.adapters`

Where a mask or `expand` keeps pixels, they come back in the result: outside the mask the user's pixels, fitted to the
result's size, to the bit. Inside it, over a rim of half a cell of the base's frame (2 pixels for the demo), they fade
into what was made. A pixel that the mask touches in part belongs to the mask.

Source: Bar-Tal et al. 2024, "Lumiere", section 4; Meng et al. 2022, "SDEdit".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pylumiere.errors import InvalidRequest
from pylumiere.media.placement import Placement, place
from pylumiere.request import GenerationRequest


@dataclass(frozen=True)
class Kept:
    """Pixels of the result that are the user's.

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
class Task:
    """All that the pipeline knows of an application.

    Attributes:
        name: of the application, for people.
        pictures: [k, h, w, 4] at the base's size: C in -1..1 and M, each different frame once.
        index: [T], which of the pictures stands beside each frame.
        initial: [T, h, w, 3] that `strength` starts from, or None for pure noise.
        kept: the user's pixels in the result, or None.
        style: name or file of the weights' style and its share, or None.
    """

    name: str
    pictures: Tensor
    index: np.ndarray
    initial: np.ndarray | None = None
    kept: Kept | None = None
    style: tuple[str, float] | None = None

    def given(self, frames: np.ndarray) -> Tensor:
        """C and M, [..., h, w, 4], of the frames at the indices `frames` [...]."""
        return self.pictures[torch.from_numpy(self.index[np.asarray(frames)])]

    @property
    def num_bytes(self) -> int:
        """What it keeps in memory."""
        kept = () if self.kept is None else (self.kept.source, self.kept.made)
        arrays = (self.pictures, self.index, *kept, *(() if self.initial is None else (self.initial,)))
        return sum(array.nbytes for array in arrays)

    @property
    def holds(self) -> bool:
        """Whether any pixel is given."""
        return bool(self.pictures[..., 3].any())

    @property
    def is_free(self) -> bool:
        """Whether nothing ties a frame to its place in the clip: no picture, clip or mask was given."""
        return not self.holds and self.kept is None and self.initial is None

    def settle(self, start: int, low: np.ndarray) -> np.ndarray:
        """The base's frames from `start` on, [n, h, w, 3], with the given pixels in their places."""
        if not self.holds:
            return low
        given = self.given(np.arange(start, start + len(low))).numpy()
        return given[..., :3] + (1 - given[..., 3:]) * low


@dataclass(frozen=True)
class Frame:
    """Sizes: of the result, of the base's frame, and the whole number between them."""

    height: int
    width: int
    scale: int
    num_frames: int

    @property
    def base(self) -> tuple[int, int]:
        return self.height // self.scale, self.width // self.scale

    @property
    def rim(self) -> int:
        """Pixels over which the user's pixels fade into what was made, inside the mask."""
        return max(1, self.scale // 2)

    @property
    def result(self) -> tuple[int, int]:
        return self.height, self.width


def make_task(request: GenerationRequest, frame: Frame) -> Task:
    """The application that a request's fields ask for.

    Raises:
        InvalidRequest: fields that do not fit the clip: a frame outside it, a mask that the fit leaves empty.
    """
    style = None if request.style is None else (str(request.style), request.style_strength)
    if request.video is not None:
        if request.mask is None and not request.expand:
            task = video_to_video(request, frame)
        else:
            task = inpainting(request, frame)
    elif request.image is not None and request.mask is not None:
        task = cinemagraph(request, frame)
    elif request.image is not None or request.keyframes:
        task = keyframes(request, frame)
    else:
        task = Task("text to video", torch.zeros(1, *frame.base, 4), np.zeros(frame.num_frames, np.int32))
    return replace(task, style=style)


def keyframes(request: GenerationRequest, frame: Frame) -> Task:
    """Image to video, and any other set of given frames."""
    given = {}
    if request.image is not None:
        given[0] = request.image
    for index, picture in (request.keyframes or {}).items():
        position = index + frame.num_frames if index < 0 else index
        if not 0 <= position < frame.num_frames:
            raise InvalidRequest(f"keyframes: frame {index} is outside the clip, which has {frame.num_frames} frames")
        if position in given:
            raise InvalidRequest(f"keyframes: frame {position} is given twice")
        given[position] = picture
    index = np.zeros(frame.num_frames, np.int32)
    pictures, placements = [torch.zeros(*frame.base, 4)], []
    for number, (position, picture) in enumerate(given.items(), 1):
        placements.append(place(picture.shape[:2], frame.result, request.fit, request.expand))
        pixels = _base_pixels(picture, frame, request)
        mask = _whole_cells(_shown(placements[-1]), frame)
        pictures.append(torch.cat([pixels * mask, mask], -1))
        index[position] = number
        name = "image to video" if list(given) == [0] else "keyframes"
    return Task(name, torch.stack(pictures), index, kept=_black_bars(placements))


def inpainting(request: GenerationRequest, frame: Frame) -> Task:
    """Every frame is given where the mask is black and, with `expand`, inside the box."""
    placement = place(request.video.shape[1:3], frame.result, request.fit, request.expand)
    masks = _masks(request.mask, placement, frame)
    kept = Kept(request.video, placement, _made(masks, placement, frame.rim))
    pictures = []
    for number, pixels in enumerate(request.video):
        keep = _whole_cells(_shown(placement) * ~masks[number % len(masks)], frame)
        pictures.append(torch.cat([_base_pixels(pixels, frame, request) * keep, keep], -1))
    stacked = torch.stack(pictures)
    if not stacked[..., 3].any():
        raise InvalidRequest("mask: nothing of the video is left to keep in the network's small frames")
    initial = None if request.strength == 1.0 else _start(request, frame)
    name = "inpainting" if request.mask is not None else "outpainting"
    index = np.arange(frame.num_frames, dtype=np.int32)
    return Task(name, stacked, index, initial, kept)


def cinemagraph(request: GenerationRequest, frame: Frame) -> Task:
    """The picture stands still outside the mask; inside it moves. All of frame 0 is given."""
    placement = place(request.image.shape[:2], frame.result, request.fit, request.expand)
    masks = _masks(request.mask, placement, frame)
    pixels, shown = _base_pixels(request.image, frame, request), _shown(placement)
    whole = _whole_cells(shown, frame)
    pictures = [torch.cat([pixels * whole, whole], -1)]
    for mask in masks:
        keep = _whole_cells(shown * ~mask, frame)
        pictures.append(torch.cat([pixels * keep, keep], -1))
    index = 1 + np.arange(frame.num_frames, dtype=np.int32) % len(masks)
    index[0] = 0
    kept = Kept(request.image[None], placement, _made(masks, placement, frame.rim))
    return Task("cinemagraph", torch.stack(pictures), index, kept=kept)


def video_to_video(request: GenerationRequest, frame: Frame) -> Task:
    """SDEdit: nothing is given; the clip is where the noise starts."""
    placement = place(request.video.shape[1:3], frame.result, request.fit)
    blank = torch.zeros(1, *frame.base, 4)
    index = np.zeros(frame.num_frames, np.int32)
    return Task("video to video", blank, index, _start(request, frame), kept=_black_bars([placement]))


# ---- pixels ---------------------------------------------------------------------------------------------------------


def _base_pixels(picture: np.ndarray, frame: Frame, request: GenerationRequest) -> Tensor:
    """A picture at the base's size, [h, w, 3] in -1..1.

    By way of the result's size, so that it lies where the result will show it; a picture that is smaller than the
    result goes there directly and is not blurred twice.
    """
    direct = request.fit != "pad" and not request.expand
    if direct and min(have / want for have, want in zip(picture.shape, frame.result, strict=False)) < 1:
        return torch.from_numpy(place(picture.shape[:2], frame.base, request.fit).apply(picture)) * 2 - 1
    fitted = torch.from_numpy(place(picture.shape[:2], frame.result, request.fit, request.expand).apply(picture))
    return _pooled(fitted, frame.scale) * 2 - 1


def _start(request: GenerationRequest, frame: Frame) -> np.ndarray:
    return torch.stack([_base_pixels(picture, frame, request) for picture in request.video]).numpy()


def _pooled(pixels: Tensor, scale: int) -> Tensor:
    """Means of scale x scale pixels: [H, W, C] -> [h, w, C]."""
    return F.avg_pool2d(pixels.permute(2, 0, 1)[None], scale)[0].permute(1, 2, 0)


def _shown(placement: Placement) -> np.ndarray:
    """[H, W, 1] bool: where the frame shows the picture."""
    shown = np.zeros((*placement.frame, 1), bool)
    shown[placement.inner] = True
    return shown


def hold(out: Tensor, noisy: Tensor, given: Tensor, u: float, v: float) -> Tensor:
    """A network's output with which the step's x0 = u * noisy + v * out is C wherever M is 1.

    Args:
        out, noisy: [..., 3]. given: [..., 4], C and M.
    """
    pixels, mask = given[..., :3], given[..., 3:]
    return torch.where(mask > 0, (pixels - u * noisy) / v, out)


def _masks(mask: np.ndarray | None, placement: Placement, frame: Frame) -> np.ndarray:
    """[j, H, W, 1] bool at the result's size, True where it is made anew, j of 1 or T; the margins of `expand` too."""
    margins = np.ones((*placement.frame, 1), bool)
    margins[placement.box] = False
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


def _whole_cells(keep: np.ndarray, frame: Frame) -> Tensor:
    """[H, W, 1] bool at the result's size as M at the base's: 1 where all of a cell is kept."""
    return (_pooled(torch.from_numpy(keep.astype(np.float32)), frame.scale) > 1 - 1e-4).float()


def _made(masks: np.ndarray, placement: Placement, rim: int) -> np.ndarray:
    """[j, H, W, 1] float32: 0 outside the mask and on bars; 1 inside the mask, after rising over `rim` pixels of it."""
    near = torch.from_numpy(~masks).permute(0, 3, 1, 2).float()
    depth = torch.zeros_like(near)
    for _ in range(rim + 1):
        depth += 1 - near
        near = F.max_pool2d(near, 3, 1, 1)
    made = (depth / (rim + 1)).permute(0, 2, 3, 1).contiguous().numpy()
    return np.where(_bars(placement), np.float32(0), made)


def _bars(placement: Placement) -> np.ndarray:
    """[H, W, 1] bool: what `pad` leaves of the box."""
    bars = np.zeros((*placement.frame, 1), bool)
    bars[placement.box] = True
    bars[placement.inner] = False
    return bars


def _black_bars(placements: list[Placement]) -> Kept | None:
    """Black bars in every frame, where all given pictures have them."""
    bars = np.logical_and.reduce([_bars(placement) for placement in placements])
    if not bars.any():
        return None
    whole = place(placements[0].frame, placements[0].frame)
    return Kept(np.zeros((1, *whole.frame, 3), np.uint8), whole, np.where(bars, 0, 1).astype(np.float32)[None])
