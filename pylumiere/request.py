"""GenerationRequest: what a user asks for, checked at the edge.

Only what can be judged without a model is judged here; `diffusion.plan.plan_request` checks the rest against the model
(frames the network cannot divide, sizes it does not make) and fills in the model's defaults for fields left at None.

Pixels in a request and in a result are uint8 in 0..255 or float in 0..1. The networks' range -1..1 stays inside.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pylumiere.arrays import as_array, frames, is_image, moves, rgb
from pylumiere.errors import InvalidRequest, one_line

MAX_PROMPT_CHARACTERS = 20_000
MAX_FRAMES = 1_000_000
MAX_SIDE = 8_192
MIN_SIDE = 2  # of a given picture
EDGES = ("left", "right", "top", "bottom")
MAX_STEPS = 1_000
MAX_INPUT_BYTES = 2**31  # of one image, video or mask
ARRAYS = ("image", "video", "mask", "keyframes", "expand", "latents")  # not shown in an error
MAX_LORAS = 8
MAX_LORA_STRENGTH = 4


@dataclass(frozen=True)
class Progress:
    """Where a generation stands; what `callback_on_step_end` receives after every denoiser call.

    Stages run one after the other; where one's frames go to the next as they become final they run at once, and reports
    of both alternate. A stage that works in windows runs tasks (window, step) in an order of its own;
    `step` is then the number of tasks done over the number of windows, rounded down. While an input of unknown length
    is read, `step` is the number of tasks done, and what depends on the length is None.
    """

    stage: str  # its name in the model; "decoder"
    step: int
    steps: int | None
    frames_final: int  # frames of the stage's clip that will not change any more
    num_frames: int | None
    seconds_left: float | None  # of this stage


class GenerationRequest(BaseModel):
    """One clip to make. Frozen; a field left at None takes the model's default. It can be copied and pickled.

    Pictures, clips and masks are numpy's or torch's arrays of any device, or Pillow images, which mean what their files
    mean; see `pylumiere.arrays`.

    Attributes:
        prompt: what to show; not empty.
        negative_prompt: what guidance leads away from; the empty prompt by default.
        num_frames, fps: length and rate of the clip. The network divides num_frames; the engine names what it allows.
        height, width: of the result, after all stages and the decoder.
        num_inference_steps: of the first stage. Later ones take their own numbers from the model.
        guidance_scale: 1 turns guidance off (one network call a step instead of two).
        seed: 0 .. 2**64-1; drawn at random and reported with the result if None.
        sampler: "ddpm", "ddim", "dpmpp_2m" or "euler".
        image: [H, W, 3]; the clip's first frame.
        keyframes: frame number to [H, W, 3]; more given frames. Negative numbers count from the end: -1 is the last.
        video: [T, H, W, 3]; conditions every frame where `mask` is 0. Without a mask it is the start that `strength`
            below 1 adds noise to.
        mask: [H, W] or [T, H, W]; 1 (white) where the clip is to be made, 0 where `video` (or `image`) is kept.
        expand: edges ("left", "right", "top", "bottom") to pixels of the result that are made anew beside the picture.
        fit: "crop", "pad" or "stretch": where pictures of another shape lie; see `pylumiere.media.placement`.
        strength: with `video` and no mask, the share of the noise schedule to run, in 0..1 without 0.
        style: name of a style of the model, or a style's file; see `pylumiere.checkpoints.adapters`.
        style_strength: 0 is the model as it is, 1 is the style.
        lora: LoRA files for the first stage's network, each "FILE" or "FILE:STRENGTH" (1 if not given), or a mapping of
            files to strengths; applied in their order.
        loop: the clip's last frame runs into its first.
        latents: [T, h, w, C] float32, the first stage's noise to start from, of unit variance; drawn from the seed if
            None. h, w and C are those of the stage's frames.
        window_frames, window_overlap: temporal windows of the stages after the first; of the first where it is the only
            one.
        callback_on_step_end: called with a Progress after every denoiser call, from the thread that works. What it
            raises ends the generation and reaches the caller.
        output_type: "uint8" in 0..255, "float" (float32 in 0..1), or "latent": the last stage's frames before a
            decoder, float32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    prompt: str = Field(max_length=MAX_PROMPT_CHARACTERS)
    negative_prompt: str = Field("", max_length=MAX_PROMPT_CHARACTERS)
    num_frames: int | None = Field(None, ge=1, le=MAX_FRAMES)
    fps: float | None = Field(None, gt=0, le=1000, allow_inf_nan=False)
    height: int | None = Field(None, ge=1, le=MAX_SIDE)
    width: int | None = Field(None, ge=1, le=MAX_SIDE)
    num_inference_steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, le=2**64 - 1)
    sampler: Literal["ddpm", "ddim", "dpmpp_2m", "euler"] | None = None
    image: Any = None
    keyframes: Any = None
    video: Any = None
    mask: Any = None
    expand: Any = None
    fit: Literal["crop", "pad", "stretch"] = "crop"
    strength: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    style: str | PathLike | None = None
    style_strength: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    lora: Any = None
    loop: bool = Field(False, strict=True)
    latents: Any = None
    window_frames: int | None = Field(None, ge=1, le=MAX_FRAMES)
    window_overlap: int | None = Field(None, ge=0)
    callback_on_step_end: Callable[[Progress], None] | None = None
    output_type: Literal["uint8", "float", "latent"] = "uint8"

    def __init__(self, **fields: Any):
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise InvalidRequest(_one_line(error, type(self))) from None

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> GenerationRequest:
        try:
            return super().model_validate(obj, **kwargs)
        except ValidationError as error:
            raise InvalidRequest(_one_line(error, cls)) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **kwargs: Any) -> GenerationRequest:
        try:
            return super().model_validate_json(json_data, **kwargs)
        except ValidationError as error:
            raise InvalidRequest(_one_line(error, cls)) from None

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> GenerationRequest:
        """Shares the arrays, which are read-only."""
        return self.__copy__()

    def __getstate__(self) -> dict[Any, Any]:
        if self.callback_on_step_end is not None:
            raise InvalidRequest("callback_on_step_end cannot be pickled; leave it out: "
                                 "request.model_copy(update={'callback_on_step_end': None})")  # fmt: skip
        state = super().__getstate__()
        values = {name: dict(value) if isinstance(value, MappingProxyType) else value
                  for name, value in state["__dict__"].items()}  # fmt: skip
        return {**state, "__dict__": values}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        values = {name: MappingProxyType(value) if isinstance(value, dict) else value
                  for name, value in state["__dict__"].items()}  # fmt: skip
        for value in [*values.values(), *(values["keyframes"] or {}).values()]:
            if isinstance(value, np.ndarray):
                value.setflags(write=False)  # a pickle forgets it
        super().__setstate__({**state, "__dict__": values})

    @field_validator(
        "num_frames", "height", "width", "num_inference_steps", "seed", "window_frames", "window_overlap", mode="before"
    )
    @classmethod
    def _integer(cls, value: Any) -> Any:
        """Any integer type (numpy's too), and nothing that merely converts: no bool, no text, no 80.0."""
        if value is None:
            return None
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(f"should be an integer, not {type(value).__name__}")
        return operator.index(value)

    @field_validator("fps", "guidance_scale", "strength", "style_strength", mode="before")
    @classmethod
    def _real(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
            raise ValueError(f"should be a number, not {type(value).__name__}")
        return float(value)

    @field_validator("prompt")
    @classmethod
    def _prompt_not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("should be a text that is not empty")
        return value

    @field_validator("image")
    @classmethod
    def _image(cls, value: Any) -> Any:
        return None if value is None else _pixels(value, "[H, W, 3]", (3,), channels=3)

    @field_validator("keyframes")
    @classmethod
    def _keyframes(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, Mapping) or not value:
            raise ValueError("should map frame numbers to arrays [H, W, 3]")
        keyframes = {}
        for index, pixels in value.items():
            number = cls._integer(index)
            if abs(number) > MAX_FRAMES:
                raise ValueError(f"frame {number} is not in -{MAX_FRAMES}..{MAX_FRAMES}")
            keyframes[number] = _pixels(pixels, "[H, W, 3]", (3,), channels=3)
        return MappingProxyType(keyframes)

    @field_validator("expand")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, Mapping) or not set(value) <= set(EDGES):
            raise ValueError(f"should map edges ({', '.join(EDGES)}) to pixels")
        pixels = {edge: cls._integer(count) for edge, count in value.items()}
        if not pixels or not all(0 <= count <= MAX_SIDE for count in pixels.values()) or not any(pixels.values()):
            raise ValueError(f"should give at least one edge, each in 0..{MAX_SIDE} pixels")
        return MappingProxyType(pixels)

    @field_validator("lora")
    @classmethod
    def _lora(cls, value: Any) -> tuple[tuple[str, float], ...] | None:
        """(file, strength) in order."""
        if value is None:
            return None
        if isinstance(value, (str, PathLike)):
            value = [value]
        entries = value.items() if isinstance(value, Mapping) else [_lora_entry(entry) for entry in value]
        chosen = tuple((str(file), cls._real(strength)) for file, strength in entries)
        if not 1 <= len(chosen) <= MAX_LORAS:
            raise ValueError(f"has {len(chosen)} files; allowed are 1..{MAX_LORAS}")
        for file, strength in chosen:
            if not file or not abs(strength) <= MAX_LORA_STRENGTH:
                raise ValueError(f"{file!r} has strength {strength:g}; allowed are -{MAX_LORA_STRENGTH}.."
                                 f"{MAX_LORA_STRENGTH}")  # fmt: skip
        return chosen

    @field_validator("latents")
    @classmethod
    def _latents(cls, value: Any) -> np.ndarray | None:
        if value is None:
            return None
        if not (hasattr(value, "__array__") or hasattr(value, "__array_interface__")):
            raise ValueError(f"should be an array [T, h, w, C], not {type(value).__name__}")
        array = as_array(value)
        if array.ndim != 4 or 0 in array.shape or array.nbytes > MAX_INPUT_BYTES:
            raise ValueError(f"should have shape [T, h, w, C], not {list(array.shape)}")
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(f"dtype {array.dtype} should be float32")
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError("holds NaN or infinity")
        array.setflags(write=False)
        return array

    @field_validator("video")
    @classmethod
    def _video(cls, value: Any) -> Any:
        return None if value is None else _pixels(value, "[T, H, W, 3]", (4,), channels=3)

    @field_validator("mask")
    @classmethod
    def _mask(cls, value: Any) -> Any:
        if value is None:
            return None
        mask = _pixels(value, "[H, W] or [T, H, W]", (2, 3), channels=None)
        if not mask.any():
            raise ValueError("is black all over: nothing would be made anew")
        if mask.min() == (255 if mask.dtype == np.uint8 else 1):
            raise ValueError("is white all over: nothing would be kept; leave it out")
        return mask

    @model_validator(mode="after")
    def _together(self) -> GenerationRequest:
        window, overlap = self.window_frames, self.window_overlap
        if window is not None and overlap is not None and overlap >= window:
            raise ValueError(f"window_overlap={overlap} should be smaller than window_frames={window}")
        if self.image is not None and self.video is not None:
            raise ValueError("image and video are both given; give one of them")
        if self.keyframes is not None and (self.video is not None or self.mask is not None):
            raise ValueError("keyframes do not go with a video or a mask; give one of them")
        if self.keyframes is not None and self.image is not None and 0 in self.keyframes:
            raise ValueError("keyframes: frame 0 is given twice: image is the first frame")
        if self.mask is not None and self.image is None and self.video is None:
            raise ValueError("mask is given without a video or an image to keep")
        if self.expand is not None and self.image is None and self.video is None and self.keyframes is None:
            raise ValueError("expand is given without a video or an image to expand")
        if self.latents is not None and self.video is not None:
            raise ValueError("latents and video are both given, and a clip starts from one of them")
        if self.style is None and self.style_strength != 1.0:
            raise ValueError(f"style_strength={self.style_strength} has no meaning without a style")
        if self.video is not None and self.mask is None and self.expand is None and self.strength == 1.0:
            raise ValueError(
                "video is given without a mask and strength=1 keeps nothing of it; give a strength below 1"
            )
        if self.strength != 1.0 and self.video is None:
            raise ValueError(f"strength={self.strength} has no meaning without a video")
        mask_frames = len(self.mask) if self.mask is not None and self.mask.ndim == 3 else None
        if mask_frames is not None and self.video is not None and mask_frames != len(self.video):
            raise ValueError(f"mask has {mask_frames} frames and video has {len(self.video)}; give equal numbers")
        given = self.video if self.video is not None else self.image
        if self.mask is not None and self.mask.shape[-2:] != given.shape[-3:-1]:
            raise ValueError(
                f"mask is {self.mask.shape[-2]} x {self.mask.shape[-1]} and the frames are "
                f"{given.shape[-3]} x {given.shape[-2]} (height x width); give equal sizes"
            )
        return self


def _lora_entry(entry: Any) -> tuple[str, float]:
    """"FILE:STRENGTH" or "FILE", or a pair; the last colon counts, and only before a number."""
    if isinstance(entry, (str, PathLike)):
        file, colon, strength = str(entry).rpartition(":")
        try:
            return (file, float(strength)) if colon else (str(entry), 1.0)
        except ValueError:
            return str(entry), 1.0
    if isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], (str, PathLike)):
        return str(entry[0]), entry[1]
    raise ValueError(f'should be "FILE" or "FILE:STRENGTH", not {type(entry).__name__}')


def _pixels(value: Any, layout: str, ndims: tuple[int, ...], channels: int | None) -> np.ndarray:
    """A read-only copy: uint8, or float32 in 0..1 (from any float, or bool). numpy, torch and PIL are taken."""
    if is_image(value):
        value = _image_pixels(value, clip=3 + bool(channels) in ndims)
        value = value if channels else value[..., 1] >= 128  # as a mask from a file
    is_array = hasattr(value, "__array__") or hasattr(value, "__array_interface__")
    if isinstance(value, (str, bytes)) or not is_array:
        raise ValueError(f"should be an array {layout}, not {type(value).__name__}")
    array = as_array(value)
    if array.ndim not in ndims or 0 in array.shape or (channels is not None and array.shape[-1] != channels):
        raise ValueError(f"should have shape {layout}, not {list(array.shape)}")
    sides = array.shape[-3:-1] if channels else array.shape[-2:]
    if min(sides) < MIN_SIDE:
        raise ValueError(f"shape {list(array.shape)} is too small: at least {MIN_SIDE} x {MIN_SIDE} pixels")
    if max(sides) > MAX_SIDE or array.nbytes > MAX_INPUT_BYTES:
        raise ValueError(f"shape {list(array.shape)} is too large: at most {MAX_SIDE} a side, {MAX_INPUT_BYTES} bytes")
    if array.dtype == np.uint8:
        array = array.copy()
    elif array.dtype == bool or array.dtype in (np.float16, np.float32, np.float64):
        array = array.astype(np.float32)
        if not (array.min() >= 0 and array.max() <= 1):  # also true for NaN
            raise ValueError(f"floats should lie in 0..1; found {array.min():g} to {array.max():g}")
    else:
        raise ValueError(f"dtype {array.dtype} should be uint8 (0..255) or float (0..1)")
    array.setflags(write=False)
    return array


def _image_pixels(image: Any, clip: bool) -> np.ndarray:
    """[H, W, 3] uint8 of a Pillow image; [T, H, W, 3] of one that moves, where a clip is taken."""
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"image of {image.width} x {image.height} is too large: at most {MAX_SIDE} a side")
    most = MAX_INPUT_BYTES // (3 * image.width * image.height)
    try:
        if not (clip and moves(image)):
            return rgb(image)
        pixels = list(islice(frames(image), most + 1))
    except Exception as error:  # of many kinds, where its file is damaged
        raise ValueError(f"image cannot be read: {one_line(error)}") from error
    if len(pixels) > most:
        raise ValueError(f"image has more than {most} frames of {image.width} x {image.height}; make it shorter")
    return np.stack(pixels)


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """`field=value: what is allowed`, one clause per wrong field."""
    clauses = []
    for item in error.errors(include_url=False, include_context=False):
        name = ".".join(str(part) for part in item["loc"][:1])
        text = item["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if item["type"] == "extra_forbidden":
            clauses.append(f"unknown field {name!r}; allowed: {', '.join(model.model_fields)}")
        elif item["type"] == "missing":
            clauses.append(f"{name} is missing")
        elif not name:
            clauses.append(text)
        else:
            shown = "" if name in ARRAYS else f"={_short(item['input'])}"
            clauses.append(f"{name}{shown}: {text}")
    return "; ".join(clauses)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
