"""Applications: from a user's pictures, clips and masks to what the networks take. The plan knows no application.

The first network reads `<J, C, M>` on its channels: noisy, given, and one of the mask. M is 1 where C is given and 0
where the clip is to be made; C is 0 there. (A user's mask is the other way round, as in other tools: white is made
anew.) What is given is also held: at every step the network's idea of it is replaced by C.

    image to video, keyframes   C, M: the given frames, whole
    inpainting, outpainting     C, M: every frame outside the mask, or inside the box that `expand` leaves
    cinemagraph                 C, M: the picture in every frame; all of frame 0, and outside the mask after it
    video to video              start: the clip, noised to the level of `strength`; nothing is given (SDEdit)
    stylised                    weights: a * W_style + (1 - a) * W_orig, see `pylumiere.checkpoints.adapters`

Pictures come as arrays of one size, see `pylumiere.media.fitting`; here they are only put together.

Source: Bar-Tal et al. 2024, "Lumiere", section 4; Meng et al. 2022, "SDEdit".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pylumiere.errors import InvalidRequest
from pylumiere.media.fitting import Fitted, Kept
from pylumiere.request import GenerationRequest

# Names of applications: those that need no network with channels for C and M, and those that do.
FREE = ("text to video", "video to video")
GIVEN = ("image to video", "keyframes", "cinemagraph", "inpainting", "outpainting")


@dataclass(frozen=True)
class Task:
    """All that the pipeline knows of an application.

    Attributes:
        name: of the application, for people.
        pictures: [k, h, w, C + 1] at the first network's size: C (pixels in -1..1) and M, each different frame once.
        index: [T], which of the pictures stands beside each frame.
        initial: [T, h, w, C] that `strength` starts from, or None for pure noise.
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
        """C and M, [..., h, w, C + 1], of the frames at the indices `frames` [...]."""
        return self.pictures[torch.from_numpy(self.index[np.asarray(frames)])]

    @property
    def num_bytes(self) -> int:
        """What it keeps in memory."""
        kept = () if self.kept is None else (self.kept.source, self.kept.made)
        arrays = (self.pictures, self.index, *kept, *(() if self.initial is None else (self.initial,)))
        return sum(array.nbytes for array in arrays)

    @property
    def holds(self) -> bool:
        """Whether anything is given."""
        return bool(self.pictures[..., -1].any())

    @property
    def is_free(self) -> bool:
        """Whether nothing ties a frame to its place in the clip: no picture, clip or mask was given."""
        return not self.holds and self.kept is None and self.initial is None

    def settle(self, start: int, low: np.ndarray) -> np.ndarray:
        """The first network's frames from `start` on, [n, h, w, C], with what is given in its places."""
        if not self.holds:
            return low
        given = self.given(np.arange(start, start + len(low))).numpy()
        return given[..., :-1] + (1 - given[..., -1:]) * low


def make_task(request: GenerationRequest, fitted: Fitted) -> Task:
    """The application that a request's fields ask for; `fitted` is what `fit` makes of them.

    Raises:
        InvalidRequest: a mask that leaves nothing to keep at the first network's size.
    """
    if request.video is not None:
        if request.mask is None and not request.expand:
            task = video_to_video(fitted)
        else:
            task = inpainting(request, fitted)
    elif request.image is not None and request.mask is not None:
        task = cinemagraph(fitted)
    elif request.image is not None or request.keyframes:
        task = keyframes(fitted)
    else:
        task = Task("text to video", _blank(fitted), np.zeros(fitted.frame.num_frames, np.int32))
    style = None if request.style is None else (str(request.style), request.style_strength)
    return replace(task, style=style)


def keyframes(fitted: Fitted) -> Task:
    """Image to video, and any other set of given frames."""
    pictures = torch.cat([_blank(fitted), _pictures(fitted.pixels, fitted.whole)])
    index = np.zeros(fitted.frame.num_frames, np.int32)
    index[fitted.positions] = np.arange(1, len(pictures))
    name = "image to video" if fitted.positions.tolist() == [0] else "keyframes"
    return Task(name, pictures, index, kept=fitted.black_bars())


def inpainting(request: GenerationRequest, fitted: Fitted) -> Task:
    """Every frame is given where the mask is black and, with `expand`, inside the box."""
    keep = fitted.whole * fitted.unmasked
    if not keep.any():
        raise InvalidRequest("mask: nothing of the video is left to keep in the network's small frames")
    name = "inpainting" if request.mask is not None else "outpainting"
    index = np.arange(fitted.frame.num_frames, dtype=np.int32)
    initial = None if request.strength == 1.0 else fitted.pixels
    return Task(name, _pictures(fitted.pixels, keep), index, initial, fitted.kept())


def cinemagraph(fitted: Fitted) -> Task:
    """The picture stands still outside the mask; inside it moves. All of frame 0 is given."""
    keep = np.concatenate([fitted.whole, fitted.whole * fitted.unmasked])
    index = 1 + np.arange(fitted.frame.num_frames, dtype=np.int32) % len(fitted.unmasked)
    index[0] = 0
    return Task("cinemagraph", _pictures(fitted.pixels, keep), index, kept=fitted.kept())


def video_to_video(fitted: Fitted) -> Task:
    """SDEdit: nothing is given; the clip is where the noise starts."""
    index = np.zeros(fitted.frame.num_frames, np.int32)
    return Task("video to video", _blank(fitted), index, fitted.pixels, kept=fitted.black_bars())


def _pictures(pixels: np.ndarray, keep: np.ndarray) -> Tensor:
    """C and M, [k, h, w, C + 1]: pixels [k or 1, h, w, C] where `keep` [k, h, w, 1] is 1."""
    return torch.from_numpy(np.concatenate([pixels * keep, keep], -1))


def _blank(fitted: Fitted) -> Tensor:
    """C and M of a frame of which nothing is given, [1, h, w, C + 1]."""
    _, height, width, channels = fitted.pixels.shape
    return torch.zeros(1, height, width, channels + 1)


def hold(out: Tensor, noisy: Tensor, given: Tensor, u: float, v: float) -> Tensor:
    """A network's output with which the step's x0 = u * noisy + v * out is C wherever M is 1.

    Args:
        out, noisy: [..., C]. given: [..., C + 1], C and M.
    """
    values, mask = given[..., :-1], given[..., -1:]
    return torch.where(mask > 0, (values - u * noisy) / v, out)
