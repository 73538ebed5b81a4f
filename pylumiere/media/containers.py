"""Frames out of a container, by FFmpeg: which stream, which of its frames are shown, when, and which way up.

What a header says of itself is a hint: how many frames, how long, at which rate. A file that can be sought is listed
first, packet by packet, without decoding. That finds its times and its average rate, and refuses what is cut short.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np

from pylumiere.errors import VideoError
from pylumiere.media.endings import Piped, Stored, is_cut
from pylumiere.media.ffmpeg import as_video_error, import_av
from pylumiere.media.limits import Limits

# Names of FFmpeg's demuxers. Play lists (hls, concat, image2, ...) are missing on purpose.
READABLE = (
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "gif", "mpegts", "apng", "png_pipe", "jpeg_pipe", "webp_pipe",
    "bmp_pipe", "h264", "ivf", "ogg", "yuv4mpegpipe",
)  # fmt: skip
_MP4, _MATROSKA = READABLE[:2]

_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own leave transparency out


@dataclass(frozen=True)
class _Listing:
    """What the packets of the video say; see `Container`."""

    num_frames: int | None
    rate: Fraction | None
    is_even: bool = False
    last_duration: Fraction | None = None


class Container:
    """The video of a file or a pipe, frame by frame.

    Attributes:
        fps: frames a second: the rate of frames that come evenly, else the average. None for pictures.
        is_even: frames come evenly at that rate; of the last one only its start counts. False for a pipe.
        time_base: the container's unit of time in seconds; None where it tells no times.
        height, width: of every frame; of a turned clip, upright from the first frame on.
        num_frames: packets that show a frame: the number of frames, but for rare codecs. None for a pipe.
        last_duration: seconds for which the last frame stands; of a pipe known at its end. None without times.
        pixel_aspect: width of a pixel over its height, upright.

    Raises:
        VideoError: no video, damaged, cut short, or above the limits.
    """

    def __init__(self, file: BinaryIO, name: str, limits: Limits, is_pipe: bool):
        self.name, self.limits = name, limits
        self._file, self._data = file, Piped(file) if is_pipe else Stored(file)
        self._container = None
        self._listed = self._listed_bytes = 0
        try:
            self._open()
            stream = self._stream
            self._coded_size = self.width, self.height = stream.width, stream.height
            limits.check_size(name, self.width, self.height)
            aspect = _fraction(stream.sample_aspect_ratio)
            self.pixel_aspect = aspect if aspect and Fraction(1, 10) <= aspect <= 10 else Fraction(1)
            if is_pipe:
                listing = _Listing(None, next(self._told_rates(), None))
            else:
                listing = self._list()
                self._open()  # from the start again; not every format can be sought back
            is_picture = self._format.endswith("_pipe") and not is_pipe
            has_times = is_pipe or listing.last_duration is not None
            self.fps = float(listing.rate) if listing.rate and not is_picture else None
            self.is_even, self.num_frames = listing.is_even, listing.num_frames
            self.time_base = self._tick if has_times and not is_picture else None
            self.last_duration = listing.last_duration
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Opens the container at its start, and chooses a stream."""
        av = import_av()
        self.close()
        if isinstance(self._data, Stored):
            self._file.seek(0)
        # FFmpeg decodes frames while it looks what is in the file. Its limit counts padding; `check_size` is exact.
        codec_options = {"max_pixels": str(2 * self.limits.max_pixels + 2**16)}
        # A Python file and not a name: FFmpeg would take "http:..." and "concat:..." for protocols.
        with as_video_error(self.name, reading=True):
            self._container = av.open(
                self._file if isinstance(self._data, Stored) else self._data,
                options={"format_whitelist": ",".join(READABLE), "protocol_whitelist": "", **codec_options},
                metadata_errors="replace",
            )
        self._format = self._container.format.name
        stream = self._stream = self._choose_stream()
        decoder = stream.codec_context
        if decoder is None:
            raise VideoError(f"input {self.name!r} holds video in a codec that is not known here")
        if stream.metadata.get("alpha_mode") == "1" and decoder.name in _ALPHA_DECODERS:
            with_alpha = _ALPHA_DECODERS[decoder.name]
            if with_alpha not in av.codecs_available:
                raise VideoError(f"input {self.name!r}: this build of PyAV has no decoder {with_alpha}, which its "
                                 "transparent pixels need")  # fmt: skip
            decoder = av.CodecContext.create(with_alpha, "r")
        decoder.thread_count = 1
        decoder.options = codec_options
        self._decoder, self._tick = decoder, _fraction(stream.time_base)

    def _choose_stream(self) -> Any:
        """The default video; no cover, thumbnail or chapter picture, and no tile of a picture that is made of many."""
        from av.stream import Disposition

        beside = Disposition.attached_pic | Disposition.timed_thumbnails
        streams = [stream for stream in self._container.streams.video if not stream.disposition & beside]
        if not streams:
            raise VideoError(f"input {self.name!r} holds no video")
        whole = [stream for stream in streams if not stream.disposition & Disposition.dependent]
        default = [stream for stream in whole if stream.disposition & Disposition.default]
        is_heif = "mif1" in self._container.metadata.get("compatible_brands", "")
        if not default and (is_heif or not whole):
            raise VideoError(f"input {self.name!r} is a picture made of tiles, which is read with the extra "
                             'heic: pip install "pylumiere[heic]"')  # fmt: skip
        return (default or whole)[0]

    def _told_rates(self) -> Iterator[Fraction]:
        """What the header tells, or FFmpeg guesses from the first frames: the average, and the rate of an even clip."""
        return filter(None, map(_fraction, (self._stream.average_rate, self._stream.guessed_rate)))

    # ---- packets ----

    def _packets(self, *streams: Any) -> Iterator[Any]:
        """Those that are not empty: an empty one repeats the frame before it, which then stands longer."""
        self._listed = self._listed_bytes = 0
        for packet in self._container.demux(*streams):
            if not packet.size:
                continue
            if packet.stream is self._stream:
                if packet.is_corrupt:
                    raise self._cut(f"frame {self._listed} is not whole")
                self._listed += 1
                self._listed_bytes = (packet.pos or 0) + packet.size
                self.limits.check_count(self.name, self._listed)
            yield packet

    def _list(self) -> _Listing:
        """Reads all packets and decodes none.

        Raises:
            VideoError: the file ends before what it lists, or inside a packet; more packets than the limit.
        """
        stream, tick = self._stream, self._tick
        # Matroska tells how long a file is, but not how long its last frame stands: the other streams tell the rest.
        streams = self._container.streams if self._format == _MATROSKA else (stream,)
        times: list[int] = []
        key = last = None  # time of the first key frame; (time, duration) of the frame that is shown last
        num_frames, other_end = 0, Fraction(0)
        with as_video_error(self.name, reading=True, position=lambda: self._listed):
            for packet in self._packets(*streams):
                time = _time(packet)
                if packet.stream is not stream:
                    if time is not None:
                        other_end = max(other_end, (time + (packet.duration or 0)) * _fraction(packet.time_base))
                    continue
                key = time if key is None and packet.is_keyframe else key
                if packet.is_discard or not _is_shown(packet, self._decoder.name):
                    continue
                num_frames += 1
                if time is not None:
                    last = max(last or (time, 0), (time, packet.duration or 0))
                    times.append(time)
            self._check_end(last)
        if not times or len(times) < num_frames:
            # Without times FFmpeg's average is a default; its guess may come from the codec's header.
            rate = _fraction(stream.guessed_rate) or _fraction(stream.average_rate)
            return _Listing(num_frames, rate)
        # What is shown before the first key frame cannot be decoded: a group of pictures that was cut.
        ticks = np.sort(np.array(times, np.int64))
        shown = ticks >= (ticks[0] if key is None else key)
        ticks = ticks[shown] if shown.any() else ticks
        stands = self._last_ticks(*last)
        rate, is_even = average_rate(ticks, stands, tick, self._told_rates())
        if not stands:
            stands = 1 / (rate * tick) if rate else 0
        start = last[0] * tick
        return _Listing(len(ticks), rate, is_even, max(stands * tick, self._held_until(other_end) - start))

    def _last_ticks(self, time: int, duration: int) -> int:
        """How long the last frame stands, which is shown at `time` and of which its packet tells `duration`."""
        stream = self._stream
        end = (stream.start_time or 0) + (stream.duration or 0)
        if self._format == _MP4 and end > time:
            return end - time  # packets tell times of decoding, in another order
        if self._format == "avi":
            return max(duration, end - time)  # counts empty packets, which FFmpeg leaves out
        return duration

    def _held_until(self, other_end: Fraction) -> Fraction:
        """When a Matroska file ends, in seconds, if its last frame stands until then; else 0. What sound or subtitles
        need, to `other_end`, is theirs; their last packet may not tell how long it is."""
        if self._format != _MATROSKA or not self._container.duration:
            return Fraction(0)
        end = Fraction(self._container.duration, 1_000_000)
        return end if end > other_end + Fraction(1, 10) else Fraction(0)

    def _check_end(self, last: tuple[int, int] | None) -> None:
        """Is all there that the file lists? After the last packet, when FFmpeg's index is whole."""
        stream = self._stream
        if self._format == _MP4:
            ends = [entry.pos + entry.size for entry in stream.index_entries]
            if missing := sum(end > self._data.size for end in ends):
                raise self._cut(f"{missing} of {len(ends)} frames are missing")
        is_short = last is None or (bool(stream.duration) and sum(last) < stream.duration)
        if self._format == "ivf" and is_short and self._listed < stream.frames:
            raise self._cut(f"it ends after {self._listed} of {stream.frames} frames")
        if self._format == "yuv4mpegpipe" and self._listed_bytes < self._data.size:
            raise self._cut(f"it ends inside frame {self._listed}")
        # A whole avi may end in empty packets, and a recorder may leave a wrong length in it: only both are a sign.
        if (self._format != "avi" or is_short) and is_cut(self._format, self._data):
            raise self._cut("its end is missing")

    def _cut(self, where: str) -> VideoError:
        return VideoError(f"input {self.name!r} is damaged or truncated: {where}")

    # ---- frames ----

    def timed(self) -> Iterator[tuple[Fraction | None, np.ndarray]]:
        """Frames, and the seconds from the first one to each: they rise. None where the container tells no times."""
        if self._container is None:
            raise VideoError(f"input {self.name!r} is closed")
        period = 1 / Fraction(self.fps) if self.fps else Fraction(1, 25)
        index, first, time, stands = 0, None, None, None
        with as_video_error(self.name, reading=True, position=lambda: index):
            for picture in self._pictures():
                frame = self._upright(picture, is_first=index == 0)
                if self.time_base is not None:
                    if index == 0:
                        first, time = picture.pts, Fraction(0)
                    elif None in (first, picture.pts) or (now := (picture.pts - first) * self._tick) <= time:
                        time += period
                    else:
                        time = now
                    stands = picture.duration * self._tick or period
                index += 1
                yield time, frame
        if index == 0:
            raise VideoError(f"input {self.name!r} holds no frame that can be decoded")
        self.last_duration = stands if self.last_duration is None else self.last_duration

    def _pictures(self) -> Iterator[Any]:
        """FFmpeg's frames, as they are shown, without those that refer to frames before the clip's first key frame."""
        av = import_av()
        index, key = 0, None
        for packet in itertools.chain(self._packets(self._stream), [None]):  # None: the rest of what is decoded
            if packet is not None and packet.is_keyframe and key is None:
                key = -np.inf if _time(packet) is None else _time(packet)
            try:
                pictures = self._decoder.decode(packet)
            except av.error.InvalidDataError:
                if key is None:
                    continue
                raise
            for picture in pictures:
                if picture.is_corrupt:
                    if key is None or (picture.pts is not None and picture.pts < key):
                        continue
                    raise VideoError(f"input {self.name!r} is damaged at frame {index}")
                index += 1
                self.limits.check_count(self.name, index)
                yield picture
        if isinstance(self._data, Piped):
            self._check_end(None)

    def _upright(self, picture: Any, is_first: bool) -> np.ndarray:
        """[H, W, 3] uint8, turned and mirrored as the frame says. The first one tells the size of all.

        Raises:
            VideoError: another size.
        """
        coded = picture.width, picture.height
        if coded != self._coded_size:
            self.limits.check_size(self.name, *coded)
            raise self._changed(self._coded_size, coded)
        mirrored, turns = _orientation(picture)
        frame = _rgb(picture)
        frame = np.ascontiguousarray(np.rot90(frame[:, ::-1] if mirrored else frame, turns))
        height, width = frame.shape[:2]
        if is_first:
            self.height, self.width = height, width
            self.pixel_aspect = 1 / self.pixel_aspect if turns % 2 else self.pixel_aspect
        elif (height, width) != (self.height, self.width):
            raise self._changed((self.width, self.height), (width, height))
        return frame

    def _changed(self, before: tuple[int, int], after: tuple[int, int]) -> VideoError:
        sizes = f"{before[0]} x {before[1]} to {after[0]} x {after[1]}"
        return VideoError(f"input {self.name!r}: frame size changes from {sizes}")

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None


def _time(packet: Any) -> int | None:
    """When a packet's frame is shown; where only the time of decoding is told, both are one."""
    return packet.dts if packet.pts is None else packet.pts


def _is_shown(packet: Any, codec: str) -> bool:
    """VP8 has packets that show nothing, for others to refer to: RFC 6386, 9.1. Other codecs put both in one packet."""
    return codec not in ("vp8", "libvpx") or bool(memoryview(packet)[0] & 0x10)


def average_rate(
    ticks: np.ndarray, last: int, tick: Fraction, told: Iterable[Fraction] = ()
) -> tuple[Fraction | None, bool]:
    """Frames a second of frames that come at `ticks`, the last of which stands for `last` ticks if that is not 0; and
    do they come evenly?

    An even clip has the rate that its header tells, or a round one, if its times bear that out to the tick that they
    are rounded to, which must be small beside a frame.
    """
    count, span = len(ticks), int(ticks[-1] - ticks[0])
    mean = Fraction(count - 1) / (span * tick) if span else Fraction(0)
    for rate in (*told, Fraction(round(mean)), Fraction(round(mean) * 1000, 1001), mean):
        if not rate:
            continue
        period = float(1 / (rate * tick))
        if np.abs(ticks - ticks[0] - np.arange(count) * period).max() > min(1, period / 8):
            continue
        if count > 1 or not last or abs(last - period) <= 1:
            return rate, True
    return (count / ((span + last) * tick), count == 1) if span + last else (None, False)


def _orientation(picture: Any) -> tuple[bool, int]:
    """Of a frame's display matrix: is it mirrored from left to right, and how many quarter turns counter-clockwise
    follow."""
    try:
        data = picture.side_data.get("DISPLAYMATRIX")
    except ValueError:  # beside side data that PyAV has no name for, it gives none
        return False, round(picture.rotation / 90) % 4
    return (False, 0) if data is None else _nearest(*struct.unpack_from("2i4x2i", bytes(data)))


@functools.lru_cache(64)
def _nearest(a: int, b: int, c: int, d: int) -> tuple[bool, int]:
    """The mirroring and quarter turns next to (x, y) -> (ax + cy, bx + dy), y down. ISO/IEC 14496-12, 6.2.2."""
    mirror, turn = np.array([[-1, 0], [0, 1]]), np.array([[0, -1], [1, 0]])

    def likeness(choice: tuple[bool, int]) -> float:
        candidate = np.linalg.matrix_power(mirror, choice[0]) @ np.linalg.matrix_power(turn, choice[1])
        return float((candidate * np.array([[a, b], [c, d]], float)).sum())

    return max(itertools.product((False, True), range(4)), key=likeness)


def _rgb(picture: Any) -> np.ndarray:
    """[H, W, 3] uint8 of a decoded frame; PyAV follows the frame's own matrix and range. Transparent is black."""
    if not any(component.is_alpha for component in picture.format.components) and picture.format.name != "pal8":
        return picture.to_ndarray(format="rgb24")
    rgba = picture.to_ndarray(format="rgba")
    if rgba[..., 3].min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    return ((rgba[..., :3] * rgba[..., 3:].astype(np.uint16) + 127) // 255).astype(np.uint8)


def _fraction(value: Any) -> Fraction | None:
    return Fraction(value.numerator, value.denominator) if value else None
