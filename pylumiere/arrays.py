"""Pixels that a program gives as objects: numpy and torch arrays as numpy's, Pillow images as what they show.

A Pillow image means what its file means, because files pass here, too: turned upright (EXIF), transparent pixels laid
on black, grey, palette, CMYK, 16-bit and float pixels as 8-bit RGB. An embedded colour profile is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pylumiere.errors import one_line

# Formats in which more than one picture is a clip. In others (TIFF, ICO, a phone's JPEG) they are pages and previews.
_MOVING = ("GIF", "PNG", "WEBP", "AVIF")


def as_array(value: Any) -> np.ndarray:
    """Any array as numpy's, from any device, without its gradient; torch's bfloat16 and half come as float32.

    Raises:
        ValueError: no array.
    """
    try:
        if hasattr(value, "detach") and hasattr(value, "cpu"):  # a torch tensor; torch itself is not imported here
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value
        return np.asarray(value)
    except Exception as error:  # each library raises kinds of its own
        raise ValueError(f"cannot be read as an array: {one_line(error)}") from error


def is_image(value: Any) -> bool:
    """Is it a Pillow image? Pillow itself is not imported."""
    return hasattr(value, "convert") and hasattr(value, "getbands")


def moves(image) -> bool:
    """Is a Pillow image a clip: an animation of more than one frame?"""
    return image.format in _MOVING and getattr(image, "n_frames", 1) > 1


def frames(image) -> Iterator[np.ndarray]:
    """What each frame of a Pillow image shows, as `rgb`. At the end it stands at the frame where it stood."""
    before = image.tell()
    try:
        for index in range(image.n_frames):
            image.seek(index)
            yield rgb(image)
    finally:
        image.seek(before)


def rgb(image) -> np.ndarray:
    """What a Pillow image shows, [H, W, 3] uint8; of an animation the frame that it stands at.

    Raises:
        Exception: of the many kinds that Pillow's decoders raise, where the file behind the image is damaged.
    """
    from PIL import Image, ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # Pillow itself would clip them
        values = np.asarray(image).astype(np.float64)
        if isinstance(transparent := image.info.get("transparency"), int):
            values[values == transparent] = 0
        if image.mode == "F":
            values = np.nan_to_num(values) * (255 if np.nanmax(values, initial=0) <= 1 else 1)
        else:
            values = values / 257  # 16 bits, also where Pillow holds them in 32
        return np.repeat((values.clip(0, 255) + 0.5).astype(np.uint8)[..., None], 3, -1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.array(image.convert("RGB"))
