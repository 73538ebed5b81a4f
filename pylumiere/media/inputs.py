"""A user's pictures, clips and masks, from files or their bytes, as arrays of a request.

What is read how: docs/inputs.md. A clip that comes evenly is left as it is; one of varying rate is read at its average,
each frame standing until the next comes. Sizes are checked before pixels are decoded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pylumiere.arrays import moves, rgb
from pylumiere.errors import InvalidRequest, VideoError, one_line
from pylumiere.media.pictures import open_picture
from pylumiere.media.placement import square_pixels
from pylumiere.media.readers import LIMITS, Limits, VideoReader, is_pipe
from pylumiere.request import EDGES, MIN_SIDE

Source = str | os.PathLike | bytes


def read_image(source: Source, limits: Limits = LIMITS) -> np.ndarray:
    """One picture, or the first frame of a clip: [H, W, 3] uint8.

    Raises:
        VideoError: no such file, no picture, damaged, too large, or smaller than 2 x 2.
    """
    pixels = _read_picture(source, limits)
    if pixels is None:
        with VideoReader(source, limits) as reader:
            frame = next(iter(reader))
            pixels = square_pixels(frame, reader.pixel_aspect)
    _check_side(source, pixels)
    return pixels


def read_clip(
    source: Source, fps: float | None = None, max_frames: int | None = None, limits: Limits = LIMITS
) -> tuple[np.ndarray, float | None]:
    """A clip as [T, H, W, 3] uint8, and its frames a second (None for pictures and folders of pictures).

    Args:
        fps: rate to read it at; its own, or the average of a varying one, if None.
        max_frames: stop there; the rest is not decoded.

    Raises:
        VideoError: no such file, no video in it, no frames, damaged, too large, or smaller than 2 x 2.
    """
    with VideoReader(source, limits) as reader:
        rate = fps or reader.fps
        frame_bytes = max(1, reader.height * reader.width * 3)
        most = max(1, limits.max_bytes // frame_bytes)
        frames: list[np.ndarray] = []
        for frame in _at_rate(reader, rate):
            if len(frames) >= most:
                size = f"{reader.width} x {reader.height}"
                raise VideoError(f"input {reader.path!r} has more than {most} frames of {size}; make it shorter")
            frames.append(square_pixels(frame, reader.pixel_aspect))
            if len(frames) == max_frames:
                break
        clip = np.stack(frames)
    _check_side(source, clip[0])
    return clip, rate if reader.fps else fps


def read_mask(
    source: Source, fps: float | None = None, max_frames: int | None = None, limits: Limits = LIMITS
) -> np.ndarray:
    """A mask: bool [H, W] from a picture, [T, H, W] from a clip. White (green of 128 or more) is True: made anew.

    Raises:
        VideoError: as `read_clip`.
    """
    pixels = _read_picture(source, limits, may_move=True)
    if pixels is None:
        frames, _ = read_clip(source, fps, max_frames, limits)
        pixels = frames[0] if len(frames) == 1 else frames
    _check_side(source, pixels)
    return pixels[..., 1] >= 128


def request_fields(
    *,
    image: Source | None = None,
    video: Source | None = None,
    mask: Source | None = None,
    keyframes: Mapping[int, Source] | None = None,
    fps: float | None = None,
    num_frames: int | None = None,
    limits: Limits = LIMITS,
) -> dict[str, Any]:
    """Files, or their bytes, as fields of a GenerationRequest. Fields that are not given are left out.

    A clip gives the result its rate; `fps` reads it at another. A clip longer than `num_frames` is cut.

    Raises:
        VideoError, InvalidRequest: one line that names the input and what is wrong.
    """
    fields: dict[str, Any] = {}
    if fps is not None:
        fields["fps"] = fps
    if num_frames is not None:
        fields["num_frames"] = num_frames
    if image is not None:
        fields["image"] = read_image(image, limits)
    if keyframes:
        fields["keyframes"] = {index: read_image(source, limits) for index, source in keyframes.items()}
    if video is not None:
        fields["video"], rate = read_clip(video, fps, num_frames, limits)
        if rate is not None:
            fields["fps"] = min(rate, 1000.0)
    if mask is not None:
        fields["mask"] = read_mask(mask, fps, num_frames, limits)
    return fields


def parse_keyframes(texts: Iterable[str]) -> dict[int, str]:
    """"0:a.png" as {0: "a.png"}; -1 and last are the last frame, first is 0.

    Raises:
        InvalidRequest: another form, or a frame twice.
    """
    keyframes: dict[int, str] = {}
    for text in texts:
        match = re.fullmatch(r"(-?\d{1,7}|first|last):(.+)", text, re.DOTALL)
        if match is None:
            raise InvalidRequest(f"keyframes={text!r}: should be FRAME:FILE, such as 0:a.png, 79:b.png or last:b.png")
        index = {"first": 0, "last": -1}.get(match[1]) if match[1] in ("first", "last") else int(match[1])
        if index in keyframes:
            raise InvalidRequest(f"keyframes={text!r}: frame {match[1]} is given twice")
        keyframes[index] = match[2]
    return keyframes


def parse_expand(text: str) -> dict[str, int]:
    """"left=16,top=8" as {"left": 16, "top": 8}; "all=16" is every edge.

    Raises:
        InvalidRequest: another form.
    """
    edges: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(rf"\s*({'|'.join(EDGES)}|all)\s*=\s*(\d{{1,5}})\s*", part)
        if match is None:
            raise InvalidRequest(f"expand={text!r}: should be EDGE=PIXELS,..., such as left=16,right=16; edges are "
                                 f"{', '.join(EDGES)}, all")  # fmt: skip
        for edge in EDGES if match[1] == "all" else (match[1],):
            edges[edge] = int(match[2])
    return edges


# ---- inside ---------------------------------------------------------------------------------------------------------


def _read_picture(source: Source, limits: Limits, may_move: bool = False) -> np.ndarray | None:
    """[H, W, 3] uint8 by Pillow; None for what it does not know and, if `may_move`, for what moves."""
    if is_pipe(source) or (not isinstance(source, bytes) and os.path.isdir(source)):
        return None
    name = _name(source)
    image = open_picture(source, name, limits.max_pixels)
    if image is None:
        return None
    with image:
        if image.width * image.height > limits.max_pixels:
            size = f"{image.width} x {image.height}"
            raise VideoError(f"input {name!r}: {size} has more than {limits.max_pixels} pixels")
        try:
            return None if may_move and moves(image) else rgb(image)
        except Exception as error:  # Pillow's decoders raise many kinds
            raise VideoError(f"input {name!r} is damaged: {one_line(error)}") from error


def _at_rate(reader: VideoReader, rate: float | None) -> Iterator[np.ndarray]:
    """Frames at a constant rate. A clip that comes evenly at that rate is left as it is, frame by frame. Of others the
    k-th frame is the last one shown before (k + 0.5) / rate, and the last one stands for its own time."""
    if rate is None or (reader.is_even and rate == reader.fps):
        yield from reader
        return
    count, last, shown = 0, 0.0, None
    for time, frame in reader.timed():
        if time is None:
            yield frame
            continue
        last = float(time)
        while shown is not None and (count + 0.5) / rate <= last:
            yield shown
            count += 1
        shown = frame
    if shown is not None:
        end = last + float(reader.last_duration or 0) - 0.25 / rate
        while count == 0 or count / rate < end:
            yield shown
            count += 1


def _check_side(source: Source, pixels: np.ndarray) -> None:
    height, width = pixels.shape[-3:-1]
    if min(height, width) < MIN_SIDE:
        raise VideoError(f"input {_name(source)!r} is {width} x {height}; at least {MIN_SIDE} x {MIN_SIDE} is needed")


def _name(source: Source) -> str:
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)
