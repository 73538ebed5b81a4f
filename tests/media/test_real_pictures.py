"""Pictures and their siblings among clips: which way up, what is transparent, which stream, folders of frames."""

from __future__ import annotations

import io
import struct
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image
from support.clips import encode, remux, shades, shown, tiles, turned
from support.media import BLUE, GREEN, RED, WHITE, corners, sound_file

from pylumiere.errors import VideoError
from pylumiere.media.inputs import read_clip, read_image, read_mask
from pylumiere.media.readers import VideoReader
from pylumiere.media.video import read_video
from pylumiere.media.writers import encode_png


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def looks(frame: np.ndarray) -> list[list[str]]:
    """The colours of a frame's quarters."""
    names = {"red": RED, "green": GREEN, "blue": BLUE, "white": WHITE, "black": (0, 0, 0)}
    height, width = frame.shape[:2]

    def name(y: int, x: int) -> str:
        return min(names, key=lambda name: np.abs(frame[y, x].astype(int) - names[name]).sum())

    return [[name(y, x) for x in (width // 4, 3 * width // 4)] for y in (height // 4, 3 * height // 4)]


UPRIGHT = looks(corners(64, 32))

# What EXIF's numbers say was done to the upright picture, as Pillow undoes it.
STORED = {
    1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}  # fmt: skip


# ---- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_in_every_way_to_read_a_picture(format, orientation):
    image = Image.fromarray(corners(64, 32))
    for step in STORED[orientation]:
        image = image.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    for frame in (read_image(data), read_video(data).frames[0], read_clip(data)[0][0]):
        assert frame.shape == (32, 64, 3) and looks(frame) == UPRIGHT
    with VideoReader(data) as reader:
        next(iter(reader))
        assert (reader.height, reader.width) == (32, 64)


ONE = 0x10000
MATRICES = {  # a, b, c, d: a point (x, y) is shown at (ax + cy, bx + dy)
    "as it is": ((ONE, 0, 0, ONE), lambda f: f),
    "to the right": ((0, ONE, -ONE, 0), lambda f: np.rot90(f, -1)),
    "half": ((-ONE, 0, 0, -ONE), lambda f: np.rot90(f, 2)),
    "to the left": ((0, -ONE, ONE, 0), lambda f: np.rot90(f, 1)),
    "left for right": ((-ONE, 0, 0, ONE), lambda f: f[:, ::-1]),
    "top for bottom": ((ONE, 0, 0, -ONE), lambda f: f[::-1]),
    "transposed": ((0, ONE, ONE, 0), lambda f: f.transpose(1, 0, 2)),
    "transposed the other way": ((0, -ONE, -ONE, 0), lambda f: np.rot90(f, 2).transpose(1, 0, 2)),
    "nearly to the right": ((0x1000, 0xFF00, -0xFF00, 0x1000), lambda f: np.rot90(f, -1)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_every_display_matrix(name):
    (a, b, c, d), expected = MATRICES[name]
    data = turned(encode([corners(64, 32)] * 3), (a, b, 0, c, d, 0, 0, 0, 0x40000000))
    expected = expected(corners(64, 32))
    with VideoReader(data) as reader:
        frames = list(reader)
        assert (reader.height, reader.width) == expected.shape[:2]
    assert len(frames) == 3
    for frame in frames:
        assert frame.shape == expected.shape and looks(frame) == looks(expected)


def test_a_turned_clip_turns_its_pixels_too():
    data = encode([corners(32, 32)] * 2, aspect=Fraction(2, 1))
    data = turned(data, (0, ONE, 0, -ONE, 0, 0, 0, 0, 0x40000000))
    with VideoReader(data) as reader:
        next(iter(reader))
        assert reader.pixel_aspect == Fraction(1, 2)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_cameras_motion_jpeg_is_turned_by_its_exif(orientation):
    image = Image.fromarray(corners(64, 32))
    for step in STORED[orientation]:
        image = image.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = saved(image, "JPEG", quality=95, exif=exif)
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as output:
        stream = output.add_stream("mjpeg", rate=10)
        stream.width, stream.height = image.size
        stream.pix_fmt = "yuvj420p"
        for packet in jpeg_packets(stream, jpeg, 2):
            output.mux(packet)
    frames = read_video(file.getvalue()).frames
    assert len(frames) == 2 and looks(frames[1]) == UPRIGHT


# ---- transparency ----------------------------------------------------------------------------------------------------


def spot(index: int) -> np.ndarray:
    """White; only a square that moves can be seen."""
    frame = np.full((32, 48, 4), 255, np.uint8)
    frame[..., 3] = 0
    frame[8:24, 8 * index : 8 * index + 16, 3] = 255
    return frame


SPOTS = [spot(index) for index in range(3)]


def animation(format: str, **options) -> bytes:
    first, *others = [Image.fromarray(frame) for frame in SPOTS]
    return saved(first, format, save_all=True, append_images=others, duration=100, **options)


GLASS = {
    "gif": lambda: animation("GIF", disposal=2),
    "apng": lambda: animation("PNG"),
    "webp": lambda: animation("WEBP", lossless=True),
    "avif": lambda: animation("AVIF", quality=95),
    "qtrle": lambda: encode(SPOTS, "mov", "qtrle", pixels="argb"),
    "prores 4444": lambda: encode(SPOTS, "mov", "prores_ks", pixels="yuva444p10le"),
    "png in mov": lambda: encode(SPOTS, "mov", "png", pixels="rgba"),
    "ffv1": lambda: encode(SPOTS, "matroska", "ffv1", pixels="bgra"),
    "vp8": lambda: encode(SPOTS, "webm", "libvpx", pixels="yuva420p", options={"auto-alt-ref": "0"}),
    "vp9": lambda: encode(SPOTS, "webm", "libvpx-vp9", pixels="yuva420p"),
}


@pytest.mark.parametrize("name", GLASS)
def test_transparent_is_black_in_a_moving_mask_and_in_a_clip(name):
    data = GLASS[name]()
    mask = read_mask(data)
    assert mask.shape == (3, 32, 48) and mask.dtype == bool
    for index, (layer, frame) in enumerate(zip(mask, read_clip(data)[0], strict=True)):
        seen = spot(index)[..., 3] > 0
        inside, outside = seen.copy(), ~seen
        if name in ("vp8", "vp9", "avif", "prores 4444"):  # lossy at the edge
            inside[:, 1:] &= seen[:, :-1]
            inside[:, :-1] &= seen[:, 1:]
            outside[:, 3:] &= ~seen[:, :-3]
            outside[:, :-3] &= ~seen[:, 3:]
            inside[:10] = inside[22:] = False
            outside[6:8] = outside[24:26] = False
        assert layer[inside].all() and not layer[outside].any()
        assert frame[inside].min() > 200 and frame[outside].max() < 50


@pytest.mark.parametrize("format", ["PNG", "WEBP", "AVIF", "TIFF"])
def test_a_still_picture_means_what_the_moving_one_means(format):
    data = saved(Image.fromarray(spot(0)), format, **({"lossless": True} if format == "WEBP" else {}))
    for frame in (read_image(data), read_video(data).frames[0]):
        assert frame[16, 8].min() > 240 and frame[16, 40].max() < 10
    mask = read_mask(data)
    assert mask.shape == (32, 48) and mask[16, 8] and not mask[16, 40]


def test_half_transparent_is_half_as_bright():
    frames = [np.full((32, 32, 4), (200, 100, 50, 128), np.uint8)] * 2
    found = read_video(encode(frames, "mov", "qtrle", pixels="argb")).frames
    assert np.abs(found[1].astype(int) - (100, 50, 25)).max() <= 1


# ---- which stream ----------------------------------------------------------------------------------------------------


def coded(frame: np.ndarray, format: str, codec: str = "") -> tuple[bytes, bytes]:
    """One picture as its codec's bytes, and the codec's configuration."""
    data = (
        saved(Image.fromarray(frame), "AVIF", quality=95)
        if format == "avif"
        else encode([frame], "mp4", codec, b_frames=0)
    )
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        packet = next(packet for packet in container.demux(stream) if packet.size)
        return bytes(packet), stream.codec_context.extradata


def grid(format: str, codec: str = "") -> bytes:
    """A picture of 128 x 128 in tiles of 64 x 64: red, green, blue, white."""
    coded_tiles = [coded(np.full((64, 64, 3), colour, np.uint8), format, codec) for colour in (RED, GREEN, BLUE, WHITE)]
    kind, config = (b"av1C" if format == "avif" else b"hvcC"), coded_tiles[0][1]
    box = struct.pack(">I4s", 8 + len(config), kind) + config
    return tiles([payload for payload, _ in coded_tiles], box, format.encode(), 64, 2)


def test_the_tiles_of_an_avif_are_one_picture():
    data = grid("avif")
    for frame in (read_image(data), read_video(data).frames[0]):
        assert frame.shape == (128, 128, 3) and looks(frame) == UPRIGHT


@pytest.mark.skipif("libx265" not in av.codecs_available, reason="this build of PyAV has no encoder libx265")
def test_the_tiles_of_a_heic_are_one_picture_with_the_extra():
    pytest.importorskip("pillow_heif", reason="the extra heic is not installed")
    data = grid("heic", "libx265")
    for frame in (read_image(data), read_video(data).frames[0]):
        assert frame.shape == (128, 128, 3) and looks(frame) == UPRIGHT


@pytest.mark.skipif("libx265" not in av.codecs_available, reason="this build of PyAV has no encoder libx265")
def test_the_tiles_of_a_heic_are_refused_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = grid("heic", "libx265")
    for read in (read_image, read_clip, read_mask):
        with pytest.raises(VideoError, match=r'made of tiles, .*pip install "pylumiere\[heic\]"'):
            read(data)


@pytest.mark.parametrize("format", ["WEBP", "AVIF"])
def test_an_animation_in_a_pictures_format_is_a_clip(tmp_path, format):
    frames = [Image.fromarray(frame) for frame in shades(4)]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], duration=100)
    (tmp_path / "clip").write_bytes(data)
    for source in (data, tmp_path / "clip", str(tmp_path / "clip")):
        clip, fps = read_clip(source)
        assert shown(clip) == [0, 1, 2, 3] and fps == 10
    assert shown([read_image(data)]) == [0]
    with VideoReader(data) as reader:
        assert (reader.num_frames, reader.is_even) == (4, True)
    with pytest.raises(VideoError):
        read_clip(data[: len(data) * 2 // 3])


def cover(output) -> list[av.Packet]:
    """Adds the picture of a record."""
    stream = output.add_stream("mjpeg", rate=1)
    stream.width, stream.height, stream.pix_fmt = 64, 32, "yuvj420p"
    stream.disposition = Disposition.attached_pic
    return jpeg_packets(stream, saved(Image.fromarray(corners(64, 32)), "JPEG"), 1)


def jpeg_packets(stream, jpeg: bytes, count: int) -> list[av.Packet]:
    packets = [av.Packet(jpeg) for _ in range(count)]
    for index, packet in enumerate(packets):
        packet.pts = packet.dts = index
        packet.time_base, packet.stream, packet.is_keyframe = 1 / stream.codec_context.framerate, stream, True
    return packets


def with_cover(format: str) -> bytes:
    """Sound, and a picture of its record."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as output:
        packets = cover(output)
        sound = output.add_stream("aac", rate=48_000)
        sound.layout = "mono"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 48_000
        for packet in [*packets, *sound.encode(silence), *sound.encode(None)]:
            output.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("read", [read_clip, read_image, read_mask, read_video])
def test_a_record_with_a_cover_is_no_video(read):
    for data in (with_cover("mp4"), sound_file()):
        with pytest.raises(VideoError, match="holds no video"):
            read(data)


def test_a_cover_in_front_of_the_video_is_no_clip():
    assert shown(read_clip(remux(encode(shades(6)), "mp4", first=cover))[0]) == list(range(6))


@pytest.mark.parametrize("format", ["matroska", "mov"])
def test_the_default_video_is_read_and_not_the_first(format):
    file = io.BytesIO()
    with av.open(file, "w", format=format) as output:
        streams = []
        for disposition in (0, Disposition.default):
            stream = output.add_stream("mpeg4", rate=16)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            stream.disposition = disposition
            streams.append(stream)
        for frames in zip(shades(6)[::-1], shades(6), strict=True):
            for stream, frame in zip(streams, frames, strict=True):
                output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for stream in streams:
            output.mux(stream.encode(None))
    assert shown(read_clip(file.getvalue())[0]) == list(range(6))


# ---- folders ---------------------------------------------------------------------------------------------------------


def fill(folder, names, size=(32, 32)) -> None:
    for frame, name in zip(shades(len(names), *size), names, strict=True):
        (folder / name).write_bytes(encode_png(frame))


@pytest.mark.parametrize("names", [
    ["frame1.png", "frame2.png", "frame10.png"],
    ["1.png", "2.PNG", "10.png", "100.png"],
    ["shot 1 take 9.png", "shot 1 take 10.png", "shot 2 take 1.png", "shot 10 take 1.png"],
    ["a_0001.png", "a_0002.png", "a_0010.png"],
    ["A1.png", "a2.png", "A3.png"],
], ids=lambda names: names[0])  # fmt: skip
def test_frames_come_in_the_order_of_their_numbers(tmp_path, names):
    fill(tmp_path, names)
    assert shown(read_clip(tmp_path)[0]) == list(range(len(names)))


def test_what_systems_leave_in_a_folder_is_no_frame(tmp_path):
    fill(tmp_path, ["frame1.png", "frame2.png"])
    for name in ("._frame1.png", ".hidden.png", "thumb.png", "frame1_thumb.png", "Thumbnail 2.png"):
        (tmp_path / name).write_bytes(encode_png(shades(1, 8, 8)[0]))
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "._frame2.png"):
        (tmp_path / name).write_bytes(b"no picture")
    for name in ("@eaDir", "folder.png", ".thumbnails"):
        (tmp_path / name).mkdir()
    clip, fps = read_clip(tmp_path)
    assert shown(clip) == [0, 1] and fps is None
    with VideoReader(tmp_path) as reader:
        assert reader.num_frames == 2


def test_a_folder_of_nothing_but_thumbnails_is_read(tmp_path):
    fill(tmp_path, ["thumb1.png", "thumb2.png", "thumb10.png"])
    assert shown(read_clip(tmp_path)[0]) == [0, 1, 2]


def test_a_frame_of_another_size_is_named_before_the_first_is_decoded(tmp_path, monkeypatch):
    fill(tmp_path, [f"frame{index}.png" for index in range(12)])
    (tmp_path / "frame10.png").write_bytes(encode_png(shades(1, 16, 24)[0]))
    monkeypatch.setattr(VideoReader, "timed", None)
    with pytest.raises(VideoError, match=r"frame10\.png': frame size changes from 32 x 32 to 24 x 16"):
        VideoReader(tmp_path)


def test_a_damaged_frame_is_named(tmp_path):
    fill(tmp_path, ["frame1.png", "frame2.png", "frame3.png"])
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    (tmp_path / "frame2.png").write_bytes(encode_png(noise)[:900])
    with pytest.raises(VideoError, match=r"frame2\.png"):
        read_clip(tmp_path)
