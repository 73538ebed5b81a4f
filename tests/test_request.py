"""The request's edge: what is accepted, and that every refusal names the value and what is allowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pylumiere.errors import InvalidRequest
from pylumiere.request import GenerationRequest

FRAMES = np.zeros((4, 6, 8, 3), np.uint8)


def test_defaults_are_left_to_the_model():
    request = GenerationRequest(prompt="a red circle")
    assert request.num_frames is request.seed is request.sampler is request.guidance_scale is None
    assert request.output_type == "uint8" and request.negative_prompt == ""


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("prompt", "", "not empty"),
        ("prompt", " \n", "not empty"),
        ("prompt", 7, "valid string"),
        ("num_frames", 0, "greater than or equal to 1"),
        ("num_frames", -5, "greater than or equal to 1"),
        ("num_frames", 80.0, "integer"),
        ("num_frames", True, "integer"),
        ("num_frames", 10**9, "less than or equal to 1000000"),
        ("height", 0, "greater than or equal to 1"),
        ("width", 20_000, "less than or equal to 8192"),
        ("fps", 0, "greater than 0"),
        ("fps", float("inf"), "finite"),
        ("num_inference_steps", 0, "greater than or equal to 1"),
        ("num_inference_steps", "30", "integer"),
        ("guidance_scale", float("nan"), "finite"),
        ("guidance_scale", float("inf"), "finite"),
        ("guidance_scale", -1.0, "greater than or equal to 0"),
        ("guidance_scale", "2", "number"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**64, "less than or equal to 18446744073709551615"),
        ("sampler", "plms", "'ddpm', 'ddim', 'dpmpp_2m' or 'euler'"),
        ("strength", 1.5, "less than or equal to 1"),
        ("strength", 0.0, "greater than 0"),
        ("fit", "zoom", "'crop', 'pad' or 'stretch'"),
        ("style_strength", 1.5, "less than or equal to 1"),
        ("style_strength", -0.1, "greater than or equal to 0"),
        ("loop", 1, "valid boolean"),
        ("window_frames", 0, "greater than or equal to 1"),
        ("window_overlap", -1, "greater than or equal to 0"),
        ("output_type", "png", "'uint8', 'float' or 'latent'"),
        ("callback_on_step_end", 3, "callable"),
    ],
)
def test_wrong_value_is_named_with_what_is_allowed(field, value, allowed):
    with pytest.raises(InvalidRequest) as caught:
        GenerationRequest(**{"prompt": "x", field: value})
    text = str(caught.value)
    assert text.startswith(f"{field}={value!r}"), text
    assert allowed in text and "\n" not in text, text


def test_invalid_request_is_a_value_error():
    with pytest.raises(ValueError, match="prompt is missing"):
        GenerationRequest()


def test_all_wrong_fields_are_named_at_once():
    with pytest.raises(InvalidRequest, match=r"num_frames=0.*; seed=-1"):
        GenerationRequest(prompt="x", num_frames=0, seed=-1)


def test_unknown_field_lists_the_known_ones():
    with pytest.raises(InvalidRequest, match=r"unknown field 'steps'; allowed: prompt, .*num_inference_steps"):
        GenerationRequest(prompt="x", steps=3)


def test_other_ways_in_raise_the_same_error():
    with pytest.raises(InvalidRequest, match="num_frames=0"):
        GenerationRequest.model_validate({"prompt": "x", "num_frames": 0})
    with pytest.raises(InvalidRequest, match="num_frames=0"):
        GenerationRequest.model_validate_json('{"prompt": "x", "num_frames": 0}')
    assert GenerationRequest.model_validate_json('{"prompt": "x", "fps": 8}').fps == 8.0


def test_numpy_numbers_are_numbers():
    request = GenerationRequest(prompt="x", num_frames=np.int64(16), guidance_scale=np.float32(2), fps=16)
    assert type(request.num_frames) is int and request.num_frames == 16
    assert type(request.guidance_scale) is float and request.fps == 16.0


def test_frozen():
    request = GenerationRequest(prompt="x", image=FRAMES[0])
    with pytest.raises(Exception, match="frozen"):
        request.prompt = "y"
    with pytest.raises(ValueError, match="read-only"):
        request.image[0] = 1


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_seed_range(seed):
    assert GenerationRequest(prompt="x", seed=seed).seed == seed


def test_pixels_stay_uint8_or_become_float32():
    ramp = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    for given in (ramp, torch.from_numpy(ramp), Image.fromarray(ramp)):
        image = GenerationRequest(prompt="x", image=given).image
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, ramp)
    image = GenerationRequest(prompt="x", image=ramp.astype(np.float64) / 255).image
    assert image.dtype == np.float32
    np.testing.assert_allclose(image * 255, ramp, atol=1e-4)
    mask = GenerationRequest(prompt="x", video=FRAMES, mask=np.eye(6, 8, dtype=bool)).mask
    np.testing.assert_array_equal(mask, np.eye(6, 8, dtype=np.float32))


def test_the_users_array_is_not_touched_or_shared():
    given = np.full((6, 8, 3), 0.5, np.float32)
    request = GenerationRequest(prompt="x", image=given)
    given[:] = 0
    assert request.image.min() == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": "first.png"}, "should be an array"),
        ({"image": FRAMES}, r"should have shape \[H, W, 3\], not \[4, 6, 8, 3\]"),
        ({"image": np.zeros((6, 0, 3), np.uint8)}, "should have shape"),
        ({"image": np.zeros((6, 8, 3), np.int32)}, "dtype int32 should be uint8"),
        ({"image": np.full((6, 8, 3), 2.0)}, r"floats should lie in 0\.\.1; found 2"),
        ({"image": np.full((6, 8, 3), np.nan)}, r"floats should lie in 0\.\.1; found nan"),
        ({"image": np.broadcast_to(np.uint8(0), (20_000, 2, 3))}, "too large"),
        ({"video": FRAMES[0]}, r"should have shape \[T, H, W, 3\]"),
        ({"video": FRAMES, "image": FRAMES[0]}, "image and video are both given"),
        ({"mask": np.eye(6, 8)}, "mask is given without a video or an image"),
        ({"video": FRAMES, "mask": np.tile(np.eye(6, 8), (3, 1, 1))}, "mask has 3 frames and video has 4"),
        ({"video": FRAMES, "mask": np.eye(6)}, "mask is 6 x 6 and the frames are 6 x 8"),
        ({"video": FRAMES, "mask": np.zeros((6, 8), bool)}, "mask: is black all over: nothing would be made"),
        ({"video": FRAMES, "mask": np.full((6, 8), 255, np.uint8)}, "mask: is white all over: nothing would be kept"),
        ({"image": np.zeros((1, 1, 3), np.uint8)}, r"image: shape \[1, 1, 3\] is too small: at least 2 x 2"),
        ({"keyframes": {}}, "keyframes: should map frame numbers"),
        ({"keyframes": {"0": FRAMES[0]}}, "keyframes: should be an integer"),
        ({"keyframes": {0: FRAMES}}, "keyframes: should have shape"),
        ({"image": FRAMES[0], "keyframes": {0: FRAMES[0]}}, "frame 0 is given twice"),
        ({"video": FRAMES, "keyframes": {0: FRAMES[0]}, "strength": 0.5}, "keyframes do not go with a video"),
        ({"expand": {"left": 4}}, "expand is given without a video or an image"),
        ({"image": FRAMES[0], "expand": {"middle": 4}}, r"expand: should map edges \(left, right, top, bottom\)"),
        ({"image": FRAMES[0], "expand": {"left": 0}}, "expand: should give at least one edge"),
        ({"style_strength": 0.5}, "style_strength=0.5 has no meaning without a style"),
        ({"strength": 0.5}, "strength=0.5 has no meaning without a video"),
        ({"video": FRAMES}, "video is given without a mask and strength=1 keeps nothing of it"),
        ({"window_frames": 4, "window_overlap": 4}, "window_overlap=4 should be smaller than window_frames=4"),
    ],
)
def test_pixels_and_combinations_that_are_refused(fields, message):
    with pytest.raises(InvalidRequest, match=message):
        GenerationRequest(prompt="x", **fields)
