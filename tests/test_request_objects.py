"""Pillow images and tensors of every kind in requests; copies and pickles of requests."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from support.media import corners

from pylumiere import GenerationRequest
from pylumiere.errors import InvalidRequest
from pylumiere.media.inputs import read_image, read_mask

RAMP = np.linspace(0, 255, 16).astype(np.uint8)[None].repeat(4, 0)
GREY = np.stack([RAMP] * 3, -1)


def glass() -> Image.Image:
    """Red: its left half cannot be seen, its right half by half; below left a white spot."""
    pixels = np.full((8, 16, 4), (255, 0, 0, 128), np.uint8)
    pixels[:, :8, 3] = 0
    pixels[4:, :4] = 255
    return Image.fromarray(pixels, "RGBA")


def turned(orientation: int) -> Image.Image:
    image = Image.fromarray(corners())
    image.getexif()[0x0112] = orientation
    return image


IMAGES = {
    "grey": (Image.fromarray(RAMP), "PNG"),
    "16 bits": (Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG"),
    "16 bits in 32": (Image.fromarray(RAMP.astype(np.int32) * 257), "TIFF"),
    "float": (Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"),
    "palette": (Image.fromarray(GREY).quantize(16), "PNG"),
    "one bit": (Image.fromarray(RAMP > 99), "PNG"),
    "cmyk": (Image.fromarray(corners()).convert("CMYK"), "TIFF"),
    "transparent": (glass(), "PNG"),
    "grey and transparent": (glass().convert("LA"), "PNG"),
    "palette and transparent": (glass().quantize(8), "PNG"),
    **{f"EXIF {orientation}": (turned(orientation), "PNG") for orientation in range(1, 9)},
}


def file_of(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format, exif=image.getexif())
    return file.getvalue()


@pytest.mark.parametrize("name", IMAGES)
def test_a_pillow_image_means_what_its_file_means(name):
    image, format = IMAGES[name]
    data = file_of(image, format)
    found = GenerationRequest(prompt="x", image=image).image
    np.testing.assert_array_equal(found, read_image(data))
    np.testing.assert_array_equal(GenerationRequest(prompt="x", image=Image.open(io.BytesIO(data))).image, found)
    mask = GenerationRequest(prompt="x", image=np.zeros_like(found), mask=image).mask
    np.testing.assert_array_equal(mask > 0, read_mask(data))


@pytest.mark.parametrize("name", ["grey", "16 bits", "16 bits in 32", "float", "palette"])
def test_a_ramp_is_the_same_ramp_in_every_mode(name):
    np.testing.assert_array_equal(GenerationRequest(prompt="x", image=IMAGES[name][0]).image, GREY)


def test_transparent_pixels_are_laid_on_black():
    found = GenerationRequest(prompt="x", image=glass()).image
    assert found[0, 0].tolist() == [0, 0, 0] and found[0, 8].tolist() == [128, 0, 0]
    assert found[7, 0].tolist() == [255, 255, 255]


def test_the_transparent_grey_of_a_sixteen_bit_picture_is_black():
    data = io.BytesIO()
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(data, "PNG", transparency=65535)
    assert read_image(data.getvalue())[0, :, 0].tolist() == [*RAMP[0, :-1].tolist(), 0]


def test_the_users_image_stays_as_it_was():
    image = turned(6)
    GenerationRequest(prompt="x", image=image)
    assert image.size == (40, 24) and image.getexif()[0x0112] == 6


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_a_clip_where_a_clip_is_taken_and_its_frame_elsewhere(format):
    shades = [Image.new("L", (8, 6), level) for level in (0, 255, 40)]
    file = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    shades[0].save(file, format, save_all=True, append_images=shades[1:], duration=100, **options)
    animation = Image.open(file)
    animation.seek(1)
    request = GenerationRequest(prompt="x", video=animation, mask=animation)
    assert request.video.shape == (3, 6, 8, 3) and request.video[:, 0, 0, 0].tolist() == [0, 255, 40]
    assert request.mask[:, 0, 0].tolist() == [0, 1, 0]
    assert animation.tell() == 1
    assert GenerationRequest(prompt="x", image=animation).image.max() == 255


def test_a_damaged_image_is_one_line():
    image = Image.open(io.BytesIO(file_of(turned(1).resize((400, 240)), "PNG")[:200]))
    with pytest.raises(InvalidRequest, match="^image: image cannot be read: ") as caught:
        GenerationRequest(prompt="x", image=image)
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidRequest, match="image of 9000 x 2 is too large: at most 8192 a side"):
        GenerationRequest(prompt="x", image=Image.new("L", (9000, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_of_every_float_are_taken_also_with_a_gradient(dtype):
    tensor = torch.linspace(0, 1, 6 * 8 * 3, dtype=dtype).reshape(6, 8, 3)
    for given in (tensor, tensor.clone().requires_grad_(), tensor.flip(0).flip(0)):
        found = GenerationRequest(prompt="x", image=given).image
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, tensor.float().numpy())
    latents = tensor.reshape(1, 6, 8, 3).clone().requires_grad_()
    np.testing.assert_array_equal(GenerationRequest(prompt="x", latents=latents).latents, latents.detach().float())


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_taken():
    tensor = torch.rand(6, 8, 3)
    found = GenerationRequest(prompt="x", image=tensor.cuda().requires_grad_()).image
    np.testing.assert_array_equal(found, tensor.numpy())


@pytest.mark.parametrize("tensor", [torch.zeros(6, 8, 3).to_sparse(), torch.zeros(6, 8, 3, device="meta")],
                         ids=["sparse", "meta"])  # fmt: skip
def test_tensors_without_pixels_are_refused_in_one_line(tensor):
    with pytest.raises(InvalidRequest, match="^image: cannot be read as an array: ") as caught:
        GenerationRequest(prompt="x", image=tensor)
    assert "\n" not in str(caught.value)


# ---- copies ----------------------------------------------------------------------------------------------------------


def full_request() -> GenerationRequest:
    frame = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    return GenerationRequest(prompt="x", seed=7, keyframes={0: frame, -1: frame}, expand={"left": 4}, lora=["a.st:0.5"],
                             latents=np.ones((2, 3, 4, 3), np.float32))  # fmt: skip


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, lambda r: r.model_copy(), lambda r: r.model_copy(deep=True),
     lambda r: pickle.loads(pickle.dumps(r)), lambda r: pickle.loads(pickle.dumps(r, 2))],
    ids=["copy", "deepcopy", "model_copy", "model_copy deep", "pickle", "pickle 2"],
)  # fmt: skip
def test_a_request_can_be_copied_and_pickled(again):
    request = full_request()
    found = again(request)
    assert found is not request and found.model_fields_set == request.model_fields_set
    assert (found.prompt, found.seed, found.lora, dict(found.expand)) == ("x", 7, (("a.st", 0.5),), {"left": 4})
    assert list(found.keyframes) == [0, -1]
    for name, array in (("keyframes", found.keyframes[-1]), ("latents", found.latents)):
        given = getattr(request, name)
        np.testing.assert_array_equal(array, given[-1] if name == "keyframes" else given)
        assert not array.flags.writeable
    with pytest.raises(TypeError):
        found.keyframes[1] = found.keyframes[0]
    with pytest.raises(ValueError):
        found.seed = 8


def test_a_callback_is_copied_but_not_pickled():
    request = GenerationRequest(prompt="x", callback_on_step_end=print)
    assert copy.deepcopy(request).callback_on_step_end is print
    with pytest.raises(InvalidRequest, match="callback_on_step_end cannot be pickled; leave it out"):
        pickle.dumps(request)
    assert pickle.loads(pickle.dumps(request.model_copy(update={"callback_on_step_end": None}))).prompt == "x"
