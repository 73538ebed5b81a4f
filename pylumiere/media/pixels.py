"""Frames as bytes: from the networks' range -1..1, and from what a user gives or gets (uint8, or float in 0..1)."""

from __future__ import annotations

import numpy as np

from pylumiere import _runtime
from pylumiere.errors import VideoError


def to_uint8(frames: np.ndarray, num_threads: int | None = 1) -> np.ndarray:
    """float32 in -1..1 to uint8, same shape: floor(x * 127.5 + 128), clamped; NaN becomes 0."""
    frames = np.ascontiguousarray(frames, np.float32)
    out = np.empty(frames.shape, np.uint8)
    _runtime.to_uint8(frames, out, _pool(num_threads))
    return out


def to_yuv420p(frames: np.ndarray, matrix: str = "bt709", num_threads: int | None = 1) -> np.ndarray:
    """float32 RGB [n, H, W, 3] in -1..1 to planar yuv420p, uint8 [n, H * 3 // 2, W], limited range.

    Chroma is the mean of 2 x 2 pixels. `matrix` is "bt709" or "bt601".

    Raises:
        ValueError: an odd height or width, or another matrix.
    """
    if matrix not in ("bt601", "bt709"):
        raise ValueError(f"matrix={matrix!r} is not one of 'bt601', 'bt709'")
    frames = np.ascontiguousarray(frames, np.float32)
    n, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"yuv420p needs even sizes, got height={height} width={width}")
    out = np.empty((n, height * 3 // 2, width), np.uint8)
    _runtime.to_yuv420p(frames, out, matrix == "bt709", _pool(num_threads))
    return out


def checked_frames(frames: np.ndarray) -> np.ndarray:
    """A user's frames [T, H, W, 3], uint8 or float in 0..1, as uint8; floats are clamped and rounded.

    Raises:
        VideoError: another shape or type, NaN or infinity.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape[1:]:
        raise VideoError(f"frames have shape {list(frames.shape)}; [T, H, W, 3] is expected")
    if frames.dtype == np.uint8:
        return frames
    if frames.dtype not in (np.float16, np.float32, np.float64):
        raise VideoError(f"frames are {frames.dtype}; uint8 (0..255) or float (0..1) is expected")
    if not np.isfinite(frames).all():
        raise VideoError("frames hold NaN or infinity")
    return (frames.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _pool(num_threads: int | None):
    return _runtime.ThreadPool(num_threads or _runtime.default_num_threads())
