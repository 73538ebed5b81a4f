"""Frames out of mp4, webm, gif and many other files, and PNG folders, by PyAV: uint8 [H, W, 3], RGB, one by one.

A hostile or damaged input costs no more than the limits in `Limits`: sizes are checked before frames are decoded, and
only containers from `READABLE` are parsed, so that a play list cannot name other files.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pylumiere.errors import VideoError
from pylumiere.media.ffmpeg import PIPE, as_video_error, import_av

# Names of FFmpeg's demuxers. Play lists (hls, concat, image2, ...) are missing on purpose.
READABLE = (
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "gif", "mpegts", "apng", "png_pipe", "jpeg_pipe", "webp_pipe",
    "bmp_pipe", "h264", "ivf", "ogg", "yuv4mpegpipe",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a reader accepts."""

    max_pixels: int = 8192 * 8192  # of one frame
    max_frames: int = 1_000_000
    max_bytes: int = 2**31  # of all frames together, where they are read at once


LIMITS = Limits()


class VideoReader:
    """Reads frames one by one: a video file, its bytes, a gif, a picture, a folder of PNG, or "-" for standard input.

    A context manager and an iterable of uint8 [H, W, 3]. All frames have the size of the first. Frames are turned as
    the container says, colours follow the stream's matrix and range, and transparent pixels are laid on black.

    Attributes:
        fps: frames a second, on average where the rate varies; None for pictures.
        height, width: of every frame; of a turned clip, upright from the first frame on.
        num_frames: as the container tells it; None where it does not (a pipe).
        pixel_aspect: width of a pixel over its height, upright.

    Raises:
        VideoError: no such file, no video in it, damaged, or above the limits.
    """

    def __init__(self, path: str | os.PathLike | bytes, limits: Limits = LIMITS):
        self._bytes = path if isinstance(path, bytes) else None
        self.path = f"<{len(path)} bytes>" if isinstance(path, bytes) else str(path)
        self.limits, self.pixel_aspect, self._is_turned = limits, 1.0, False
        self._container = None
        self._folder_files: list[Path] | None = None
        if self._bytes is None and self.path != PIPE and Path(self.path).is_dir():
            self._open_folder(Path(self.path))
        else:
            self._open_file()

    def _open_folder(self, folder: Path) -> None:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".png")
        if not files:
            raise VideoError(f"input folder {self.path!r} holds no PNG files")
        with VideoReader(files[0], self.limits) as first:
            self.height, self.width = first.height, first.width
        self._folder_files, self.fps, self.num_frames = files, None, len(files)
        self._check_count(len(files))

    def _open_file(self) -> None:
        av = import_av()
        if self._bytes is not None:
            self._file: BinaryIO = io.BytesIO(self._bytes)
        elif self.path == PIPE:
            self._file = sys.stdin.buffer
        else:
            try:
                self._file = open(self.path, "rb")  # noqa: SIM115 (closed in close)
            except OSError as error:
                raise VideoError(f"input {self.path!r} cannot be read: {error.strerror}") from error
        # FFmpeg decodes frames while it looks what is in the file. Its limit counts padding; `_check_size` is exact.
        codec_options = {"max_pixels": str(2 * self.limits.max_pixels + 2**16)}
        try:
            # A Python file and not a name: FFmpeg would take "http:..." and "concat:..." for protocols.
            with as_video_error(self.path, reading=True):
                self._container = av.open(
                    _InputPipe(self._file) if self.path == PIPE else self._file,
                    options={"format_whitelist": ",".join(READABLE), "protocol_whitelist": "", **codec_options},
                    metadata_errors="replace",
                )
            streams = self._container.streams.video
            if not streams:
                raise VideoError(f"input {self.path!r} holds no video")
            stream = self._stream = streams[0]
            if stream.codec_context is None:
                raise VideoError(f"input {self.path!r} holds video in a codec that is not known here")
            stream.codec_context.thread_count = 1
            stream.codec_context.options = codec_options
            self._coded_size = self.width, self.height = stream.width, stream.height
            self._check_size(self.width, self.height)
            aspect = stream.sample_aspect_ratio
            self.pixel_aspect = float(aspect) if aspect and 0.1 <= aspect <= 10 else 1.0
            rate = stream.guessed_rate or stream.average_rate
            is_picture = self._container.format.name.endswith("_pipe") and self.path != PIPE
            self.fps = None if is_picture or not rate else float(rate)
            self.num_frames = stream.frames or None
            if self.num_frames is not None:
                self._check_count(self.num_frames)
            if self._container.format.name == "gif" and self.path != PIPE:
                self._check_gif_trailer()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[np.ndarray]:
        for _, frame in self.timed():
            yield frame

    def timed(self) -> Iterator[tuple[float | None, np.ndarray]]:
        """Frames with the time in seconds at which each is shown; None where the input tells no times."""
        if self._folder_files is not None:
            for file in self._folder_files:
                with VideoReader(file, self.limits) as reader:
                    frame = next(iter(reader), None)
                    if frame is None:
                        raise VideoError(f"input {str(file)!r} holds no picture")
                    if frame.shape[:2] != (self.height, self.width):
                        self._refuse_size(frame.shape[1], frame.shape[0], self.width, self.height)
                    yield None, frame
            return
        if self._container is None:
            raise VideoError(f"input {self.path!r} is closed")
        index, end = 0, 0.0
        with as_video_error(self.path, reading=True, position=lambda: index):
            for picture in self._container.decode(self._stream):
                if (picture.width, picture.height) != self._coded_size:
                    self._check_size(picture.width, picture.height)
                    self._refuse_size(picture.width, picture.height, *self._coded_size)
                self._check_count(index + 1)
                if picture.is_corrupt:
                    raise VideoError(f"input {self.path!r} is damaged at frame {index}")
                frame = self._upright(_rgb(picture), picture.rotation)
                index += 1
                end = (picture.time or 0.0) + (1.5 / self.fps if self.fps else 0.0)
                yield picture.time, frame
        if index == 0:
            raise VideoError(f"input {self.path!r} holds no frame that can be decoded")
        if self.num_frames is not None and index < self.num_frames:
            raise VideoError(f"input {self.path!r} is truncated: it ends after {index} of {self.num_frames} frames")
        # Matroska's header tells no number of frames, but how long the clip is.
        if self.num_frames is None and "matroska" in self._container.format.name and self._container.duration:
            duration = self._container.duration / 1e6
            if end < duration:
                raise VideoError(f"input {self.path!r} is truncated: it ends at frame {index}, before {duration:g} s")

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None
        if self._folder_files is None and self.path != PIPE and hasattr(self, "_file"):
            self._file.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def _check_gif_trailer(self) -> None:
        """A gif tells no length at all; whole ones end in a semicolon."""
        position = self._file.tell()
        self._file.seek(max(0, self._file.seek(0, os.SEEK_END) - 4096))
        if not self._file.read().rstrip(b"\0").endswith(b";"):
            raise VideoError(f"input {self.path!r} is truncated: its end is missing")
        self._file.seek(position)

    def _check_size(self, width: int, height: int) -> None:
        if width < 1 or height < 1:
            raise VideoError(
                f"input {self.path!r} is damaged, or its frames have more than {self.limits.max_pixels} pixels"
            )
        if width * height > self.limits.max_pixels:
            raise VideoError(
                f"input {self.path!r}: frames of {width} x {height} have more than {self.limits.max_pixels} pixels"
            )

    def _refuse_size(self, width: int, height: int, *before: int) -> None:
        sizes = f"{before[0]} x {before[1]} to {width} x {height}"
        raise VideoError(f"input {self.path!r}: frame size changes from {sizes}")

    def _upright(self, frame: np.ndarray, degrees: int) -> np.ndarray:
        """Turned by the display matrix, counter-clockwise; angles between quarter turns go to the nearest."""
        quarters = round(degrees / 90) % 4
        if quarters == 0:
            return frame
        frame = np.ascontiguousarray(np.rot90(frame, quarters))
        if quarters % 2 and not self._is_turned:
            self._is_turned, self.pixel_aspect = True, 1 / self.pixel_aspect
            self.height, self.width = frame.shape[:2]
        return frame

    def _check_count(self, count: int) -> None:
        if count > self.limits.max_frames:
            raise VideoError(f"input {self.path!r} has more than {self.limits.max_frames} frames")


def _rgb(picture) -> np.ndarray:
    """[H, W, 3] uint8 of a decoded frame; PyAV follows the frame's own matrix and range. Transparent is black."""
    if not any(component.is_alpha for component in picture.format.components) and picture.format.name != "pal8":
        return picture.to_ndarray(format="rgb24")
    rgba = picture.to_ndarray(format="rgba")
    if rgba[..., 3].min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    return ((rgba[..., :3] * rgba[..., 3:].astype(np.uint16) + 127) // 255).astype(np.uint8)


class _InputPipe:
    """Standard input as PyAV wants it: read only, not seekable."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def read(self, count: int) -> bytes:
        return self._file.read(count)
