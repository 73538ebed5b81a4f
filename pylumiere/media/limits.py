"""What a reader accepts. Sizes are checked before frames are decoded."""

from __future__ import annotations

from dataclasses import dataclass

from pylumiere.errors import VideoError


@dataclass(frozen=True)
class Limits:
    """What a reader accepts."""

    max_pixels: int = 8192 * 8192  # of one frame
    max_frames: int = 1_000_000
    max_bytes: int = 2**31  # of all frames together, where they are read at once

    def check_size(self, name: str, width: int, height: int) -> None:
        """Raises VideoError for a frame that is larger."""
        if width < 1 or height < 1:
            raise VideoError(f"input {name!r} is damaged, or its frames have more than {self.max_pixels} pixels")
        if width * height > self.max_pixels:
            raise VideoError(f"input {name!r}: frames of {width} x {height} have more than {self.max_pixels} pixels")

    def check_count(self, name: str, count: int) -> None:
        """Raises VideoError for more frames."""
        if count > self.max_frames:
            raise VideoError(f"input {name!r} has more than {self.max_frames} frames")


LIMITS = Limits()
