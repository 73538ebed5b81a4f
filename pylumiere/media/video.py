"""Frames to mp4, webm, gif and PNG folders and back, by PyAV.

Frames are uint8 [T, H, W, 3], RGB. Three rules hold for every format:

* the same frames give the same bytes: one encoder thread, no creation time, no library versions in the container;
* an output appears under its name when it is whole, never before: it is written aside and renamed;
* a hostile or damaged input costs no more than the limits in `Limits`: sizes are checked before frames are decoded,
  and only containers from `READABLE` are parsed, so that a play list cannot name other files.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pylumiere.errors import VideoError

FORMATS = {".mp4": "mp4", ".webm": "webm", ".gif": "gif"}
PIPE = "-"
# Names of FFmpeg's demuxers. Play lists (hls, concat, image2, ...) are missing on purpose.
READABLE = (
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "gif", "mpegts", "apng", "png_pipe", "jpeg_pipe", "webp_pipe",
    "bmp_pipe", "h264", "ivf", "ogg", "yuv4mpegpipe",
)  # fmt: skip
_FRAME_NAME = re.compile(r"frame_\d{6}\.png")


@dataclass(frozen=True)
class Limits:
    """What a reader accepts."""

    max_pixels: int = 8192 * 8192  # of one frame
    max_frames: int = 1_000_000
    max_bytes: int = 2**31  # of all frames together, where they are read at once


@dataclass(frozen=True)
class Video:
    """A clip in memory.

    Attributes:
        frames: [T, H, W, 3], uint8 in 0..255 or float32 in 0..1.
        fps: frames a second.
        metadata: what made it (prompt, seed, ...); values that JSON takes. Not written into the file.
    """

    frames: np.ndarray
    fps: float
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        _as_uint8(self.frames[:1])
        if not 0 < self.fps <= 1000:
            raise VideoError(f"fps={self.fps} is not in 0..1000")

    def save(self, path: str | os.PathLike) -> None:
        """Writes .mp4 (H.264), .webm (VP9), .gif, a folder of PNG (a path without an ending), or "-" (mp4 to stdout).

        Raises:
            VideoError: an unknown ending, or a path that cannot be written. Nothing is left behind.
        """
        with VideoWriter(path, self.fps) as writer:
            writer.write(self.frames)

    def sheet(self, path: str | os.PathLike, *, every: int = 8, columns: int = 5, caption: str | None = None) -> None:
        """Writes a contact sheet: every n-th frame with its number, and a caption (the prompt if None), as one PNG."""
        caption = str(self.metadata.get("prompt", "")) if caption is None else caption
        write_sheet(path, self.frames[::every], range(0, len(self.frames), every), columns=columns, caption=caption)


def output_format(path: str | os.PathLike) -> str:
    """Which of mp4, webm, gif and png (a folder) a path asks for; checks that it can be written, before any work.

    Raises:
        VideoError: an unknown ending, a folder that does not exist or is not writable, a name that is taken by
            something that a clip does not replace.
    """
    if str(path) == PIPE:
        return "mp4"
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix and suffix not in FORMATS:
        allowed = ", ".join(FORMATS)
        raise VideoError(f"output {str(path)!r}: {suffix} is not one of {allowed}, or no ending for a PNG folder")
    _check_folder(path)
    if suffix:
        if path.is_dir():
            raise VideoError(f"output {str(path)!r} is a folder")
        return FORMATS[suffix]
    if not path.name or path.is_symlink() or (path.exists() and not path.is_dir()):
        raise VideoError(f"output {str(path)!r} is no folder of frames; give a name in .mp4, .webm, .gif or a folder")
    if path.is_dir() and (other := next((name for name in os.listdir(path) if not _FRAME_NAME.fullmatch(name)), None)):
        raise VideoError(f"output folder {str(path)!r} holds {other!r}; give an empty folder or a folder of frames")
    return "png"


def check_sheet_path(path: str | os.PathLike) -> None:
    """Raises VideoError unless a contact sheet can be written there."""
    if Path(path).suffix.lower() != ".png":
        raise VideoError(f"contact sheet {str(path)!r} must end in .png")
    _check_folder(Path(path))
    if Path(path).is_dir():
        raise VideoError(f"contact sheet {str(path)!r} is a folder")


def _check_folder(path: Path) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise VideoError(f"output {str(path)!r}: folder {str(folder)!r} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VideoError(f"output {str(path)!r}: folder {str(folder)!r} is not writable")


class VideoWriter:
    """Writes frames as they come. A context manager: leaving it by an error removes what was written.

    `BackgroundWriter(writer.write)` encodes beside the network, in a thread with a bounded queue.

    Args:
        path: as in `Video.save`.
        fps: frames a second.
    """

    def __init__(self, path: str | os.PathLike, fps: float):
        if not 0 < fps <= 1000:
            raise VideoError(f"fps={fps} is not in 0..1000")
        self.path = str(path)
        self.num_frames = 0
        self._format = output_format(path)
        self._size: tuple[int, int] | None = None
        self._rate = Fraction(fps).limit_denominator(1001)
        encoders = {"png": _PngFolder, "gif": _Gif, "mp4": _Mp4, "webm": _Webm}
        self._sink: _PngFolder | _Container | None = encoders[self._format](self.path, self._rate)

    def write(self, frames: np.ndarray) -> None:
        """Appends [n, H, W, 3] or one frame [H, W, 3], uint8 or float in 0..1.

        Raises:
            VideoError: another size than before, a size the format does not take, or an output that fails.
        """
        if self._sink is None:
            raise VideoError(f"output {self.path!r} is closed")
        frames = _as_uint8(frames if np.ndim(frames) == 4 else np.asarray(frames)[None])
        size = frames.shape[1:3]
        if self._size is None:
            if self._format in ("mp4", "webm") and (size[0] % 2 or size[1] % 2):
                raise VideoError(f"{self._format} takes even sizes, not {size[1]} x {size[0]}; give .gif or a folder")
            self._size = size
        if size != self._size:
            height, width = self._size
            raise VideoError(f"frame size {size[1]} x {size[0]} differs from the first, {width} x {height}")
        with _as_video_error(self.path):
            for frame in frames:
                self._sink.write(np.ascontiguousarray(frame))
                self.num_frames += 1

    def close(self) -> None:
        """Finishes the output and gives it its name."""
        if self._sink is None:
            return
        if self.num_frames == 0:
            self.abort()
            raise VideoError(f"output {self.path!r}: no frames were written")
        sink, self._sink = self._sink, None
        try:
            with _as_video_error(self.path):
                sink.finish()
        except BaseException:
            sink.drop()
            raise

    def abort(self) -> None:
        """Drops what was written."""
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.drop()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            try:
                self.close()
            except BaseException:
                self.abort()
                raise
        else:
            self.abort()


class _PngFolder:
    """frame_000000.png, frame_000001.png, ... in a folder that is made aside and renamed."""

    def __init__(self, path: str, rate: Fraction):
        self._path = Path(path)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{self._path.name}.", dir=self._path.parent))
        self._index = 0

    def write(self, frame: np.ndarray) -> None:
        (self._folder / f"frame_{self._index:06d}.png").write_bytes(encode_png(frame))
        self._index += 1

    def finish(self) -> None:
        os.chmod(self._folder, 0o755)
        if self._path.is_dir():  # frames of an earlier clip; output_format has looked
            output_format(self._path)
            old = tempfile.mkdtemp(prefix=f".{self._path.name}.", dir=self._path.parent)
            os.replace(self._path, old)
            os.replace(self._folder, self._path)
            shutil.rmtree(old)
        else:
            os.replace(self._folder, self._path)

    def drop(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class _Container:
    """An FFmpeg container in a temporary file beside the output, or on standard output."""

    format: str
    codec: str
    pixel_format: str
    codec_options: dict[str, str] = {}
    container_options: dict[str, str] = {}
    pipe_options: dict[str, str] = {}

    def __init__(self, path: str, rate: Fraction):
        av = _import_av()
        self._path, self._rate = path, rate
        self._temporary: str | None = None
        options = {"fflags": "+bitexact", **(self.pipe_options if path == PIPE else self.container_options)}
        if self.codec not in av.codecs_available:
            raise VideoError(f"output {path!r}: this build of PyAV has no encoder {self.codec}")
        if path == PIPE:
            self._container = av.open(_Pipe(sys.stdout.buffer), "w", format=self.format, options=options)
        else:
            handle, self._temporary = tempfile.mkstemp(prefix=f".{Path(path).name}.", dir=Path(path).parent)
            os.close(handle)
            self._container = av.open(self._temporary, "w", format=self.format, options=options)
        self._stream = None

    def write(self, frame: np.ndarray) -> None:
        if self._stream is None:
            self._stream = self._open_stream(frame.shape[1], frame.shape[0])
            self._index = 0
        picture = self._picture(frame)
        picture.pts = self._index
        picture.time_base = 1 / self._rate
        self._index += 1
        self._encode(picture)

    def finish(self) -> None:
        self._encode(None)
        self._container.close()
        if self._temporary is not None:
            os.chmod(self._temporary, 0o666 & ~_umask())
            os.replace(self._temporary, self._path)
            self._temporary = None

    def drop(self) -> None:
        with contextlib.suppress(Exception):  # the container may be what failed
            self._container.close()
        if self._temporary is not None:
            os.unlink(self._temporary)
            self._temporary = None

    def _codec_options(self) -> dict[str, str]:
        return dict(self.codec_options)

    def _open_stream(self, width: int, height: int):
        from av.codec.context import Flags

        stream = self._container.add_stream(self.codec, rate=self._rate, options=self._codec_options())
        context = stream.codec_context
        context.width, context.height = width, height
        context.pix_fmt = self.pixel_format
        context.time_base = 1 / self._rate
        context.thread_count = 1
        context.flags |= Flags.bitexact
        return stream

    def _picture(self, frame: np.ndarray):
        av = _import_av()
        return av.VideoFrame.from_ndarray(frame, format="rgb24")

    def _encode(self, picture) -> None:
        for packet in self._stream.encode(picture):
            self._container.mux(packet)


class _Yuv(_Container):
    """4:2:0 in BT.709, limited range, and said so in the stream."""

    pixel_format = "yuv420p"

    def _open_stream(self, width: int, height: int):
        stream = super()._open_stream(width, height)
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = 1  # BT.709
        context.color_range = 1  # limited
        return stream

    def _picture(self, frame: np.ndarray):
        # Our own conversion: swscale takes another path, with other roundings, depending on where a buffer lies.
        from pylumiere.diffusion.windows import to_yuv420p

        planes = to_yuv420p(frame[None].astype(np.float32) / np.float32(127.5) - np.float32(1), matrix="bt709")
        return _import_av().VideoFrame.from_ndarray(planes[0], format="yuv420p")


class _Mp4(_Yuv):
    format, codec = "mp4", "libx264"
    codec_options = {"crf": "16", "preset": "medium"}
    container_options = {"movflags": "+faststart"}
    pipe_options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}

    def _codec_options(self) -> dict[str, str]:
        from pylumiere._runtime import instruction_set

        # The lookahead of x264 165 with AVX-512 gives costs that depend on where small pictures lie in memory (below
        # 128 pixels a side), and so other bytes for the same frames. Its AVX2 code does not, and is there too.
        safe = {"x264-params": "asm=avx2"} if instruction_set() == "avx512" else {}
        return {**self.codec_options, **safe}


class _Webm(_Yuv):
    format, codec = "webm", "libvpx-vp9"
    codec_options = {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "0"}


class _Gif(_Container):
    """256 colours chosen for each frame, so that frames can be written as they come."""

    format, codec, pixel_format = "gif", "gif", "pal8"
    container_options = {"loop": "0"}

    def _open_stream(self, width: int, height: int):
        av = _import_av()
        stream = super()._open_stream(width, height)
        graph = av.filter.Graph()
        source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / self._rate)
        split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
        use, sink = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=4"), graph.add("buffersink")
        source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(palette, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()
        self._graph = graph
        return stream

    def _encode(self, picture) -> None:
        av = _import_av()
        self._graph.push(picture)
        while True:
            try:
                picture_of_palette = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                break
            super()._encode(picture_of_palette)
        if picture is None:
            super()._encode(None)


class _Pipe:
    """Standard output as PyAV wants it: write only, not seekable."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._file.flush()
        return len(data)


def encode_png(frame: np.ndarray) -> bytes:
    """[H, W, 3] uint8 as a PNG file."""
    av = _import_av()
    context = av.CodecContext.create("png", "w")
    context.height, context.width = frame.shape[:2]
    context.pix_fmt, context.time_base = "rgb24", Fraction(1, 25)
    context.thread_count = 1
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return b"".join(bytes(packet) for packet in [*context.encode(picture), *context.encode(None)])


class VideoReader:
    """Reads frames one by one: a video file, its bytes, a gif, a picture, a folder of PNG, or "-" for standard input.

    A context manager and an iterable of uint8 [H, W, 3]. All frames have the size of the first. Frames are turned as
    the container says, colours follow the stream's matrix and range, and transparent pixels show white.

    Attributes:
        fps: frames a second, on average where the rate varies; None for pictures.
        height, width: of every frame; of a turned clip, upright from the first frame on.
        num_frames: as the container tells it; None where it does not (a pipe).
        pixel_aspect: width of a pixel over its height, upright.

    Raises:
        VideoError: no such file, no video in it, damaged, or above the limits.
    """

    def __init__(self, path: str | os.PathLike | bytes, limits: Limits = Limits()):
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
        av = _import_av()
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
            with _as_video_error(self.path, reading=True):
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
        with _as_video_error(self.path, reading=True, position=lambda: index):
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
    """[H, W, 3] uint8 of a decoded frame; PyAV follows the frame's own matrix and range. Transparent shows white."""
    if not any(component.is_alpha for component in picture.format.components) and picture.format.name != "pal8":
        return picture.to_ndarray(format="rgb24")
    rgba = picture.to_ndarray(format="rgba")
    if rgba[..., 3].min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    alpha = rgba[..., 3:].astype(np.uint32)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


class _InputPipe:
    """Standard input as PyAV wants it: read only, not seekable."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def read(self, count: int) -> bytes:
        return self._file.read(count)


def read_video(path: str | os.PathLike | bytes, limits: Limits = Limits()) -> Video:
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


def read_image(path: str | os.PathLike | bytes, limits: Limits = Limits()) -> np.ndarray:
    """The first frame of a picture or video, [H, W, 3] uint8, by FFmpeg; `media.inputs` reads more formats."""
    with VideoReader(path, limits) as reader:
        return next(iter(reader))


def write_sheet(
    path: str | os.PathLike,
    frames: np.ndarray,
    numbers: Iterable[int] | None = None,
    *,
    columns: int = 5,
    caption: str = "",
) -> None:
    """Tiles frames [N, H, W, 3] under a caption, each with its number, as one PNG; written aside and renamed."""
    from PIL import Image, ImageDraw, ImageFont

    check_sheet_path(path)
    frames = _as_uint8(frames)
    count, height, width = frames.shape[:3]
    columns = min(columns, count)
    rows = -(-count // columns)
    gap, label = 4, 14
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    sheet_width = columns * (width + gap) + gap
    lines = _wrap(caption, font, sheet_width - 2 * gap)
    top = gap + 20 * len(lines)
    sheet = Image.new("RGB", (sheet_width, top + rows * (height + label + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, line in enumerate(lines):
        draw.text((gap, gap + 20 * index), line, fill="black", font=font)
    for index, (frame, number) in enumerate(zip(frames, numbers or range(count), strict=False)):
        x, y = gap + index % columns * (width + gap), top + index // columns * (height + label + gap)
        sheet.paste(Image.fromarray(frame), (x, y))
        draw.text((x, y + height), str(number), fill="gray", font=small)
    handle, temporary = tempfile.mkstemp(prefix=f".{Path(path).name}.", dir=Path(path).parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(encode_png(np.asarray(sheet)))
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _wrap(text: str, font, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines[:3]


def _as_uint8(frames: np.ndarray) -> np.ndarray:
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


@contextlib.contextmanager
def _as_video_error(path: str, *, reading: bool = False, position=None):
    """Turns FFmpeg's and the system's errors into one line about the file."""
    av = _import_av()
    try:
        yield
    except VideoError:
        raise
    except (av.error.FFmpegError, OSError) as error:
        text = getattr(error, "strerror", None) or str(error)
        where = f" after frame {position()}" if position is not None else ""
        what = "input" if reading else "output"
        verb = "is damaged or no video" if reading else "cannot be written"
        raise VideoError(f"{what} {path!r} {verb}{where}: {text}") from error


def _import_av():
    import av
    import av.filter

    av.logging.set_level(None)  # errors come as exceptions; FFmpeg's own lines would break the one-line rule
    return av


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
