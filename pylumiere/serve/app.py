"""The routes: OpenAI's video API, events, models, health, metrics, the page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from math import ceil
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import pylumiere
from pylumiere.config import ModelConfig
from pylumiere.diffusion.plan import MAX_ENLARGEMENT, plan_request, size_step
from pylumiere.errors import BudgetExceeded, InvalidRequest
from pylumiere.media.inputs import parse_keyframes
from pylumiere.media.readers import Limits as VideoLimits
from pylumiere.request import GenerationRequest
from pylumiere.serve import media, schema
from pylumiere.serve.gate import ANYONE, Gate
from pylumiere.serve.hub import Hub
from pylumiere.serve.jobs import Runner, Worker, check_style
from pylumiere.serve.keys import Key, KeyRing
from pylumiere.serve.metrics import CONTENT_TYPE, Metrics
from pylumiere.serve.schema import (
    VARIANTS,
    ApiError,
    CreateVideo,
    DeletedVideo,
    EditVideo,
    ErrorObject,
    ExtendVideo,
    ModelList,
    ModelObject,
    Options,
    RemixVideo,
    Sampling,
    Variant,
    VideoList,
    VideoObject,
)
from pylumiere.serve.store import Job, QueueFull, Store

logger = logging.getLogger("pylumiere")

POLL_AFTER_MS = 500
BEAT_SECONDS = 15.0
MAX_LISTENERS = 256
_MAX_FIELDS, _MAX_FILES = 128, 66
MODEL_LENGTHS = 8  # the longest clip over the model's own, unless `Limits.frames` says otherwise
_TOKEN = re.compile(r"[\x21-\x7e]{1,200}")
_PAGE = {
    "page.css": "text/css", "page.js": "text/javascript", "painter.js": "text/javascript", "icon.svg": "image/svg+xml",
}  # fmt: skip

_KEYFRAME = re.compile(r"keyframes\[(-?\w{1,20})\]")
Files = Mapping[str, bytes]  # by the form's fields
_FILES = {
    CreateVideo: ("input_reference", "mask", "keyframes"), EditVideo: ("video", "mask"), ExtendVideo: ("video",),
    RemixVideo: (),
}  # fmt: skip

VideoId = Annotated[str, Path(description="As POST /v1/videos returned it.", max_length=100)]


@dataclass(frozen=True)
class Limits:
    """What a service takes.

    Attributes:
        queue: jobs that wait; one more is answered with 429.
        jobs_per_owner: waiting and running, where there are no keys; a key has its own.
        body_bytes: of one request.
        image_pixels: of one picture, or frame of a clip, that is given.
        decoded_bytes: of one given clip; a byte for each colour of a pixel.
        frames: of one clip; None is `MODEL_LENGTHS` times the model's own length.
        deadline: seconds in which a job must be done whose request names none; None is no limit.
    """

    queue: int = 256
    jobs_per_owner: int = 1024
    body_bytes: int = 12 * 2**20
    image_pixels: int = 16 * 2**20
    decoded_bytes: int = 256 * 2**20
    frames: int | None = None
    deadline: float | None = None

    @property
    def files(self) -> VideoLimits:
        """Of each file of a request."""
        return VideoLimits(max_pixels=self.image_pixels, max_bytes=self.decoded_bytes)


@dataclass
class Service:
    """Everything behind the routes.

    Attributes:
        names: of the model; the first is reported, all are taken.
        styles: of the model.
        is_ready: false with a reason while jobs would only wait.
    """

    config: ModelConfig
    store: Store
    keys: KeyRing | None = None
    limits: Limits = Limits()
    concurrency: int = 1
    names: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    hub: Hub = field(default_factory=Hub)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self):
        self.names = self.names or (self.config.name,)
        self.most_frames = self.limits.frames or MODEL_LENGTHS * self.config.base.network.num_frames
        self.created = int(time.time())
        self.runner = Runner(
            self.store, self.hub, self.metrics, concurrency=self.concurrency, limits=self.limits.files
        )
        self._decoding = threading.BoundedSemaphore(2)  # pictures are large while they are decoded
        for status in ("queued", "in_progress", "completed", "failed"):
            read = lambda status=status: self.store.counts()[status]  # noqa: E731
            self.metrics.gauge(f"pylumiere_store_{status}_jobs", f"Jobs on record that are {status}.", read)
        self.metrics.gauge("pylumiere_store_bytes", "Bytes of results on the disk.", self.store.result_bytes)
        self.metrics.gauge("pylumiere_listeners", "Open event streams.", lambda: self.hub.num_listeners)

    def start(self, worker: Worker) -> None:
        """Settles what an earlier process left, then runs jobs on the worker."""
        settled = self.store.recover()
        self.store.sweep()
        if any(settled.values()):
            logger.info("found jobs of an earlier process: %s", settled)
        self.runner.set_worker(worker)

    def close(self) -> None:
        self.hub.close()
        self.runner.close()
        self.store.close()

    # ---- what the routes do ------------------------------------------------------------------------------------------

    def create(self, key: Key | None, create: CreateVideo, files: Files, token: str | None) -> VideoObject:
        inputs, rate = self._inputs(create, files), None
        if "input_reference" in inputs:
            reference = inputs.pop("input_reference")
            if media.is_picture(reference):
                inputs["image"] = reference
            else:
                inputs["video"], rate = reference, media.clip_rate(reference, "input_reference", self.limits.files)
        with _refusals():
            fields = schema.generation_fields(create, rate or self.config.fps, self.most_frames)
        return self._accept(key, create, fields, inputs, token)

    def edit(self, key: Key | None, edit: EditVideo, files: Files, token: str | None) -> VideoObject:
        """Video to video, inpainting or outpainting of a file, or of a completed video in its own size."""
        inputs, (clip, rate, source) = self._inputs(edit, files), self._clip(key, edit, files)
        with _refusals("video"):
            fields = schema.generation_fields(edit, rate, self.most_frames)
        if edit.mask is None and "mask" not in files and edit.expand is None:
            fields.setdefault("strength", schema.EDIT_STRENGTH)
        return self._accept(key, edit, _sized(fields, source), {"video": clip, **inputs}, token, source, "video")

    def extend(self, key: Key | None, extend: ExtendVideo, files: Files, token: str | None) -> VideoObject:
        """The clip, and after it frames that the networks make with all of it in view."""
        clip, rate, source = self._clip(key, extend, files)
        with _refusals("video"):
            fields = schema.generation_fields(extend, rate, self.most_frames)
            fields["extend_by"] = schema.frames_for(extend.seconds, rate, self.most_frames - 1)
        return self._accept(key, extend, _sized(fields, source), {"video": clip}, token, source, "video")

    def remix(self, key: Key | None, remix: RemixVideo, id: str, token: str | None) -> VideoObject:
        source = self._completed(key, id)
        try:
            inputs = self.store.inputs(source)
        except FileNotFoundError:  # deleted meanwhile
            raise _no_video(id) from None
        with _refusals():
            GenerationRequest(prompt=remix.prompt)
        fields = {**source.request, "prompt": remix.prompt}
        return self._add(key, fields, source.plan, inputs, self.limits.deadline, token, source)

    def _inputs(self, options: Options, files: Files) -> dict[str, bytes]:
        """A request's files by the store's names; `input_reference` still has to be told a picture or a clip."""
        inputs = {name: data for name, data in files.items() if name in ("input_reference", "mask")}
        texts = {"mask": options.mask}
        frames = {match[1]: data for name, data in files.items() if (match := _KEYFRAME.fullmatch(name))}
        if isinstance(options, CreateVideo):
            texts["input_reference"] = options.input_reference and options.input_reference.image_url
            for frame, url in (options.keyframes or {}).items():
                if not _KEYFRAME.fullmatch(f"keyframes[{frame}]"):
                    text = f"keyframes: {frame[:60]!r} is no frame; give numbers, first or last"
                    raise ApiError(400, text, code="invalid_value", param="keyframes")
                if frame in frames:
                    raise ApiError(400, f"keyframes: frame {frame[:60]} is given twice", code="invalid_form")
                frames[frame] = schema.data_url_bytes(url, "keyframes")
        for name, url in texts.items():
            if url is not None:
                inputs[name] = schema.data_url_bytes(url, name)
        with _refusals():
            for index, frame in parse_keyframes(f"{frame}:{frame}" for frame in frames).items():
                inputs[f"keyframe_{index}"] = frames[frame]
        return inputs

    def _clip(
        self, key: Key | None, request: EditVideo | ExtendVideo, files: Files
    ) -> tuple[bytes, float, Job | None]:
        """The clip of an edit or extension, its rate, and the job that made it."""
        if request.video is None:
            if "video" not in files:
                raise ApiError(400, "video is missing", code="missing_field", param="video")
            clip, source = files["video"], None
            if media.is_picture(clip):
                raise ApiError(400, "video is a picture; give a clip", code="invalid_video", param="video")
        else:
            source = self._completed(key, request.video.id)
            path = self.store.lease(source.id, owner(key), VARIANTS["video"][0])
            if path is None:
                raise _no_video(source.id)
            try:
                clip = path.read_bytes()
            finally:
                self.store.release(source.id)
        return clip, media.clip_rate(clip, "video", self.limits.files) or self.config.fps, source

    def _completed(self, key: Key | None, id: str) -> Job:
        job = self.job(key, id)
        if job.status != "completed":
            raise ApiError(400, f"{id} is {job.status}; only completed videos can be used", code="video_not_ready")
        return job

    def _accept(
        self, key: Key | None, options: Sampling, fields: dict[str, Any], inputs: dict[str, bytes], token: str | None,
        source: Job | None = None, given: str = "input_reference",
    ) -> VideoObject:  # fmt: skip
        if options.model is not None and options.model not in self.names:
            allowed = ", ".join(self.names)
            raise ApiError(
                400, f"model={options.model!r}: this server has {allowed}", code="model_not_found", param="model"
            )
        fields.setdefault("seed", secrets.randbits(32))
        with self._decoding, _refusals(given):
            request = media.generation_request(
                fields, inputs, self.limits.files, most_frames=self.most_frames, given=given
            )
            plan = self._plan(request)
        if "video" in inputs:
            fields["num_frames"] = plan["num_frames"]  # what is decoded again stops there
        if "extend_by" in fields:
            plan["application"] = "extension"
        timeout = self.limits.deadline if options.timeout is None else options.timeout
        return self._add(key, fields, plan, inputs, timeout, token, source)

    def _plan(self, request: GenerationRequest) -> dict[str, Any]:
        check_style(request, self.styles)
        plan = plan_request(request, self.config)
        if plan.height % 2 or plan.width % 2:
            raise InvalidRequest(f"size='{plan.width}x{plan.height}': mp4 takes even sizes")
        if self.runner.worker is not None:
            self.runner.worker.check(request)
        return {
            "num_frames": plan.num_frames, "fps": plan.fps, "height": plan.height, "width": plan.width,
            "seed": plan.seed, "sampler": plan.sampler, "num_inference_steps": plan.num_inference_steps,
            "guidance_scale": plan.guidance_scale, "application": plan.task.name,
        }  # fmt: skip

    def _add(
        self, key: Key | None, fields: dict[str, Any], plan: dict[str, Any], inputs: dict[str, bytes],
        timeout: float | None, token: str | None, source: Job | None,
    ) -> VideoObject:  # fmt: skip
        try:
            job = self.store.add(
                owner(key), self.names[0], fields, plan, inputs=inputs, timeout=timeout, token=token,
                remixed_from=None if source is None else source.id, queue_limit=self.limits.queue,
                owner_limit=self.limits.jobs_per_owner if key is None else key.jobs,
            )  # fmt: skip
        except QueueFull as error:
            wait = self.store.counts()["queued"] * self.runner.seconds_per_job / self.runner.concurrency
            raise ApiError(429, str(error), code="queue_full", retry_after=min(60, max(1, ceil(wait / 4)))) from None
        self.runner.notify()
        return self.video(job)

    def job(self, key: Key | None, id: str) -> Job:
        job = self.store.get(id, owner(key))
        if job is None:
            raise _no_video(id)
        return job

    def delete(self, key: Key | None, id: str) -> DeletedVideo:
        job = self.store.delete(id, owner(key))
        if job is None:
            raise _no_video(id)
        self.runner.cancel(id)
        self.hub.publish(id, "status")
        return DeletedVideo(id=id)

    def video(self, job: Job) -> VideoObject:
        plan, expires_at = job.plan, self.store.expires_at(job)
        error = None if job.status != "failed" else schema.VideoError(code=job.error_code, message=job.error_message)
        progress = {"completed": 100, "in_progress": self.runner.percent(job.id)}.get(job.status, 0)
        return VideoObject(
            id=job.id, model=job.model, status=job.status, progress=progress, created_at=int(job.created_at),
            completed_at=int(job.ended_at) if job.status == "completed" else None,
            expires_at=None if expires_at is None else int(expires_at), prompt=job.request["prompt"],
            remixed_from_video_id=job.remixed_from, seconds=f"{plan['num_frames'] / plan['fps']:g}",
            size=f"{plan['width']}x{plan['height']}", error=error, num_frames=plan["num_frames"], fps=plan["fps"],
            seed=plan["seed"], num_inference_steps=plan["num_inference_steps"], guidance_scale=plan["guidance_scale"],
            sampler=plan["sampler"], application=plan.get("application", "text to video"), **{
                name: job.request.get(name, default) for name, default in _REQUESTED.items()
            },
        )  # fmt: skip

    def model(self, name: str) -> ModelObject:
        made_for = (self.config.ssr or self.config.base).network
        network, sampling = self.config.base.network, self.config.base.sampling
        return ModelObject(
            id=name, created=self.created,
            defaults={
                "num_frames": network.num_frames, "fps": self.config.fps,
                "seconds": network.num_frames / self.config.fps, "size": f"{made_for.width}x{made_for.height}",
                "sampler": sampling.sampler, "num_inference_steps": sampling.num_inference_steps,
                "guidance_scale": sampling.guidance_scale,
            },
            styles=list(self.styles),
            limits={
                "num_frames": {"most": self.most_frames, "step": 1},
                "size": {"step": size_step(self.config), "width": MAX_ENLARGEMENT * made_for.width,
                         "height": MAX_ENLARGEMENT * made_for.height},
            },
        )  # fmt: skip


# Of a video object: fields of the request that it repeats.
_REQUESTED = {
    "negative_prompt": "", "expand": None, "fit": "crop", "strength": 1.0, "style": None, "style_strength": 1.0,
    "loop": False,
}  # fmt: skip


@contextlib.contextmanager
def _refusals(given: str = "input_reference") -> Iterator[None]:
    """The engine's refusals as answers."""
    try:
        yield
    except BudgetExceeded as error:
        raise schema.invalid(error, "budget_exceeded", given) from None
    except InvalidRequest as error:
        raise schema.invalid(error, given=given) from None


def _sized(fields: dict[str, Any], source: Job | None) -> dict[str, Any]:
    """A clip that this server made is worked on in its own size."""
    if source is not None and "width" not in fields:
        fields |= {side: source.plan[side] for side in ("width", "height")}
    return fields


def owner(key: Key | None) -> str:
    return ANYONE if key is None else key.name


def _no_video(id: str) -> ApiError:
    return ApiError(404, f"there is no video {id[:60]!r}", code="video_not_found", param="video_id")


# ---- HTTP ------------------------------------------------------------------------------------------------------------


def create_app(service: Service, *, on_start: Callable[[], None] | None = None) -> FastAPI:
    """The ASGI application. It closes the service when the server stops.

    Args:
        on_start: runs in a thread when the server starts.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI):
        if on_start is not None:
            await run_in_threadpool(on_start)
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="pylumiere", version=pylumiere.__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        lifespan=lifespan,
        description="OpenAI's video API over a Space-Time U-Net. Fields beyond OpenAI's are this project's.",
    )  # fmt: skip
    app.state.service = service
    _add_errors(app)
    _add_videos(app, service)
    _add_models(app, service)
    _add_operations(app, service)
    _add_page(app)
    _describe(app, needs_key=service.keys is not None)
    app.add_middleware(
        Gate, keys=service.keys, metrics=service.metrics, max_body=service.limits.body_bytes,
        max_bodies=8 * service.limits.body_bytes,
    )  # fmt: skip
    return app


def _responses(*statuses: int) -> dict[int, dict[str, Any]]:
    texts = {
        400: "A value that is not allowed.", 404: "No such thing.", 408: "The body came too slowly.",
        413: "The body is too large.", 415: "Neither JSON nor a form.", 429: "Too much at once; see Retry-After.",
    }  # fmt: skip
    return {status: {"model": ErrorObject, "description": texts[status]} for status in statuses}


def _add_videos(app: FastAPI, service: Service) -> None:
    changing = _responses(400, 404, 408, 413, 415, 429)

    @app.post("/v1/videos", response_model=VideoObject, responses=changing, openapi_extra=_body(CreateVideo, True))
    async def create_video(request: Request):
        """Queues a clip."""
        create, files = await _parsed(request, CreateVideo, service.limits)
        return await run_in_threadpool(service.create, _key(request), create, files, _token(request))

    @app.get("/v1/videos", response_model=VideoList, responses=_responses(400))
    def list_videos(
        request: Request,
        after: Annotated[str | None, Query(max_length=100, description="The last id of the page before.")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ):
        """A page of the key's videos, by time of creation."""
        try:
            jobs, has_more = service.store.list(
                owner(_key(request)), after=after, limit=limit, newest_first=order == "desc"
            )
        except KeyError:
            raise ApiError(
                400, f"after={after!r}: there is no such video", code="invalid_value", param="after"
            ) from None
        videos = [service.video(job) for job in jobs]
        ids = [video.id for video in videos] or [None]
        return VideoList(data=videos, first_id=ids[0], last_id=ids[-1], has_more=has_more)

    # Before the routes with an id, which would take these words for one.
    @app.post("/v1/videos/edits", response_model=VideoObject, responses=changing, openapi_extra=_body(EditVideo, True))
    async def edit_video(request: Request):
        """A clip with a new prompt: a file, or a completed video."""
        edit, files = await _parsed(request, EditVideo, service.limits)
        return await run_in_threadpool(service.edit, _key(request), edit, files, _token(request))

    @app.post(
        "/v1/videos/extensions", response_model=VideoObject, responses=changing, openapi_extra=_body(ExtendVideo, True)
    )
    async def extend_video(request: Request):
        """A clip that goes on: the given frames unchanged, then new ones."""
        extend, files = await _parsed(request, ExtendVideo, service.limits)
        return await run_in_threadpool(service.extend, _key(request), extend, files, _token(request))

    @app.post("/v1/videos/characters", responses=changing, openapi_extra=_body(None, True))
    async def create_character():
        """Not supported."""
        raise _unsupported("a character")

    @app.get("/v1/videos/characters/{character_id}", responses=_responses(400, 404))
    async def get_character(character_id: str):
        """Not supported."""
        raise _unsupported("a character")

    @app.get("/v1/videos/{video_id}", response_model=VideoObject, responses=_responses(400, 404))
    def retrieve_video(request: Request, response: Response, video_id: VideoId):
        """Where a video stands."""
        response.headers["openai-poll-after-ms"] = str(POLL_AFTER_MS)
        return service.video(service.job(_key(request), video_id))

    @app.delete("/v1/videos/{video_id}", response_model=DeletedVideo, responses=_responses(400, 404))
    def delete_video(request: Request, video_id: VideoId):
        """Removes a video and its files. One that waits or runs is cancelled."""
        return service.delete(_key(request), video_id)

    content = {media_type: {"schema": {"type": "string", "format": "binary"}} for _, media_type in VARIANTS.values()}

    @app.get(
        "/v1/videos/{video_id}/content", response_class=Response,
        responses={**_responses(400, 404), 200: {"content": content, "description": "The file."},
                   206: {"content": content, "description": "The asked range of it."},
                   416: {"description": "The range lies outside of the file."}},
    )  # fmt: skip
    def download_content(request: Request, video_id: VideoId, variant: Variant = "video"):
        """The clip as mp4, one frame as WebP, or a sheet of frames as JPEG. Takes ranges."""
        key, (name, media_type) = _key(request), VARIANTS[variant]
        path = service.store.lease(video_id, owner(key), name)
        if path is None:
            job = service.job(key, video_id)
            raise ApiError(404, f"{video_id} is {job.status}; there is no content", code="video_not_ready")
        try:
            return _LeasedFile(
                path, media_type=media_type, filename=f"{video_id}{path.suffix}", content_disposition_type="inline",
                headers={"Cache-Control": "private, no-cache"}, release=lambda: service.store.release(video_id),
            )  # fmt: skip
        except BaseException:
            service.store.release(video_id)
            raise

    @app.post(
        "/v1/videos/{video_id}/remix", response_model=VideoObject, responses=changing,
        openapi_extra=_body(RemixVideo, False),
    )  # fmt: skip
    async def remix_video(request: Request, video_id: VideoId):
        """The same seed and settings with a new prompt."""
        remix, _ = await _parsed(request, RemixVideo, service.limits)
        return await run_in_threadpool(service.remix, _key(request), remix, video_id, _token(request))

    events = {"text/event-stream": {"schema": {"type": "string"}}}

    @app.get(
        "/v1/videos/{video_id}/events", response_class=Response,
        responses={**_responses(400, 404, 429), 200: {"content": events, "description": "Server-sent events."}},
    )  # fmt: skip
    async def video_events(request: Request, video_id: VideoId):
        """Events until the end: `status` (the video object), `progress` (stage, step, steps, frames_final, num_frames,
        seconds_left, percent), `preview` (frame, image: a data URL of a final frame), then `completed` or `failed`
        (the video object) or `deleted` (its id)."""
        key = _key(request)
        await run_in_threadpool(service.job, key, video_id)
        if service.hub.num_listeners >= MAX_LISTENERS:
            raise ApiError(429, f"{MAX_LISTENERS} event streams are open", code="overloaded", retry_after=5)
        return StreamingResponse(_events(service, key, video_id), media_type="text/event-stream")


async def _events(service: Service, key: Key | None, id: str) -> AsyncIterator[str]:
    async def status() -> tuple[str, bool]:
        job = await run_in_threadpool(service.store.get, id, owner(key))
        if job is None:
            return _event("deleted", {"id": id}), True
        name = "status" if job.is_active else job.status
        return _event(name, service.video(job).model_dump()), not job.is_active

    listening = service.hub.listen(id, beat_seconds=BEAT_SECONDS)
    async with contextlib.aclosing(listening):
        first = asyncio.ensure_future(anext(listening))  # listens before the record is read: nothing falls between
        await asyncio.sleep(0)
        try:
            text, is_end = await status()
            yield text
            while not is_end:
                try:
                    kind, data = await (first or anext(listening))
                except StopAsyncIteration:  # the server stops
                    return
                first = None
                if kind == "status":
                    text, is_end = await status()
                    yield text
                elif kind == "beat":
                    yield ": still here\n\n"
                else:
                    yield _event(kind, data)
        finally:
            if first is not None:
                first.cancel()
                with contextlib.suppress(BaseException):
                    await first


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", response_model=ModelList)
    def list_models():
        """The model that is served, with its defaults and limits; and its other names."""
        return ModelList(data=[service.model(name) for name in service.names])

    @app.get("/v1/models/{name}", response_model=ModelObject, responses=_responses(400, 404))
    def retrieve_model(name: Annotated[str, Path(max_length=200)]):
        if name not in service.names:
            raise ApiError(404, f"there is no model {name[:60]!r}", code="model_not_found", param="model")
        return service.model(name)


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def health():
        """The process answers."""
        return Response("ok\n", media_type="text/plain")

    @app.get(
        "/readyz", response_class=Response,
        responses={200: {"content": {"text/plain": {}}},
                   503: {"content": {"text/plain": {}}, "description": "Not yet."}},
    )  # fmt: skip
    def ready():
        """Jobs would run: the engine is loaded and the store answers."""
        try:
            service.store.counts()
        except sqlite3.Error:
            return Response("the store cannot be read\n", 503, media_type="text/plain")
        if service.runner.worker is None:
            return Response("the engine is not loaded\n", 503, media_type="text/plain")
        return Response("ok\n", media_type="text/plain")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def metrics():
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    folder = resources.files("pylumiere.serve") / "page"
    page = (folder / "index.html").read_bytes()
    assets = {name: (folder / name).read_bytes() for name in _PAGE}

    @app.get("/", include_in_schema=False)
    async def index():
        return Response(page, media_type="text/html; charset=utf-8", headers={"Cache-Control": "no-cache"})

    @app.get("/assets/{name}", include_in_schema=False)
    async def asset(name: str):
        if name not in assets:
            raise HTTPException(404)
        return Response(assets[name], media_type=f"{_PAGE[name]}; charset=utf-8", headers={"Cache-Control": "no-cache"})


class _LeasedFile(FileResponse):
    """A file that the store keeps until it is sent."""

    def __init__(self, *args: Any, release: Callable[[], None], **options: Any):
        super().__init__(*args, **options)
        self._release = release

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await run_in_threadpool(self._release)


# ---- what comes in ---------------------------------------------------------------------------------------------------


def _key(request: Request) -> Key | None:
    return request.state.key


def _token(request: Request) -> str | None:
    """The client's name for this request, so that sending it twice makes one job."""
    token = request.headers.get("idempotency-key")
    if token is not None and not _TOKEN.fullmatch(token):
        raise ApiError(400, "Idempotency-Key should be 1 to 200 printable characters", code="invalid_header")
    return token


async def _parsed(request: Request, model: type[BaseModel], limits: Limits) -> tuple[Any, Files]:
    """The body as a model, and the files that came with it."""
    fields, files, are_texts = await _fields(request, _FILES[model], limits)
    parsed = schema.validated(model, fields, are_texts=are_texts)
    if request.headers["content-type"].lower().startswith("multipart"):
        body = await request.body()
        for name, value in fields.items():  # the parser takes bytes that are no UTF-8 for Latin-1
            if isinstance(value, str) and not value.isascii() and value.encode() not in body:
                raise ApiError(400, f"field {name[:60]!r} is no UTF-8", code="invalid_form", param=name[:60])
    return parsed, files


async def _fields(request: Request, allowed: tuple[str, ...], limits: Limits) -> tuple[dict[str, Any], Files, bool]:
    """The body's fields, its files by their fields, and whether the values are texts (a form's)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return schema.parse_json(await request.body()), {}, False
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise ApiError(
            415,
            f"Content-Type {kind[:60]!r} should be application/json or multipart/form-data",
            code="invalid_content_type",
        )
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    body = await request.body()
    boundary = re.search(r"boundary=\"?([^\";\s]{1,200})", request.headers["content-type"], re.IGNORECASE)
    # The parser takes a form that breaks off for a shorter one.
    if kind == "multipart/form-data" and (not boundary or f"--{boundary[1]}--".encode() not in body[-1024:]):
        raise ApiError(400, "the form is malformed: it has no end", code="invalid_form")
    try:
        form = await request.form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS, max_part_size=limits.body_bytes)
    except (ApiError, ClientDisconnect):
        raise
    except Exception as error:  # the parser raises many kinds on malformed forms
        text = error.detail if isinstance(error, HTTPException) else "its parts cannot be read"
        raise ApiError(400, f"the form is malformed: {text}", code="invalid_form") from None
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                known = "keyframes" if _KEYFRAME.fullmatch(name) else name
                if known not in allowed or name == "keyframes":
                    names = ", ".join(allowed).replace("keyframes", "keyframes[FRAME]") or "none"
                    raise ApiError(400, f"unknown file {name[:60]!r}; allowed: {names}", code="unknown_field")
                if name in files:
                    raise _given_twice(name)
                files[name] = await value.read()
                continue
            nested = re.fullmatch(r"(\w+)\[(-?\w+)\]", name)  # how OpenAI's client writes an object into a form
            target = fields.setdefault(nested[1], {}) if nested else fields
            name = nested[2] if nested else name
            if not isinstance(target, dict) or name in target:
                raise _given_twice(name)
            if value != "" or name in ("prompt", "negative_prompt"):  # an empty text stands for a missing number
                target[name] = value
    finally:
        await form.close()
    for name in files:
        if name in fields:
            raise _given_twice(name)
    return fields, files, True


def _given_twice(name: str) -> ApiError:
    return ApiError(400, f"field {name[:60]!r} is given twice", code="invalid_form", param=name[:60])


def _unsupported(what: str) -> ApiError:
    return ApiError(400, f"{what} is not supported by this server's model", code="unsupported")


# ---- errors and the document -----------------------------------------------------------------------------------------


def _add_errors(app: FastAPI) -> None:
    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError):
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: Request, error: RequestValidationError):
        item = error.errors()[0]
        name = str(item["loc"][-1])[:100]
        return answer(ApiError(400, f"{name}: {item['msg']}", code="invalid_value", param=name))

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(_: Request, error: ClientDisconnect):
        return Response(status_code=400)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException):
        codes = {404: "not_found", 405: "method_not_allowed"}
        wrong = ApiError(error.status_code, str(error.detail), code=codes.get(error.status_code, "http_error"))
        return JSONResponse(wrong.body(), wrong.status, error.headers)

    @app.exception_handler(sqlite3.OperationalError)
    async def on_store_error(_: Request, error: sqlite3.OperationalError):
        logger.error("the store failed: %s", error)
        return answer(ApiError(503, "the server's storage failed", code="storage_error", retry_after=5))

    @app.exception_handler(Exception)
    async def on_error(_: Request, error: Exception):
        return answer(ApiError(500, "the server failed; its log has the reason", code="server_error"))


def _body(model: type[BaseModel] | None, takes_file: bool) -> dict[str, Any]:
    """The request body's part of the OpenAPI document; bodies are parsed here and not by FastAPI."""
    if model is None:
        any_object = {"schema": {"type": "object"}}
        return {"requestBody": {"content": {"application/json": any_object, "multipart/form-data": any_object}}}
    plain = model.model_json_schema(ref_template="#/components/schemas/{model}")
    plain.pop("$defs", None)
    content = {"application/json": {"schema": plain}}
    if takes_file:
        form, file = json.loads(json.dumps(plain)), {"type": "string", "format": "binary"}
        for name in _FILES[model]:
            form["properties"][name] = file
        if "keyframes" in _FILES[model]:
            del form["properties"]["keyframes"]
            form["patternProperties"] = {_KEYFRAME.pattern: file}
        content["multipart/form-data"] = {"schema": form}
    return {"requestBody": {"required": True, "content": content}}


def _describe(app: FastAPI, *, needs_key: bool) -> None:
    """Adds to the OpenAPI document what FastAPI does not see: bodies' schemas, keys; removes its 422."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = make()
        schemas = document["components"]["schemas"]
        for model in (CreateVideo, EditVideo, ExtendVideo):
            schemas.update(model.model_json_schema(ref_template="#/components/schemas/{model}").get("$defs", {}))
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        unauthorized = {
            "description": "No key, or a wrong one.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorObject"}}},
        }
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if needs_key and path not in ("/healthz", "/readyz"):
                    operation["security"] = [{"key": []}]
                    operation["responses"]["401"] = unauthorized
        if needs_key:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return document

    app.openapi = openapi
