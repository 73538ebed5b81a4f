"""Pictures and clips: those that clients send, decoded within limits; previews, thumbnails and sheets of results.

What came is a picture if Pillow knows it as a PNG, JPEG or WebP that stands still, else a clip; its name and its stated
type decide nothing. Sizes are checked before pixels are decoded.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pylumiere.arrays import moves
from pylumiere.errors import VideoError
from pylumiere.media.inputs import request_fields
from pylumiere.media.readers import Limits, VideoReader
from pylumiere.request import GenerationRequest
from pylumiere.serve.schema import ApiError

PREVIEW_SIDE = 256
MAX_PREVIEWS = 48  # of one clip, evenly spaced
SHEET_COLUMNS, SHEET_TILES, SHEET_SIDE = 5, 20, 192


def is_picture(data: bytes) -> bool:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as image:
            return not moves(image)
    except Image.DecompressionBombError:  # from the header; refused when it is read
        return True
    except Exception:
        return False


def clip_rate(data: bytes, param: str, limits: Limits) -> float | None:
    """Frames a second of what is no picture; None where the clip tells no rate.

    Raises:
        ApiError: (400) it is no clip either.
    """
    try:
        with VideoReader(data, limits) as reader:
            if reader.fps is None:
                raise VideoError(f"input {reader.path!r} is a picture of a kind that is not taken")
            return reader.fps
    except VideoError as error:
        advice = "; give a clip" if param == "video" else "; give a PNG, JPEG or WebP picture, or a clip"
        raise _refused(error, param, "video", advice) from None


def generation_request(
    fields: Mapping[str, Any],
    inputs: Mapping[str, bytes],
    limits: Limits,
    *,
    most_frames: int | None = None,
    given: str = "input_reference",
) -> GenerationRequest:
    """A request of JSON values and of files by the names that `store.INPUT` allows.

    Args:
        fields: of the request; also `extend_by`, frames to make after the clip's last.
        limits: of each file.
        most_frames: of a clip, where `fields` names no number.
        given: what the client calls its picture or clip.

    Raises:
        ApiError: (400) a file that cannot be read, or is too large.
        InvalidRequest: as GenerationRequest.
    """
    fields = dict(fields)
    more, keyframes = fields.pop("extend_by", 0), {}
    most = None if most_frames is None else most_frames - more
    frames = fields["num_frames"] - more if "num_frames" in fields else None
    cut = frames if most is None or frames is not None else most + 1
    pixels: dict[str, Any] = {}
    for name, data in inputs.items():
        kind, _, index = name.partition("_")
        param = {"keyframe": "keyframes", "mask": "mask"}.get(kind, given)
        try:
            if kind == "keyframe":
                keyframes[int(index)] = request_fields(image=data, limits=limits)["image"]
            elif kind == "image":
                pixels |= request_fields(image=data, limits=limits)
            else:
                pixels |= request_fields(**{kind: data}, fps=fields.get("fps"), num_frames=cut, limits=limits)
        except VideoError as error:
            raise _refused(error, param, kind) from None
    pixels.pop("num_frames", None)
    if keyframes:
        pixels["keyframes"] = keyframes
    clip = pixels.get("video")
    if clip is not None and frames is None and most is not None and len(clip) > most:
        text = f"{given} has more than {most} frames"
        raise ApiError(400, f"{text}, the most that this server takes", code="invalid_video", param=given)
    if more:
        pixels["video"] = np.concatenate([clip, np.repeat(clip[-1:], more, 0)])
        pixels["mask"] = np.zeros(pixels["video"].shape[:3], bool)
        pixels["mask"][len(clip) :] = True
    return GenerationRequest(**{**fields, **pixels})


def _refused(error: VideoError, param: str, kind: str, advice: str = "") -> ApiError:
    text = re.sub(r"^input '<\d+ bytes>'", param, str(error)) + advice
    return ApiError(400, text, code="invalid_video" if kind == "video" else "invalid_image", param=param)


def preview_stride(num_frames: int) -> int:
    """Every how many frames a preview is made."""
    return -(-num_frames // MAX_PREVIEWS)


def preview_url(frame: np.ndarray) -> str:
    """A final frame as a data URL of a few kilobytes."""
    return "data:image/jpeg;base64," + base64.b64encode(_encode(frame, PREVIEW_SIDE, "JPEG", quality=80)).decode()


def thumbnail(frame: np.ndarray) -> bytes:
    return _encode(frame, 512, "WEBP", quality=85, method=4)


def png(frame: np.ndarray) -> bytes:
    """A frame as it is."""
    return _encode(frame, max(frame.shape), "PNG")


class SpriteSheet:
    """Evenly spaced frames of a clip in one picture, taken as they come: it holds small tiles only."""

    def __init__(self, num_frames: int):
        self._stride = -(-num_frames // SHEET_TILES)
        self._tiles: list = []

    def add(self, start: int, frames: np.ndarray) -> None:
        for index in range(-start % self._stride, len(frames), self._stride):
            self._tiles.append(_small(frames[index], SHEET_SIDE))

    def encode(self) -> bytes:
        from PIL import Image

        width, height = self._tiles[0].size
        columns = min(SHEET_COLUMNS, len(self._tiles))
        rows = -(-len(self._tiles) // columns)
        sheet = Image.new("RGB", (columns * width, rows * height))
        for index, tile in enumerate(self._tiles):
            sheet.paste(tile, (index % columns * width, index // columns * height))
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=88)
        return file.getvalue()


def _small(frame: np.ndarray, side: int):
    from PIL import Image

    image = Image.fromarray(frame)
    image.thumbnail((side, side))
    return image


def _encode(frame: np.ndarray, side: int, format: str, **options) -> bytes:
    file = io.BytesIO()
    _small(frame, side).save(file, format, **options)
    return file.getvalue()
