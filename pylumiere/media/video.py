"""Video: a clip in memory, from and to a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pylumiere.errors import VideoError
from pylumiere.media.pixels import checked_frames
from pylumiere.media.readers import LIMITS, Limits, VideoReader
from pylumiere.media.writers import VideoWriter, write_sheet


@dataclass(frozen=True)
class Video:
    """A clip in memory.

    Attributes:
        frames: [T, H, W, 3], uint8 in 0..255 or float32 in 0..1; latents [T, h, w, C] float32.
        fps: frames a second.
        metadata: what made it (prompt, seed, ...); values that JSON takes. Not written into the file.
        is_latent: frames are latents, which only a decoder turns into pictures.
    """

    frames: np.ndarray
    fps: float
    metadata: dict[str, Any] = field(default_factory=dict)
    is_latent: bool = False

    def __post_init__(self):
        if not self.is_latent:
            checked_frames(self.frames[:1])
        if not 0 < self.fps <= 1000:
            raise VideoError(f"fps={self.fps} is not in 0..1000")

    def save(self, path: str | os.PathLike) -> None:
        """Writes .mp4 (H.264), .webm (VP9), .gif, .png (of one frame), a folder of PNG (a path without an ending), or
        "-" (mp4 to stdout).

        Raises:
            VideoError: an unknown ending, a path that cannot be written, or latents. Nothing is left behind.
        """
        if self.is_latent:
            raise VideoError("latents are no pictures; ask for output_type='uint8' to save a clip")
        with VideoWriter(path, self.fps) as writer:
            writer.write(self.frames)

    def sheet(self, path: str | os.PathLike, *, every: int = 8, columns: int = 5, caption: str | None = None) -> None:
        """Writes a contact sheet: every n-th frame with its number, and a caption (the prompt if None), as one PNG."""
        caption = str(self.metadata.get("prompt", "")) if caption is None else caption
        write_sheet(path, self.frames[::every], range(0, len(self.frames), every), columns=columns, caption=caption)


def read_video(path: str | os.PathLike | bytes, limits: Limits = LIMITS) -> Video:
    """A whole clip in memory; pictures count as clips of one frame at 1 fps.

    Raises:
        VideoError: see VideoReader; also more than `limits.max_bytes` of pixels.
    """
    with VideoReader(path, limits) as reader:
        most = limits.max_bytes // (reader.height * reader.width * 3)
        frames = []
        for frame in reader:
            if len(frames) >= most:
                raise VideoError(f"input {str(path)!r} has more than {most} frames of {reader.width} x {reader.height}")
            frames.append(frame)
        return Video(np.stack(frames), reader.fps or 1.0)
