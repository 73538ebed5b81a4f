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
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from importlib import resources
from math import ceil
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import pylumiere
from pylumiere.config import ModelConfig
from pylumiere.errors import BudgetExceeded, InvalidRequest
from pylumiere.pipeline import MAX_ENLARGEMENT, plan_request, size_step
from pylumiere.serve import media, schema
from pylumiere.serve.gate import ANYONE, Gate
from pylumiere.serve.hub import Hub
from pylumiere.serve.jobs import Runner, Worker
from pylumiere.serve.keys import Key, KeyRing
from pylumiere.serve.metrics import CONTENT_TYPE, Metrics
from pylumiere.serve.schema import (
    VARIANTS,
    ApiError,
    CreateVideo,
    DeletedVideo,
    ErrorObject,
    ModelList,
    ModelObject,
    RemixVideo,
    Variant,
    VideoList,
    VideoObject,
)
from pylumiere.serve.store import Job, QueueFull, Store

logger = logging.getLogger("pylumiere")

POLL_AFTER_MS = 500
BEAT_SECONDS = 15.0
MAX_LISTENERS = 256
_MAX_FIELDS = 64
_TOKEN = re.compile(r"[\x21-\x7e]{1,200}")
_PAGE = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}

VideoId = Annotated[str, Path(description="As POST /v1/videos returned it.", max_length=100)]


@dataclass(frozen=True)
class Limits:
    """What a service takes.

    Attributes:
        queue: jobs that wait; one more is answered with 429.
        jobs_per_owner: waiting and running, where there are no keys; a key has its own.
        body_bytes, image_pixels: of one request.
        frames: of one clip; None is the model's own length.
    """

    queue: int = 256
    jobs_per_owner: int = 1024
    body_bytes: int = 12 * 2**20
    image_pixels: int = 16 * 2**20
    frames: int | None = None


@dataclass
class Service:
    """Everything behind the routes.

    Attributes:
        names: of the model; the first is reported, all are taken.
        is_ready: false with a reason while jobs would only wait.
    """

    config: ModelConfig
    store: Store
    keys: KeyRing | None = None
    limits: Limits = Limits()
    concurrency: int = 1
    names: tuple[str, ...] = ()
    hub: Hub = field(default_factory=Hub)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self):
        self.names = self.names or (self.config.name,)
        self.most_frames = self.limits.frames or self.config.base.network.num_frames
        self.created = int(time.time())
        self.runner = Runner(self.store, self.hub, self.metrics, concurrency=self.concurrency)
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

    def create(self, key: Key | None, create: CreateVideo, picture: bytes | None, token: str | None) -> VideoObject:
        if create.model is not None and create.model not in self.names:
            allowed = ", ".join(self.names)
            raise ApiError(
                400, f"model={create.model!r}: this server has {allowed}", code="model_not_found", param="model"
            )
        with self._decoding:
            if create.input_reference is not None:
                picture = schema.data_url_bytes(create.input_reference.image_url)
            image = None if picture is None else media.decode_image(picture, self.limits.image_pixels)
            try:
                fields = schema.generation_fields(create, self.config, self.most_frames)
                fields.setdefault("seed", secrets.randbits(32))
                plan = self._plan(fields, image)
            except BudgetExceeded as error:
                raise schema.invalid(error, "budget_exceeded") from None
            except InvalidRequest as error:
                raise schema.invalid(error) from None
            png = None if image is None else media.png_bytes(image)
        return self._add(key, fields, plan, png, None, token)

    def remix(self, key: Key | None, id: str, prompt: str, token: str | None) -> VideoObject:
        source = self.job(key, id)
        if source.status != "completed":
            raise ApiError(
                400, f"{id} is {source.status}; only completed videos can be remixed", code="video_not_ready"
            )
        try:
            fields = {**source.request, "prompt": prompt}
            schema.generation_request(fields, None)
            image = self.store.input_bytes(source)
        except InvalidRequest as error:
            raise schema.invalid(error) from None
        except FileNotFoundError:  # deleted meanwhile
            raise _no_video(id) from None
        return self._add(key, fields, source.plan, image, id, token)

    def _plan(self, fields: dict[str, Any], image) -> dict[str, Any]:
        request = schema.generation_request(fields, image)
        if (request.num_frames or 0) > self.most_frames:
            raise InvalidRequest(f"num_frames={request.num_frames}: this server makes up to {self.most_frames}")
        plan = plan_request(request, self.config)
        if plan.height % 2 or plan.width % 2:
            raise InvalidRequest(f"size='{plan.width}x{plan.height}': mp4 takes even sizes")
        if self.runner.worker is not None:
            self.runner.worker.check(request)
        return {
            "num_frames": plan.num_frames, "fps": plan.fps, "height": plan.height, "width": plan.width,
            "seed": plan.seed, "sampler": plan.sampler, "num_inference_steps": plan.num_inference_steps,
            "guidance_scale": plan.guidance_scale,
        }  # fmt: skip

    def _add(self, key: Key | None, fields, plan, png: bytes | None, source: str | None, token) -> VideoObject:
        try:
            job = self.store.add(
                owner(key), self.names[0], fields, plan, image=png, remixed_from=source, token=token,
                queue_limit=self.limits.queue, owner_limit=self.limits.jobs_per_owner if key is None else key.jobs,
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
            sampler=plan["sampler"], negative_prompt=job.request.get("negative_prompt", ""),
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
            limits={
                "num_frames": {"most": self.most_frames, "step": 1},
                "size": {"step": size_step(self.config), "width": MAX_ENLARGEMENT * made_for.width,
                         "height": MAX_ENLARGEMENT * made_for.height},
            },
        )  # fmt: skip


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
        fields, picture, are_texts = await _fields(request)
        create = schema.validated(CreateVideo, fields, are_texts=are_texts)
        return await run_in_threadpool(service.create, _key(request), create, picture, _token(request))

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
    @app.post("/v1/videos/edits", responses=changing, openapi_extra=_body(None, True))
    async def edit_video():
        """Not supported."""
        raise _unsupported("editing a video")

    @app.post("/v1/videos/extensions", responses=changing, openapi_extra=_body(None, True))
    async def extend_video():
        """Not supported."""
        raise _unsupported("extending a video")

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
        fields, picture, are_texts = await _fields(request)
        if picture is not None:
            raise ApiError(400, "a remix takes a prompt only", code="unknown_field", param="input_reference")
        remix = schema.validated(RemixVideo, fields, are_texts=are_texts)
        return await run_in_threadpool(service.remix, _key(request), video_id, remix.prompt, _token(request))

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


async def _fields(request: Request) -> tuple[dict[str, Any], bytes | None, bool]:
    """The body's fields, the picture that came as a file, and whether the values are texts (a form's)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return schema.parse_json(await request.body()), None, False
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise ApiError(
            415,
            f"Content-Type {kind[:60]!r} should be application/json or multipart/form-data",
            code="invalid_content_type",
        )
    fields: dict[str, Any] = {}
    picture = None
    try:
        form = await request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=2**20)
    except (ApiError, ClientDisconnect):
        raise
    except Exception as error:  # the parser raises many kinds on malformed forms
        text = error.detail if isinstance(error, HTTPException) else "its parts cannot be read"
        raise ApiError(400, f"the form is malformed: {text}", code="invalid_form") from None
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name != "input_reference":
                    raise ApiError(400, f"unknown file {name[:60]!r}; allowed: input_reference", code="unknown_field")
                picture = await value.read()
                continue
            nested = re.fullmatch(r"(\w+)\[(\w+)\]", name)  # how OpenAI's client writes an object into a form
            target = fields.setdefault(nested[1], {}) if nested else fields
            name = nested[2] if nested else name
            if not isinstance(target, dict) or name in target:
                raise ApiError(400, f"field {name[:60]!r} is given twice", code="invalid_form", param=name[:60])
            if value != "" or name in ("prompt", "negative_prompt"):  # an empty text stands for a missing number
                target[name] = value
    finally:
        await form.close()
    if picture is not None and "input_reference" in fields:
        raise ApiError(400, "input_reference is given twice", code="invalid_form", param="input_reference")
    return fields, picture, True


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


def _body(model: type | None, takes_file: bool) -> dict[str, Any]:
    """The request body's part of the OpenAPI document; bodies are parsed here and not by FastAPI."""
    if model is None:
        any_object = {"schema": {"type": "object"}}
        return {"requestBody": {"content": {"application/json": any_object, "multipart/form-data": any_object}}}
    plain = model.model_json_schema(ref_template="#/components/schemas/{model}")
    plain.pop("$defs", None)
    content = {"application/json": {"schema": plain}}
    if takes_file:
        form = json.loads(json.dumps(plain))
        form["properties"]["input_reference"] = {"type": "string", "format": "binary"}
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
        schemas.update(CreateVideo.model_json_schema(ref_template="#/components/schemas/{model}").get("$defs", {}))
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
