"""Frames to mp4, webm, gif, PNG folders and contact sheets, by PyAV.

Frames are uint8 [T, H, W, 3], RGB. Two rules hold for every format:

* the same frames give the same bytes: one encoder thread, no creation time, no library versions in the container;
* an output appears under its name when it is whole, never before: it is written aside and renamed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pylumiere._runtime import FrameQueue, instruction_set
from pylumiere.errors import VideoError
from pylumiere.media.ffmpeg import PIPE, as_video_error, import_av
from pylumiere.media.pixels import checked_frames, to_yuv420p
from pylumiere.media.placement import square_pixels

FORMATS = {".mp4": "mp4", ".webm": "webm", ".gif": "gif", ".png": "picture"}
_OTHERS = "a name in .mp4, .webm, .gif or a folder"
_FRAME_NAME = re.compile(r"frame_\d{6}\.png")


def output_format(path: str | os.PathLike) -> str:
    """Which of mp4, webm, gif, picture (one PNG) and png (a folder) a path asks for; checks that it can be written,
    before any work.

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
        raise VideoError(f"output {str(path)!r} is no folder of frames; give {_OTHERS}")
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
        fps: frames a second; where frames have times, on average.
        time_base: unit in seconds of the times that `write` is given; None for frames that come evenly. gif and webm
            round to units of their own, 1/100 and 1/1000. Pictures have no times.
        pixel_aspect: width of a pixel over its height. Only mp4 and gif can tell; others get frames with square ones.

    Attributes:
        last_duration: seconds for which the last of frames with times stands; 1 / fps if None. Given before the first
            frame it is kept to the tick; later a gif cannot take it, and an mp4 only nearly.
    """

    def __init__(
        self, path: str | os.PathLike, fps: float, *, time_base: Fraction | None = None, pixel_aspect: float = 1
    ):
        if not 0 < fps <= 1000:
            raise VideoError(f"fps={fps} is not in 0..1000")
        self.path = str(path)
        self.num_frames = 0
        self.last_duration: Fraction | None = None
        self._format = output_format(path)
        self._size: tuple[int, int] | None = None
        self._aspect = Fraction(pixel_aspect).limit_denominator(255)
        rate = max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))
        encoders = {"png": _PngFolder, "picture": _Png, "gif": _Gif, "mp4": _Mp4, "webm": _Webm}
        form = _Form(self.path, rate, time_base, self._aspect, lambda: self.last_duration)
        self._sink: _PngFolder | _Png | _Container | None = encoders[self._format](form)

    def write(self, frames: np.ndarray, times: Sequence[Fraction] | None = None) -> None:
        """Appends [n, H, W, 3] or one frame [H, W, 3], uint8 or float in 0..1.

        Args:
            times: seconds from the first frame of all to each of these; they rise.

        Raises:
            VideoError: another size than before, a size the format does not take, or an output that fails.
        """
        if self._sink is None:
            raise VideoError(f"output {self.path!r} is closed")
        frames = checked_frames(frames if np.ndim(frames) == 4 else np.asarray(frames)[None])
        size = frames.shape[1:3]
        if self._size is None:
            if self._format in ("mp4", "webm") and (size[0] % 2 or size[1] % 2):
                raise VideoError(f"{self._format} takes even sizes, not {size[1]} x {size[0]}; give .gif or a folder")
            self._size = size
        if size != self._size:
            height, width = self._size
            raise VideoError(f"frame size {size[1]} x {size[0]} differs from the first, {width} x {height}")
        with as_video_error(self.path):
            for frame, time in zip(frames, times or [None] * len(frames), strict=True):
                if self._format not in ("mp4", "gif"):
                    frame = square_pixels(frame, self._aspect, 2 if self._format == "webm" else 1)
                self._sink.write(np.ascontiguousarray(frame), time)
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
            with as_video_error(self.path):
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


class BackgroundWriter:
    """Calls `write(item)` in a thread of its own, so that encoding overlaps with computing.

    `put` waits while `capacity` items are pending. An exception of `write` is raised by the next `put` or by `close`;
    nothing is written after it. As a context manager: `close` at the end of the block, `abort` if it raises.
    """

    def __init__(self, write: Callable[[Any], Any], capacity: int = 2):
        self._queue = FrameQueue(capacity)
        self._error: BaseException | None = None
        self._write = write
        self._thread = threading.Thread(target=self._run, name="pylumiere-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while item := self._queue.get():
                self._write(item[0])
        except BaseException as error:
            self._error = error
            self._queue.cancel()

    def put(self, item) -> None:
        if not self._queue.put(item):
            self._thread.join()
            if self._error is not None:
                raise self._error
            raise RuntimeError("the writer is closed")

    def close(self) -> None:
        """Writes what is pending, ends the thread, and raises what `write` raised."""
        self._queue.finish()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def abort(self) -> None:
        """Drops what is pending and ends the thread after the item it is at."""
        self._queue.cancel()
        self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()
        else:
            self.abort()


@dataclass(frozen=True)
class _Form:
    """What a writer was asked for."""

    path: str
    rate: Fraction
    time_base: Fraction | None
    pixel_aspect: Fraction
    last_duration: Callable[[], Fraction | None]


class _Png:
    """One picture, under a temporary name until it is whole."""

    def __init__(self, form: _Form):
        self._path = Path(form.path)
        self._data: bytes | None = None

    def write(self, frame: np.ndarray, time: Fraction | None) -> None:
        if self._data is not None:
            raise VideoError(f"output {str(self._path)!r} holds one picture, and the clip has more; give {_OTHERS}")
        self._data = encode_png(frame)

    def finish(self) -> None:
        with tempfile.NamedTemporaryFile(prefix=f".{self._path.name}.", dir=self._path.parent, delete=False) as file:
            file.write(self._data)
        os.chmod(file.name, 0o644)
        os.replace(file.name, self._path)

    def drop(self) -> None:
        self._data = None


class _PngFolder:
    """frame_000000.png, frame_000001.png, ... in a folder that is made aside and renamed."""

    def __init__(self, form: _Form):
        self._path = Path(form.path)
        self._folder = Path(tempfile.mkdtemp(prefix=f".{self._path.name}.", dir=self._path.parent))
        self._index = 0

    def write(self, frame: np.ndarray, time: Fraction | None) -> None:
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

    def __init__(self, form: _Form):
        av = import_av()
        self._form, path = form, form.path
        self._tick = 1 / form.rate if form.time_base is None else self._times_unit(form.time_base)
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
        self._next = 0  # the earliest tick of the next frame
        self._held = None  # of frames with times the last packet, until it is known how long it lasts

    def write(self, frame: np.ndarray, time: Fraction | None) -> None:
        if self._stream is None:
            self._stream = self._open_stream(frame.shape[1], frame.shape[0])
        picture = self._picture(frame)
        picture.pts = self._next if time is None else max(self._next, round(time / self._tick))
        picture.time_base = self._tick
        self._next = picture.pts + 1
        self._encode(picture)

    def finish(self) -> None:
        self._encode(None)
        if self._held is not None:
            self._held.duration = max(1, round(self._last_duration() / self._tick))
            self._container.mux(self._held)
        self._container.close()
        if self._temporary is not None:
            os.chmod(self._temporary, 0o666 & ~_umask())
            os.replace(self._temporary, self._form.path)
            self._temporary = None

    def drop(self) -> None:
        with contextlib.suppress(Exception):  # the container may be what failed
            self._container.close()
        if self._temporary is not None:
            os.unlink(self._temporary)
            self._temporary = None

    def _codec_options(self) -> dict[str, str]:
        return dict(self.codec_options)

    def _times_unit(self, unit: Fraction) -> Fraction:
        """In which times are written: the given unit, unless a container has no place for it."""
        return unit if unit.numerator == 1 and unit.denominator <= 1_000_000 else Fraction(1, 90_000)

    def _last_duration(self) -> Fraction:
        told = self._form.last_duration()
        return 1 / self._form.rate if told is None else told

    def _open_stream(self, width: int, height: int):
        from av.codec.context import Flags

        stream = self._container.add_stream(self.codec, rate=self._form.rate, options=self._codec_options())
        context = stream.codec_context
        context.width, context.height = width, height
        context.pix_fmt = self.pixel_format
        context.time_base = self._tick
        context.thread_count = 1
        context.flags |= Flags.bitexact
        if self._form.pixel_aspect != 1 and self.format in ("mp4", "gif"):
            context.sample_aspect_ratio = self._form.pixel_aspect
        if self._form.time_base is not None and self._form.last_duration() is not None:
            context.max_b_frames = 0  # packets in the order of frames: then an mp4 tells how long the last one stands
        return stream

    def _picture(self, frame: np.ndarray):
        av = import_av()
        return av.VideoFrame.from_ndarray(frame, format="rgb24")

    def _encode(self, picture) -> None:
        for packet in self._stream.encode(picture):
            if self._form.time_base is None:
                self._container.mux(packet)
                continue
            if self._held is not None:
                self._held.duration = packet.dts - self._held.dts
                self._container.mux(self._held)
            self._held = packet


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
        planes = to_yuv420p(frame[None].astype(np.float32) / np.float32(127.5) - np.float32(1), matrix="bt709")
        return import_av().VideoFrame.from_ndarray(planes[0], format="yuv420p")


class _Mp4(_Yuv):
    format, codec = "mp4", "libx264"
    codec_options = {"crf": "16", "preset": "medium"}
    container_options = {"movflags": "+faststart"}
    pipe_options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}

    def _codec_options(self) -> dict[str, str]:
        # The lookahead of x264 165 with AVX-512 gives costs that depend on where small pictures lie in memory (below
        # 128 pixels a side), and so other bytes for the same frames. Its AVX2 code does not, and is there too.
        safe = {"x264-params": "asm=avx2"} if instruction_set() == "avx512" else {}
        return {**self.codec_options, **safe}


class _Webm(_Yuv):
    format, codec = "webm", "libvpx-vp9"
    codec_options = {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "0"}

    def _times_unit(self, unit: Fraction) -> Fraction:
        return Fraction(1, 1000)


class _Gif(_Container):
    """256 colours chosen for each frame, so that frames can be written as they come."""

    format, codec, pixel_format = "gif", "gif", "pal8"
    container_options = {"loop": "0"}

    def _times_unit(self, unit: Fraction) -> Fraction:
        return Fraction(1, 100)

    def _open_stream(self, width: int, height: int):
        av = import_av()
        if self._form.time_base is not None:
            self._container.options["final_delay"] = str(min(65_535, max(1, round(self._last_duration() * 100))))
        stream = super()._open_stream(width, height)
        graph = av.filter.Graph()
        source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=self._tick)
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
        av = import_av()
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
    av = import_av()
    context = av.CodecContext.create("png", "w")
    context.height, context.width = frame.shape[:2]
    context.pix_fmt, context.time_base = "rgb24", Fraction(1, 25)
    context.thread_count = 1
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return b"".join(bytes(packet) for packet in [*context.encode(picture), *context.encode(None)])


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
    frames = checked_frames(frames)
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
