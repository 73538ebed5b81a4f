"""Pictures, and animations in picture formats, by Pillow. What it does not know is FFmpeg's."""

from __future__ import annotations

import io
import os
from typing import Any

from pylumiere.errors import VideoError, one_line

# What Pillow may parse. Formats that call other programs (EPS) or are only containers of others are missing.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "AVIF", "JPEG2000", "ICO", "DIB", "MPO", "QOI")

# Brands of HEIC files that hold pictures. Those of sequences are clips, and FFmpeg's.
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"mif1")


def open_picture(source: str | os.PathLike | bytes, name: str, max_pixels: int) -> Any:
    """A Pillow image of a file or its bytes, from its header alone; None for what Pillow does not know. The caller
    checks its size.

    HEIC is Pillow's where the extra `heic` is installed. Without it FFmpeg reads what is not made of tiles.

    Raises:
        VideoError: no such file, a damaged header, or far more pixels than `max_pixels`.
    """
    from PIL import Image, UnidentifiedImageError

    Image.init()
    try:
        if (heic := _heic_plugin(source)) is not None:
            return heic(io.BytesIO(source) if isinstance(source, bytes) else source)
        formats = [format for format in _FORMATS if format in Image.OPEN]
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
    except UnidentifiedImageError:
        return None
    except OSError as error:
        if error.strerror is None:
            return None  # a damaged picture: FFmpeg says what is wrong
        raise VideoError(f"input {name!r} cannot be read: {error.strerror}") from error
    except Image.DecompressionBombError as error:  # raised from the header, before pixels
        raise VideoError(f"input {name!r}: more than {max_pixels} pixels") from error
    except Exception as error:  # Pillow's parsers raise many kinds on hostile headers
        raise VideoError(f"input {name!r} is damaged: {one_line(error)}") from error


def _heic_plugin(source: str | os.PathLike | bytes) -> Any:
    """Pillow's class for HEIC files, if this is one and the class is there. Pillow's list of formats is left alone."""
    if isinstance(source, bytes):
        start = source[:12]
    else:
        with open(source, "rb") as file:
            start = file.read(12)
    if start[4:8] != b"ftyp" or start[8:] not in _HEIC:
        return None
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        return None
    return HeifImageFile
