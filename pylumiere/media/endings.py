"""Is a file whole? What FFmpeg does not tell: that a file ends before its own headers say, or inside one of its parts.

FFmpeg gives what is there and says nothing where the last part of a Matroska, Ogg or gif file is missing. Only what a
format writes about its own length is read here, a few bytes of each header.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import BinaryIO

KEPT_BYTES = 2**17  # of a pipe's start and of its end; no Ogg page is longer

_SEGMENT, _CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"


class Stored:
    """A file that can be sought."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.size = file.seek(0, os.SEEK_END)

    def at(self, position: int, count: int) -> bytes | None:
        """`count` bytes from there on, or what is left of the file; None where they were not kept."""
        self._file.seek(position)
        return self._file.read(count)


class Piped:
    """A pipe as PyAV wants it, read only; its first and last bytes are kept."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._head = self._tail = b""
        self.size = 0

    def read(self, count: int) -> bytes:
        data = self._file.read(count)
        self.size += len(data)
        self._head += data[: KEPT_BYTES - len(self._head)]
        self._tail = (self._tail + data)[-KEPT_BYTES:]
        return data

    def at(self, position: int, count: int) -> bytes | None:
        """As `Stored.at`."""
        first = self.size - len(self._tail)
        if position >= first:
            return self._tail[position - first :][:count]
        if min(position + count, self.size) <= len(self._head):
            return self._head[position : position + count]
        return None


def is_cut(container: str, data: Stored | Piped) -> bool:
    """Does a file of FFmpeg's format `container` end too early? False where the format does not tell."""
    check = _CHECKS.get(container)
    return check is not None and check(data)


def _matroska(data: Stored | Piped) -> bool:
    """Elements: identity, length, content (RFC 8794). What a browser records has segments and clusters without length:
    all bits of it are 1, and their content is walked through."""
    position = 0
    while position < data.size:
        header = data.at(position, 12)
        if not header or not header[0]:  # not kept, or padding
            return False
        width = _number_width(header, 0)
        end = width + _number_width(header, width)
        if end > len(header):
            return True
        bits = 7 * (end - width)
        length = int.from_bytes(header[width:end]) & ((1 << bits) - 1)
        if length != (1 << bits) - 1:
            position += length
        elif header[:width] not in (_SEGMENT, _CLUSTER):
            return False
        position += end
    return position > data.size


def _number_width(header: bytes, at: int) -> int:
    """Bytes of a number of variable length: as many as its first byte has leading zeros, and one."""
    return 9 - header[at].bit_length() if at < len(header) else len(header)


def _mp4(data: Stored | Piped) -> bool:
    """Boxes: length, kind, content. Of a fragment's header every byte is needed; frames are in FFmpeg's own index."""
    position = 0
    while header := data.at(position, 16):
        if len(header) < 8:
            break
        length, kind = struct.unpack(">I4s", header[:8])
        if length == 1 and len(header) == 16:
            length = int.from_bytes(header[8:])
        if length < 8:  # 0 goes to the end; others are no boxes
            break
        if position + length > data.size:
            return kind == b"moof"
        position += length
    return False


def _riff(data: Stored | Piped) -> bool:
    """One chunk that holds the file. Recorders fill in its length when they end, and its last byte may be padding."""
    length = int.from_bytes((data.at(0, 8) or b"")[4:], "little")
    return length not in (0, 2**32 - 1) and data.size + 1 < 8 + length


def _ogg(data: Stored | Piped) -> bool:
    """Pages: 27 bytes, of which the last counts the segments; their lengths; the segments."""
    tail = data.at(max(0, data.size - KEPT_BYTES), KEPT_BYTES) or b""
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return True
    return len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def _transport(data: Stored | Piped) -> bool:
    """Cells of 188 bytes, of 192 with their times, or of 204 with a checksum."""
    return all(data.size % cell for cell in (188, 192, 204))


def _trailer(text: bytes) -> Callable[[Stored | Piped], bool]:
    """The format ends in this text; bytes of nothing may follow."""
    return lambda data: not (data.at(max(0, data.size - 4096), 4096) or b"").rstrip(b"\0").endswith(text)


_CHECKS = {
    "matroska,webm": _matroska, "mov,mp4,m4a,3gp,3g2,mj2": _mp4, "avi": _riff, "ogg": _ogg,
    "mpegts": _transport,
    "gif": _trailer(b";"), "apng": _trailer(b"IEND\xae\x42\x60\x82"),
}  # fmt: skip
