"""Frames out of mp4, webm, gif and many other files, pictures, and PNG folders: uint8 [H, W, 3], RGB, one by one.

A hostile or damaged input costs no more than the limits in `Limits`: sizes are checked before frames are decoded, and
only known containers are parsed, so that a play list cannot name other files.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from pylumiere.arrays import frames, moves, rgb
from pylumiere.errors import VideoError, one_line
from pylumiere.media.containers import Container, average_rate
from pylumiere.media.ffmpeg import PIPE
from pylumiere.media.limits import LIMITS, Limits
from pylumiere.media.pictures import open_picture

_NO_DELAY_MS = 100  # what browsers make of an animation's frame that tells none
_THUMBNAIL = re.compile(r"(?:^|[^a-z])thumb(?:nail)?s?(?:[^a-z]|$)", re.IGNORECASE)


class VideoReader:
    """Reads frames one by one: a video file, its bytes, a gif, a picture, a folder of PNG, or "-" for standard input.

    A context manager and an iterable of uint8 [H, W, 3]. All frames have the size of the first. Frames are turned as
    the file says, colours follow the stream's matrix and range, and transparent pixels are laid on black. What is read
    how: docs/inputs.md.

    Attributes:
        fps: frames a second, on average where the rate varies; None for pictures.
        is_even: frames come evenly at that rate; how long the last stands is another matter. False for a pipe.
        time_base: the unit of the times in seconds; None where the input tells no times.
        height, width: of every frame; of a turned clip, upright from the first frame on.
        num_frames: how many frames the file lists, which a few codecs do not keep; None for a pipe.
        last_duration: seconds for which the last frame stands, of a pipe known at its end; None without times.
        pixel_aspect: width of a pixel over its height, upright.

    Raises:
        VideoError: no such file, no video in it, damaged, cut short, or above the limits.
    """

    def __init__(self, path: str | os.PathLike | bytes, limits: Limits = LIMITS):
        self.path = f"<{len(path)} bytes>" if isinstance(path, bytes) else str(path)
        self._file = None
        try:
            if is_pipe(path):
                self._source = Container(self._open(path), self.path, limits, is_pipe=True)
            elif not isinstance(path, bytes) and os.path.isdir(path):
                self._source = _Folder(Path(path), limits)
            elif (image := _picture(path, self.path, limits)) is not None:
                self._source = _Pillow(image, self.path, limits)
            else:
                self._source = Container(self._open(path), self.path, limits, is_pipe=False)
        except BaseException:
            self.close()
            raise

    fps: float | None = property(lambda self: self._source.fps)
    is_even: bool = property(lambda self: self._source.is_even)
    time_base: Fraction | None = property(lambda self: self._source.time_base)
    height: int = property(lambda self: self._source.height)
    width: int = property(lambda self: self._source.width)
    num_frames: int | None = property(lambda self: self._source.num_frames)
    last_duration: Fraction | None = property(lambda self: self._source.last_duration)
    pixel_aspect: Fraction = property(lambda self: self._source.pixel_aspect)

    def _open(self, path: str | os.PathLike | bytes):
        if isinstance(path, bytes):
            self._file = io.BytesIO(path)
        elif self.path == PIPE:
            return sys.stdin.buffer  # stays open
        else:
            try:
                self._file = open(path, "rb")  # noqa: SIM115 (closed in close)
            except OSError as error:
                raise VideoError(f"input {self.path!r} cannot be read: {error.strerror}") from error
        return self._file

    def __iter__(self) -> Iterator[np.ndarray]:
        for _, frame in self.timed():
            yield frame

    def timed(self) -> Iterator[tuple[Fraction | None, np.ndarray]]:
        """Frames, and the seconds from the first one to each; None where the input tells no times."""
        return self._source.timed()

    def close(self) -> None:
        if (source := getattr(self, "_source", None)) is not None:
            source.close()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()


def is_pipe(path: str | os.PathLike | bytes) -> bool:
    """Standard input, or something else that is there but is no file and no folder."""
    if isinstance(path, bytes):
        return False
    return str(path) == PIPE or (os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path))


class _Pillow:
    """A picture, or an animation in a picture's format."""

    def __init__(self, image: Any, name: str, limits: Limits):
        self._image, self._name = image, name
        limits.check_size(name, image.width, image.height)
        self.height, self.width, self.num_frames = image.height, image.width, 1
        self.fps = self.time_base = self.last_duration = None
        self.is_even = False
        self.pixel_aspect = Fraction(1)
        self._starts: list[int] = []  # in ms
        with _damage_as_video_error(name):
            if moves(image):
                self.num_frames = image.n_frames
                limits.check_count(name, self.num_frames)
                self._list()

    def _list(self) -> None:
        """When each frame of an animation is shown; Pillow knows it once it has decoded it."""
        end = 0
        for _ in frames(self._image):
            self._starts.append(end)
            end += round(self._image.info.get("duration") or _NO_DELAY_MS)
        self.time_base = Fraction(1, 1000)
        last = end - self._starts[-1]
        self.last_duration = last * self.time_base
        rate, self.is_even = average_rate(np.array(self._starts), last, self.time_base)
        self.fps = float(rate)

    def timed(self) -> Iterator[tuple[Fraction | None, np.ndarray]]:
        if self._image is None:
            raise VideoError(f"input {self._name!r} is closed")
        with _damage_as_video_error(self._name):
            if self._starts:
                for start, frame in zip(self._starts, frames(self._image), strict=True):
                    self.height, self.width = frame.shape[:2]
                    yield start * self.time_base, frame
            else:
                frame = rgb(self._image)
                self.height, self.width = frame.shape[:2]
                yield None, frame

    def close(self) -> None:
        if self._image is not None:
            self._image.close()
            self._image = None


class _Folder:
    """Pictures of one size, as a clip without times."""

    def __init__(self, folder: Path, limits: Limits):
        self._limits, self._files = limits, frame_files(folder)
        if not self._files:
            raise VideoError(f"input folder {str(folder)!r} holds no PNG files")
        self.fps = self.time_base = self.last_duration = None
        self.is_even = False
        self.pixel_aspect = Fraction(1)
        self.num_frames = len(self._files)
        limits.check_count(str(folder), self.num_frames)
        with VideoReader(self._files[0], limits) as first:
            self.height, self.width = first.height, first.width
        for file in self._files[1:]:
            with VideoReader(file, limits) as reader:
                self._check_size(file, reader.height, reader.width)

    def timed(self) -> Iterator[tuple[Fraction | None, np.ndarray]]:
        for index, file in enumerate(self._files):
            with VideoReader(file, self._limits) as reader:
                frame = next(iter(reader))
            if index == 0:
                self.height, self.width = frame.shape[:2]
            self._check_size(file, *frame.shape[:2])
            yield None, frame

    def _check_size(self, file: Path, height: int, width: int) -> None:
        if (height, width) != (self.height, self.width):
            sizes = f"{self.width} x {self.height} to {width} x {height}"
            raise VideoError(f"input {str(file)!r}: frame size changes from {sizes}")

    def close(self) -> None:
        """Holds nothing open."""


def frame_files(folder: Path) -> list[Path]:
    """The PNG files of a folder that are frames, in the order of the numbers in their names: frame2 before frame10.

    Hidden files are none, nor are thumbnails beside others.
    """
    files = [file for file in folder.iterdir()
             if file.suffix.lower() == ".png" and not file.name.startswith(".") and file.is_file()]  # fmt: skip
    frames = [file for file in files if not _THUMBNAIL.search(file.stem)] or files
    return sorted(frames, key=lambda file: (_natural(file.name), file.name))


def _natural(name: str) -> list[tuple[str, int]]:
    """Text and numbers in turn."""
    return [(text.lower(), int(number or -1)) for text, number in re.findall(r"([^0-9]*)([0-9]*)", name)]


def _picture(path: str | os.PathLike | bytes, name: str, limits: Limits) -> Any:
    """What Pillow reads; None for what is FFmpeg's: clips, and with them gif and PNG that move."""
    image = open_picture(path, name, limits.max_pixels)
    if image is None or image.format == "GIF":
        return None
    with _damage_as_video_error(name):
        return None if image.format == "PNG" and moves(image) else image


@contextlib.contextmanager
def _damage_as_video_error(name: str):
    """Pillow's decoders raise many kinds."""
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        raise VideoError(f"input {name!r} is damaged: {one_line(error)}") from error
