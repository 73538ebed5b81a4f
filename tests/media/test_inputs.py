"""What users bring: pictures, clips and masks of every kind, bounded before decoding."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from support.clips import turned
from support.media import BLACK, BLUE, RED, WHITE, corners, png_file, sound_file

from pylumiere.errors import InvalidRequest, VideoError
from pylumiere.media.inputs import (
    parse_expand,
    parse_keyframes,
    read_clip,
    read_image,
    read_mask,
    request_fields,
)
from pylumiere.media.readers import Limits
from pylumiere.media.video import read_video


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def clip_bytes(frames, *, rate=16, times=None, format="mp4", codec="libx264", pixels="yuv420p", planes=None, **context):
    """A file of a clip; `planes` are raw frames in the stream's own format instead of RGB frames."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "1"} if codec == "libx264" else {})
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 1000) if times else Fraction(1, rate)
        source = frames if planes is None else planes
        shape = np.shape(source[0])
        stream.width, stream.height = (shape[1], shape[0]) if planes is None else (shape[1], shape[0] * 2 // 3)
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for index, frame in enumerate(source):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24" if planes is None else pixels)
            if planes is not None:
                for name, value in context.items():
                    if name != "sample_aspect_ratio":
                        setattr(picture, name, value)
            picture.pts = times[index] if times else index
            picture.time_base = stream.codec_context.time_base
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return file.getvalue()


# ---- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(orientation):
    upright = Image.fromarray(corners())
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }.get(orientation, [])  # fmt: skip
    stored = upright
    for step in undo:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read_image(encoded(stored, exif=exif)), corners())


def test_transparent_pixels_are_black_and_are_kept_in_a_mask():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, 4:] = 255, 255, 255, 255
    rgba[:, :4] = 255, 0, 0, 0
    rgba[0, 0] = 255, 0, 0, 128
    data = encoded(Image.fromarray(rgba, "RGBA"))
    pixels = read_image(data)
    assert tuple(pixels[4, 0]) == BLACK and tuple(pixels[0, 0]) == (128, 0, 0) and tuple(pixels[4, 4]) == WHITE
    mask = read_mask(data)
    assert mask[:, 4:].all() and not mask[:, :4].any()


def test_grey_palette_cmyk_and_sixteen_bits():
    ramp = np.linspace(0, 255, 16).astype(np.uint8)[None].repeat(4, 0)
    grey = np.stack([ramp] * 3, -1)
    assert np.array_equal(read_image(encoded(Image.fromarray(ramp))), grey)
    assert np.array_equal(read_image(encoded(Image.fromarray(ramp.astype(np.uint16) * 257))), grey)
    assert np.array_equal(read_image(encoded(Image.fromarray(ramp.astype(np.float32) / 255), "TIFF")), grey)
    assert np.array_equal(read_image(encoded(Image.fromarray(grey).quantize(16))), grey)
    cmyk = read_image(encoded(Image.fromarray(corners()).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk[2:10, 2:18].astype(int) - RED).max() < 12


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_odd_sizes_in_every_format(tmp_path, format):
    pixels = np.full((7, 5, 3), (40, 90, 200), np.uint8)
    path = tmp_path / f"picture.{format.lower()}"
    Image.fromarray(pixels).save(path)
    for source in (path, str(path), path.read_bytes()):
        found = read_image(source)
        assert found.shape == (7, 5, 3) and np.abs(found.astype(int) - pixels).max() < 8


@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.parametrize(
    ("data", "text"),
    [
        (png_file(20_000, 20_000), "more than 67108864 pixels"),
        (png_file(9_000, 9_000), "9000 x 9000 has more than 67108864 pixels"),
        (encoded(Image.new("RGB", (1, 1))), "is 1 x 1; at least 2 x 2"),
        (encoded(Image.fromarray(corners()))[:60], "damaged"),
        (b"", "damaged or no video"),
        (b"no picture at all", "damaged or no video"),
    ],
    ids=["bomb", "large", "tiny", "cut", "empty", "text"],
)
def test_pictures_that_are_refused_in_one_line(read, data, text):
    with pytest.raises(VideoError) as caught:
        read(data)
    assert text in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_missing_file_is_named(tmp_path):
    for read in (read_image, read_clip, read_mask):
        with pytest.raises(VideoError, match=r"none\.png.*No such file"):
            read(tmp_path / "none.png")


# ---- clips ----------------------------------------------------------------------------------------------------------


def test_rotation_of_a_phone_is_followed():
    one = 0x10000
    data = clip_bytes([corners(64, 32)] * 3)
    assert read_clip(data)[0].shape == (3, 32, 64, 3)
    for matrix, turns in [((0, one, 0, -one, 0, 0), -1), ((-one, 0, 0, 0, -one, 0), 2), ((0, -one, 0, one, 0, 0), 1)]:
        found, _ = read_clip(turned(data, (*matrix, 0, 0, 0x40000000)))
        expected = np.rot90(corners(64, 32), turns)
        assert found.shape[1:] == expected.shape
        for y in (0.25, 0.75):
            for x in (0.25, 0.75):
                spot = int(y * expected.shape[0]), int(x * expected.shape[1])
                assert np.abs(found[1][spot].astype(int) - expected[spot]).max() < 16, (turns, y, x)


@pytest.mark.parametrize(("colorspace", "kr", "kb"), [(1, 0.2126, 0.0722), (6, 0.299, 0.114)], ids=["bt709", "bt601"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
def test_matrix_and_range_are_followed(colorspace, kr, kb, full):
    colours = np.array([(200, 40, 60), (30, 180, 90), (240, 240, 240), (16, 16, 16)], float)
    for colour in colours:
        r, g, b = colour
        luma = kr * r + (1 - kr - kb) * g + kb * b
        cb, cr = (b - luma) / (2 - 2 * kb), (r - luma) / (2 - 2 * kr)
        if full:
            y, u, v = luma, 128 + cb, 128 + cr
        else:
            y, u, v = 16 + luma * 219 / 255, 128 + cb * 224 / 255, 128 + cr * 224 / 255
        plane = np.empty((48, 32), np.uint8)
        plane[:32], plane[32:40], plane[40:] = round(y), round(u), round(v)
        data = clip_bytes(None, planes=[plane] * 2, colorspace=colorspace, color_range=2 if full else 1)
        found = read_clip(data)[0][0, 16, 16].astype(int)
        assert np.abs(found - colour).max() <= 4, (colour, found)


def test_wide_pixels_are_made_square():
    data = clip_bytes([corners(32, 32)] * 2, sample_aspect_ratio=Fraction(2, 1))
    assert read_clip(data)[0].shape == (2, 32, 64, 3)


def shades(count):
    return [np.full((16, 16, 3), 8 * i, np.uint8) for i in range(count)]


def shown(clip):
    return np.round(clip[:, 8, 8, 1] / 8).astype(int).tolist()


def test_even_clip_is_left_as_it_is():
    for rate in (16, 30, 24):
        clip, fps = read_clip(clip_bytes(shades(12), rate=rate))
        assert shown(clip) == list(range(12)) and fps == pytest.approx(rate)


def test_varying_rate_holds_each_frame_until_the_next():
    times = [0, 100, 200, 600, 700, 800]  # ms: nothing new for 400 ms
    data = clip_bytes(shades(6), times=times, format="matroska")
    clip, fps = read_clip(data, fps=10)
    assert fps == 10 and shown(clip) == [0, 1, 2, 2, 2, 2, 3, 4, 5]


def test_another_rate_and_a_cut():
    data = clip_bytes(shades(30), rate=30)
    clip, fps = read_clip(data, fps=15)
    assert fps == 15 and len(clip) == 15 and np.abs(np.array(shown(clip)) - np.arange(0, 30, 2)).max() <= 1
    assert len(read_clip(data, fps=60)[0]) == 60
    assert shown(read_clip(data, max_frames=4)[0]) == [0, 1, 2, 3]


def test_transparent_clip_is_laid_on_black():
    frames = [Image.new("RGBA", (16, 16), (255, 0, 0, 0)) for _ in range(2)]
    frames[1].paste((0, 0, 255, 255), (0, 0, 8, 16))
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100, disposal=2)
    clip = read_video(data).frames
    assert tuple(clip[0, 8, 12]) == BLACK and tuple(clip[-1, 8, 12]) == BLACK
    assert np.abs(clip[-1, 8, 4].astype(int) - BLUE).max() < 10


def test_clips_that_are_refused_in_one_line():
    whole = clip_bytes([np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8) for i in range(12)])
    for data, text in [
        (sound_file(), "holds no video"),
        (whole[: len(whole) // 2], "damaged"),
        (b"", "damaged"),
    ]:
        with pytest.raises(VideoError, match=text):
            read_clip(data)
    with pytest.raises(VideoError, match="more than 3 frames of 32 x 32"):
        read_clip(whole, limits=Limits(max_bytes=32 * 32 * 3 * 3))


# ---- masks, keyframes, fields ---------------------------------------------------------------------------------------


def test_mask_from_picture_and_clip():
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, 16:] = 255
    assert np.array_equal(read_mask(encoded(Image.fromarray(half))), half[..., 0] > 0)
    mask = read_mask(clip_bytes([half, half[:, ::-1].copy()]))
    assert mask.shape == (2, 32, 32) and mask[0, :, 18:].all() and not mask[0, :, :14].any() and mask[1, :, :14].all()


def test_fields_of_a_request():
    clip = clip_bytes(shades(12), rate=10)
    picture = encoded(Image.fromarray(corners()))
    fields = request_fields(video=clip, mask=picture, num_frames=8)
    assert fields["video"].shape == (8, 16, 16, 3) and fields["fps"] == 10 and fields["mask"].dtype == bool
    fields = request_fields(image=picture, keyframes={-1: picture})
    assert set(fields) == {"image", "keyframes"} and fields["keyframes"][-1].shape == (24, 40, 3)


def test_keyframes_and_edges_from_text():
    assert parse_keyframes(["0:a.png", "79:b:c.png", "last:d"]) == {0: "a.png", 79: "b:c.png", -1: "d"}
    assert parse_expand("left=16, top=8") == {"left": 16, "top": 8}
    assert parse_expand("all=4,left=0") == {"left": 0, "right": 4, "top": 4, "bottom": 4}
    for texts in (["a.png"], ["0:"], ["x:a.png"], ["0:a.png", "first:b.png"]):
        with pytest.raises(InvalidRequest, match="keyframes="):
            parse_keyframes(texts)
    for text in ("", "left", "left=-1", "middle=3", "left=1.5"):
        with pytest.raises(InvalidRequest, match="expand="):
            parse_expand(text)
