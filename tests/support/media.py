"""Clips and files for the tests of media."""

from __future__ import annotations

import io
import struct
import zlib

import av
import numpy as np

BLACK, RED, GREEN, BLUE, WHITE = (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(width=40, height=24):
    """Red above left, green above right, blue below left, white below right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = RED, GREEN
    pixels[height // 2 :, : width // 2], pixels[height // 2 :, width // 2 :] = BLUE, WHITE
    return pixels


def moving_square(num_frames=20, height=32, width=48):
    """A red square that moves over a plain ground: flat areas, so that lossy formats must come close."""
    frames = np.full((num_frames, height, width, 3), (30, 90, 200), np.uint8)
    for t in range(num_frames):
        frames[t, 8:24, 2 + t : 18 + t] = (220, 40, 30)
    return frames


def png_file(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header says that size, with whatever pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def sound_file() -> bytes:
    """An mp4 that holds sound and no picture."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame) + stream.encode(None))
    return file.getvalue()
