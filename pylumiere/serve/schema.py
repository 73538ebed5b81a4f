"""What comes in and what goes out: OpenAI's video objects, with this project's fields beside them.

A request's own checks are `GenerationRequest`'s and `plan_request`'s. OpenAI's fields become theirs:

    size      "WIDTHxHEIGHT"
    seconds   num_frames = seconds * fps, rounded to the nearest frame, at least one. fps is the request's, the given
              clip's, or the model's. More than the server's limit is an error.

Pictures, clips and masks come as files of a form, or in texts as base64 data URLs; see `pylumiere.serve.media`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pylumiere.errors import InvalidRequest
from pylumiere.media.inputs import parse_expand
from pylumiere.media.placement import Fit
from pylumiere.request import MAX_FRAMES, MAX_LORAS, MAX_PROMPT_CHARACTERS, MAX_SIDE, MAX_STEPS

VARIANTS = {
    "video": ("video.mp4", "video/mp4"),
    "thumbnail": ("thumbnail.webp", "image/webp"),
    "spritesheet": ("spritesheet.jpg", "image/jpeg"),
    "image": ("image.png", "image/png"),
}
Variant = Literal["video", "thumbnail", "spritesheet", "image"]
Status = Literal["queued", "in_progress", "completed", "failed"]
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
_DATA_URL = re.compile(r"data:(image|video)/[a-z0-9.+-]{1,40};base64")
MAX_TIMEOUT = 10**7  # seconds
EDIT_STRENGTH = 0.6
# Fields that a GenerationRequest has under the same names.
_SHARED = (
    "negative_prompt", "num_frames", "fps", "num_inference_steps", "guidance_scale", "seed", "sampler", "fit",
    "strength", "style", "style_strength", "lora", "loop", "window_frames", "window_overlap",
)  # fmt: skip
_Lora = Annotated[str, Field(min_length=1, max_length=200)]


class ApiError(Exception):
    """An answer that is not 2xx, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after: int | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message, "type": kind.get(self.status, default), "param": self.param, "code": self.code,
        }  # fmt: skip
        return {"error": error}


# ---- in --------------------------------------------------------------------------------------------------------------


class ImageReference(BaseModel):
    """A picture or clip inside the request. Nothing is fetched: the URL must be a base64 data URL."""

    model_config = ConfigDict(extra="forbid")

    image_url: str = Field(description="data:image/png;base64,... or data:video/mp4;base64,...")


class VideoReference(BaseModel):
    """A completed video of the same key."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(max_length=100)


class Sampling(BaseModel):
    """What every kind of request has. Fields that are not given take the model's defaults."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS, description="What to show.")
    model: str | None = Field(None, max_length=200, description="A name that GET /v1/models lists.")
    negative_prompt: str = Field("", max_length=MAX_PROMPT_CHARACTERS)
    num_inference_steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, le=2**64 - 1)
    sampler: Literal["ddpm", "ddim", "dpmpp_2m", "euler"] | None = None
    style: str | None = Field(None, max_length=200, description="A style that GET /v1/models lists.")
    style_strength: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    lora: _Lora | Annotated[list[_Lora], Field(min_length=1, max_length=MAX_LORAS)] | None = Field(
        None, description='A LoRA that GET /v1/models lists, with a strength other than 1 as "name:0.8"; or several.'
    )
    window_frames: int | None = Field(None, ge=1, le=MAX_FRAMES)
    window_overlap: int | None = Field(None, ge=0, le=MAX_FRAMES)
    timeout: float | None = Field(
        None, gt=0, le=MAX_TIMEOUT, allow_inf_nan=False,
        description="Seconds from now in which the clip must be done; else it fails.",
    )  # fmt: skip

    @field_validator("lora")
    @classmethod
    def _listed(cls, value: str | list[str] | None) -> list[str] | None:
        return [value] if isinstance(value, str) else value


class Options(Sampling):
    """What a clip of any length and shape has beside."""

    seconds: str | float | None = Field(
        None, description='Length of the clip, such as "4"; rounded to a whole frame.'
    )
    size: str | None = Field(None, pattern=f"^{_SIZE.pattern}$", description="WIDTHxHEIGHT of the result.")
    num_frames: int | None = Field(None, ge=1, le=MAX_FRAMES, description="Instead of seconds.")
    fps: float | None = Field(None, gt=0, le=1000, allow_inf_nan=False)
    mask: str | None = Field(
        None, description="A picture or clip as a data URL, or a file of a form: white is made anew, black is kept."
    )
    expand: Annotated[str, Field(max_length=200)] | dict[str, int] | None = Field(
        None, description='Pixels of the result to make beside the picture: {"left": 16} or "left=16,right=16".'
    )
    fit: Fit | None = Field(None, description="How pictures of another shape go into the frame.")
    strength: float | None = Field(
        None, gt=0, le=1, allow_inf_nan=False, description="With a clip: how much of the noise schedule to run."
    )
    loop: bool = Field(False, description="The last frame runs into the first.")


class CreateVideo(Options):
    """OpenAI's fields, then this project's. Fields that are not given take the model's defaults."""

    input_reference: ImageReference | None = Field(
        None, description="The first frame, or a clip, told apart by decoding: in a form a file, in JSON an object."
    )
    keyframes: dict[str, str] | None = Field(
        None, max_length=64, description='More given frames: {"79": data URL, "last": data URL}, or files of a form.'
    )


class EditVideo(Options):
    """A clip and a new prompt for it: video to video, or with a mask or `expand`, inpainting or outpainting."""

    video: VideoReference | None = Field(None, description="In a form a file, in JSON a completed video's id.")


class ExtendVideo(Sampling):
    """A clip, and how long it is to go on."""

    seconds: str | float = Field(description='Length of the new part, such as "4".')
    video: VideoReference | None = Field(None, description="In a form a file, in JSON a completed video's id.")


class RemixVideo(BaseModel):
    """A new prompt for a finished clip; everything else, its seed included, stays."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)


KEYFRAME = re.compile(r"keyframes\[(-?\w{1,20})\]")
Files = Mapping[str, bytes]  # by the form's fields
# The files that a form may bring, by request.
FILES = {
    CreateVideo: ("input_reference", "mask", "keyframes"), EditVideo: ("video", "mask"), ExtendVideo: ("video",),
    RemixVideo: (),
}  # fmt: skip


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object; NaN, infinity, lone surrogates and deep nesting are refused."""
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body should be a JSON object", code="invalid_json")
    return value


def validated(model: type[BaseModel], fields: dict[str, Any], *, are_texts: bool) -> Any:
    """Fields as a model. From JSON the types must be right; a form's values are texts that are converted.

    Raises:
        ApiError: (400) the first wrong field, named with what is allowed.
    """
    for value in fields.values():
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ApiError(400, "a text holds characters that are no Unicode text", code="invalid_value") from None
    try:
        return model.model_validate(fields, strict=not are_texts)
    except ValidationError as error:
        item = error.errors(include_url=False, include_context=False)[0]
        name = str(item["loc"][0]) if item["loc"] else None
        if item["type"] == "extra_forbidden":
            message, code = f"unknown field {_short(name)}; allowed: {', '.join(model.model_fields)}", "unknown_field"
        elif item["type"] == "missing":
            message, code = f"{'.'.join(map(str, item['loc']))} is missing", "missing_field"
        else:
            text = item["msg"].replace("Input should", "should").replace("String should", "should")
            message, code = f"{name}={_short(item['input'])}: {text}", "invalid_value"
        raise ApiError(400, message, code=code, param=None if name is None else name[:100]) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def data_url_bytes(url: str, param: str) -> bytes:
    """What a base64 data URL holds."""
    head, comma, data = url.partition(",")
    if not comma or not _DATA_URL.fullmatch(head):
        raise ApiError(
            400, f"{param} should be a data URL: data:image/png;base64,... (or another picture or clip); "
            "this server fetches nothing", code="invalid_image", param=param,
        )  # fmt: skip
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param} is not valid base64", code="invalid_image", param=param) from None


def frames_for(seconds: str | float, fps: float, most: int) -> int:
    """The rule in this module's docstring.

    Raises:
        InvalidRequest: no such time, or a longer clip than this server makes.
    """
    text = f"{seconds:.6f}" if isinstance(seconds, float) else str(seconds)
    if not _SECONDS.fullmatch(text) or float(text) == 0:
        raise InvalidRequest(f"seconds={_short(seconds)}: should be a number of seconds, such as '4'")
    num_frames = max(1, round(float(text) * fps))
    if num_frames > most:
        raise InvalidRequest(f"seconds={float(text):g}: this server makes up to {most / fps:g} s ({most} frames)")
    return num_frames


def generation_fields(options: Sampling, fps: float, most_frames: int) -> dict[str, Any]:
    """The fields of a GenerationRequest, JSON values only (no pixels).

    Args:
        fps: of the result where the request names none: the given clip's or the model's.

    Raises:
        InvalidRequest: seconds and num_frames that are both given, or a longer clip than this server makes.
    """
    fields = {"prompt": options.prompt, **{name: getattr(options, name, None) for name in _SHARED}}
    if isinstance(options, Options):
        fields |= _shape(options)
        if options.seconds is not None:
            if options.num_frames is not None:
                text = f"seconds={_short(options.seconds)}: num_frames={options.num_frames} is given as well"
                raise InvalidRequest(f"{text}; give one of them")
            fields["num_frames"] = frames_for(options.seconds, options.fps or fps, most_frames)
    if (fields["num_frames"] or 0) > most_frames:
        raise InvalidRequest(f"num_frames={fields['num_frames']}: this server makes up to {most_frames} frames")
    return {name: value for name, value in fields.items() if value is not None}


def _shape(options: Options) -> dict[str, Any]:
    fields: dict[str, Any] = {"expand": options.expand}
    if isinstance(options.expand, str):
        fields["expand"] = parse_expand(options.expand)
    if options.size is not None:
        match = _SIZE.fullmatch(options.size)
        fields["width"], fields["height"] = int(match[1]), int(match[2])
        for side in ("width", "height"):
            if not 1 <= fields[side] <= MAX_SIDE:
                raise InvalidRequest(f"size={options.size!r}: each side should be in 1..{MAX_SIDE}")
    return fields


def invalid(error: Exception, code: str = "invalid_value", given: str = "input_reference") -> ApiError:
    """An engine's refusal as a 400; the field, or the application's, that the message begins with is its `param`.

    Args:
        given: what the client calls its picture or clip.
    """
    match = re.match(r"(\w+)", str(error))
    same = {"height": "size", "width": "size", "image": given, "video": given,
            "cinemagraph": "mask", "inpainting": "mask", "outpainting": "expand"}  # fmt: skip
    name = match and same.get(match[1], match[1])
    param = name if name in {*CreateVideo.model_fields, *EditVideo.model_fields} else None
    return ApiError(400, str(error), code=code, param=param)


# ---- out -------------------------------------------------------------------------------------------------------------


class VideoError(BaseModel):
    code: str
    message: str


class VideoObject(BaseModel):
    """OpenAI's video object; from `num_frames` on the fields are this project's."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    remixed_from_video_id: str | None
    seconds: str
    size: str
    error: VideoError | None
    num_frames: int
    fps: float
    seed: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    negative_prompt: str
    application: str
    expand: dict[str, int] | None
    fit: Fit
    strength: float
    style: str | None
    style_strength: float
    lora: list[str]
    loop: bool


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class StageObject(BaseModel):
    """A network that samples."""

    name: str
    family: str


class ModelObject(BaseModel):
    """OpenAI's model object; from `stages` on the fields are this project's."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pylumiere"
    stages: list[StageObject] = Field(description="In the order in which they run; a decoder comes after them.")
    decoder: str | None = Field(description="Family of the decoder; progress calls it `decoder`.")
    applications: list[str] = Field(description="That the model takes, as a video object calls them.")
    defaults: dict[str, Any]
    limits: dict[str, Any]
    styles: list[str]
    loras: list[str]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(BaseModel):
    error: ErrorBody
