"""Pictures: those that clients send, decoded within limits; previews, thumbnails and sprite sheets of results."""

from __future__ import annotations

import base64
import io

import numpy as np

from pylumiere.serve.schema import ApiError
from pylumiere.video import encode_png

PREVIEW_SIDE = 256
MAX_PREVIEWS = 48  # of one clip, evenly spaced
SHEET_COLUMNS, SHEET_TILES, SHEET_SIDE = 5, 20, 192


def decode_image(data: bytes, max_pixels: int) -> np.ndarray:
    """A client's PNG, JPEG or WebP as uint8 [H, W, 3], upright. The size is checked before pixels are decoded.

    Raises:
        ApiError: (400) not such a picture, damaged, or too large.
    """
    from PIL import Image, ImageOps

    def refuse(text: str) -> ApiError:
        return ApiError(400, f"input_reference: {text}", code="invalid_image", param="input_reference")

    try:
        image = Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"])
    except Exception:
        raise refuse("should be a PNG, JPEG or WebP picture") from None
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise refuse(f"{width} x {height} pixels are more than {max_pixels}")
        try:
            image.load()
            upright = ImageOps.exif_transpose(image).convert("RGB")
        except Exception:  # Pillow's decoders raise many kinds on damaged input
            raise refuse("the picture is damaged") from None
    return np.asarray(upright)


def png_bytes(image: np.ndarray) -> bytes:
    return encode_png(image)


def read_png(data: bytes) -> np.ndarray:
    """A picture that `png_bytes` wrote."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))


def preview_stride(num_frames: int) -> int:
    """Every how many frames a preview is made."""
    return -(-num_frames // MAX_PREVIEWS)


def preview_url(frame: np.ndarray) -> str:
    """A final frame as a data URL of a few kilobytes."""
    return "data:image/jpeg;base64," + base64.b64encode(_encode(frame, PREVIEW_SIDE, "JPEG", quality=80)).decode()


def thumbnail(frame: np.ndarray) -> bytes:
    return _encode(frame, 512, "WEBP", quality=85, method=4)


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
