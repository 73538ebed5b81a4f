"""Clips as cameras, editors and browsers write them: encoded and put together by PyAV."""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np

LOSSLESS = {"libx264": {"crf": "1"}, "libx265": {"x265-params": "log-level=none:crf=1"}}


def shades(count: int, height: int = 32, width: int = 32) -> list[np.ndarray]:
    """Grey frames; `shown` tells which is which, also behind a codec with losses. At most 40."""
    return [np.full((height, width, 3), 6 * index, np.uint8) for index in range(count)]


def shown(frames: Iterable[np.ndarray]) -> list[int]:
    return [round(float(frame[..., 1].mean()) / 6) for frame in frames]


def encode(
    frames: Sequence[np.ndarray],
    format: str = "mp4",
    codec: str = "libx264",
    *,
    rate: int = 16,
    times: Sequence[int] | None = None,
    unit: Fraction | None = None,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    gop: int | None = None,
    b_frames: int | None = None,
    aspect: Fraction | None = None,
) -> bytes:
    """A file of frames [H, W, 3] or, with transparency, [H, W, 4], at `times` in `unit`s or one after the other."""
    file = io.BytesIO()
    with av.open(file, "w", format=format, options=container or {}) as output:
        stream = output.add_stream(codec, rate=rate, options={**LOSSLESS.get(codec, {}), **(options or {})})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        context = stream.codec_context
        context.time_base = unit or Fraction(1, rate)
        context.thread_count = 1
        for name, value in (("gop_size", gop), ("max_b_frames", b_frames), ("sample_aspect_ratio", aspect)):
            if value is not None:
                setattr(context, name, value)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24" if frame.shape[-1] == 3 else "rgba")
            picture.pts = index if times is None else times[index]
            picture.time_base = context.time_base
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))
    return file.getvalue()


def packets_of(data: bytes) -> list[SimpleNamespace]:
    """The packets of a file's first video, in the order of decoding; `pts` and `dts` in seconds."""
    with av.open(io.BytesIO(data)) as source:
        unit = source.streams.video[0].time_base
        return [
            SimpleNamespace(data=bytes(packet), pts=packet.pts * unit, dts=packet.dts * unit, key=packet.is_keyframe)
            for packet in source.demux(source.streams.video[0])
            if packet.size
        ]


def remux(
    data: bytes,
    format: str,
    packets: Sequence[SimpleNamespace] | None = None,
    *,
    first: Callable[[av.container.OutputContainer], Iterable[av.Packet]] | None = None,
    sound: float | None = None,
    subtitles: float | None = None,
    last: float | None = None,
    default: int | None = None,
    container: dict[str, str] | None = None,
) -> bytes:
    """The packets of a file's video, or those that are given, in another container.

    Args:
        first: adds streams before the video, and gives their packets.
        sound, subtitles: seconds of them, from 0 on.
        last: seconds for which the last packet stands.
        default: number of the stream that is the default; the container's own choice if None.
    """
    file = io.BytesIO()
    packets = packets_of(data) if packets is None else packets
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=format, options=container or {}) as output:
        before = [] if first is None else first(output)
        stream = output.add_stream_from_template(source.streams.video[0])
        text = _subtitles(output, subtitles) if subtitles else None
        voice = _sound(output, format) if sound else None
        for packet in before:
            output.mux(packet)
        unit = Fraction(1, 90_000)
        for index, packet in enumerate(packets):
            made = av.Packet(packet.data)
            made.pts, made.dts = round(packet.pts / unit), round(packet.dts / unit)
            made.time_base, made.is_keyframe, made.stream = unit, packet.key, stream
            if last is not None and index == len(packets) - 1:
                made.duration = round(last / unit)
            output.mux(made)
        if text is not None:
            for packet in text:
                output.mux(packet)
        if voice is not None:
            for start in range(0, round(48_000 * sound), 960):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="flt", layout="mono")
                silence.sample_rate, silence.pts = 48_000, start
                output.mux(voice.encode(silence))
            output.mux(voice.encode(None))
        for index, each in enumerate(output.streams if default is not None else ()):
            each.disposition = av.stream.Disposition.default if index == default else 0
    return file.getvalue()


def _sound(output, format: str):
    stream = output.add_stream("aac" if format in ("mp4", "mov") else "libopus", rate=48_000)
    stream.layout = "mono"
    return stream


def _subtitles(output, seconds: float):
    text = f"1\n00:00:00,000 --> 00:00:{seconds:06.3f}\nhello\n".replace(".", ",").encode()
    with av.open(io.BytesIO(text), format="srt") as source:
        stream = output.add_stream_from_template(source.streams.subtitles[0])
        packets = [packet for packet in source.demux() if packet.size]
    for packet in packets:
        packet.stream = stream
    return packets


def turned(data: bytes, matrix: Sequence[int]) -> bytes:
    """The same mp4 with another display matrix, a b u c d v x y w, in the header of its first track."""
    start = data.index(b"tkhd") + 4 + 40
    return data[:start] + struct.pack(">9i", *matrix) + data[start + 36 :]


def tiles(payloads: Sequence[bytes], config: bytes, brand: bytes, side: int, columns: int) -> bytes:
    """A picture of tiles of `side` x `side` pixels, row by row: ISO/IEC 23008-12, a derived image of type grid.

    Args:
        payloads: what codes each tile.
        config: the box that configures the codec, hvcC or av1C.
        brand: heic or avif.
    """

    def box(kind: bytes, *parts: bytes) -> bytes:
        return struct.pack(">I4s", 8 + sum(map(len, parts)), kind) + b"".join(parts)

    def full(kind: bytes, version: int, *parts: bytes) -> bytes:
        return box(kind, struct.pack(">I", version << 24), *parts)

    count, rows = len(payloads), len(payloads) // columns
    grid, width, height = count + 1, side * columns, side * rows
    codec = {b"heic": b"hvc1", b"avif": b"av01"}[brand]
    kinds = [*[codec] * count, b"grid"]
    items = [full(b"infe", 2, struct.pack(">HH4s", index, 0, kind), b"\0") for index, kind in enumerate(kinds, 1)]
    sizes = [full(b"ispe", 0, struct.pack(">II", *size)) for size in ((side, side), (width, height))]
    shares = [*[(index, b"\x81\2\4") for index in range(1, grid)], (grid, b"\3\4")]
    properties = b"".join(struct.pack(">HB", index, len(each)) + each for index, each in shares)
    layout = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height)
    parts = [
        full(b"hdlr", 0, struct.pack(">I4s12x", 0, b"pict"), b"\0"),
        full(b"pitm", 0, struct.pack(">H", grid)),
        full(b"iinf", 0, struct.pack(">H", len(items)), *items),
        full(b"iref", 0, box(b"dimg", struct.pack(f">HH{count}H", grid, count, *range(1, grid)))),
        box(b"iprp", box(b"ipco", config, *sizes, full(b"pixi", 0, b"\3\x08\x08\x08")),
            full(b"ipma", 0, struct.pack(">I", len(shares)), properties)),
        box(b"idat", layout),
    ]  # fmt: skip
    start = box(b"ftyp", brand, bytes(4), b"mif1", brand)

    def places(first: int) -> bytes:
        rows = [struct.pack(">HHHHII", grid, 1, 0, 1, 0, len(layout))]
        for index, payload in enumerate(payloads, 1):
            rows.append(struct.pack(">HHHHII", index, 0, 0, 1, first, len(payload)))
            first += len(payload)
        return full(b"iloc", 1, struct.pack(">BBH", 0x44, 0, len(rows)), *rows)

    first = len(start) + len(full(b"meta", 0, *parts, places(0))) + 8
    return start + full(b"meta", 0, *parts, places(first)) + box(b"mdat", *payloads)


def piped(monkeypatch, data: bytes) -> str:
    """Puts a file on standard input, where it cannot be sought; the reader's name for it."""
    source = io.BytesIO(data)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=source.read)))
    return "-"
