"""/v1/videos: make, change, list, fetch and delete clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, Response
from starlette.concurrency import run_in_threadpool

from pylumiere.serve.incoming import VideoId, key_of, parse_body, token_of
from pylumiere.serve.openapi import body, responses
from pylumiere.serve.schema import (
    VARIANTS,
    ApiError,
    CreateVideo,
    DeletedVideo,
    EditVideo,
    ExtendVideo,
    RemixVideo,
    Variant,
    VideoList,
    VideoObject,
)
from pylumiere.serve.service import Service, owner

POLL_AFTER_MS = 500


def add_videos(app: FastAPI, service: Service) -> None:
    changing = responses(400, 404, 408, 413, 415, 429)

    @app.post("/v1/videos", response_model=VideoObject, responses=changing, openapi_extra=body(CreateVideo, True))
    async def create_video(request: Request):
        """Queues a clip."""
        create, files = await parse_body(request, CreateVideo, service.limits)
        return await run_in_threadpool(service.create, key_of(request), create, files, token_of(request))

    @app.get("/v1/videos", response_model=VideoList, responses=responses(400))
    def list_videos(
        request: Request,
        after: Annotated[str | None, Query(max_length=100, description="The last id of the page before.")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ):
        """A page of the key's videos, by time of creation."""
        try:
            jobs, has_more = service.store.list(
                owner(key_of(request)), after=after, limit=limit, newest_first=order == "desc"
            )
        except KeyError:
            raise ApiError(
                400, f"after={after!r}: there is no such video", code="invalid_value", param="after"
            ) from None
        videos = [service.video(job) for job in jobs]
        ids = [video.id for video in videos] or [None]
        return VideoList(data=videos, first_id=ids[0], last_id=ids[-1], has_more=has_more)

    # Before the routes with an id, which would take these words for one.
    @app.post("/v1/videos/edits", response_model=VideoObject, responses=changing, openapi_extra=body(EditVideo, True))
    async def edit_video(request: Request):
        """A clip with a new prompt: a file, or a completed video."""
        edit, files = await parse_body(request, EditVideo, service.limits)
        return await run_in_threadpool(service.edit, key_of(request), edit, files, token_of(request))

    @app.post(
        "/v1/videos/extensions", response_model=VideoObject, responses=changing, openapi_extra=body(ExtendVideo, True)
    )
    async def extend_video(request: Request):
        """A clip that goes on: the given frames unchanged, then new ones."""
        extend, files = await parse_body(request, ExtendVideo, service.limits)
        return await run_in_threadpool(service.extend, key_of(request), extend, files, token_of(request))

    @app.post("/v1/videos/characters", responses=changing, openapi_extra=body(None, True))
    async def create_character():
        """Not supported."""
        raise _unsupported("a character")

    @app.get("/v1/videos/characters/{character_id}", responses=responses(400, 404))
    async def get_character(character_id: str):
        """Not supported."""
        raise _unsupported("a character")

    @app.get("/v1/videos/{video_id}", response_model=VideoObject, responses=responses(400, 404))
    def retrieve_video(request: Request, response: Response, video_id: VideoId):
        """Where a video stands."""
        response.headers["openai-poll-after-ms"] = str(POLL_AFTER_MS)
        return service.video(service.job(key_of(request), video_id))

    @app.delete("/v1/videos/{video_id}", response_model=DeletedVideo, responses=responses(400, 404))
    def delete_video(request: Request, video_id: VideoId):
        """Removes a video and its files. One that waits or runs is cancelled."""
        return service.delete(key_of(request), video_id)

    content = {media_type: {"schema": {"type": "string", "format": "binary"}} for _, media_type in VARIANTS.values()}

    @app.get(
        "/v1/videos/{video_id}/content", response_class=Response,
        responses={**responses(400, 404), 200: {"content": content, "description": "The file."},
                   206: {"content": content, "description": "The asked range of it."},
                   416: {"description": "The range lies outside of the file."}},
    )  # fmt: skip
    def download_content(request: Request, video_id: VideoId, variant: Variant = "video"):
        """The clip as mp4, a small frame as WebP, a sheet of frames as JPEG, the first frame as PNG. Takes ranges."""
        key, (name, media_type) = key_of(request), VARIANTS[variant]
        path = service.store.lease(video_id, owner(key), name)
        if path is None:
            job = service.job(key, video_id)
            if job.status == "completed":
                text = f"{video_id} was made without the variant {variant!r}"
                raise ApiError(404, text, code="not_found", param="variant")
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
        openapi_extra=body(RemixVideo, False),
    )  # fmt: skip
    async def remix_video(request: Request, video_id: VideoId):
        """The same seed and settings with a new prompt."""
        remix, _ = await parse_body(request, RemixVideo, service.limits)
        return await run_in_threadpool(service.remix, key_of(request), remix, video_id, token_of(request))


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


def _unsupported(what: str) -> ApiError:
    return ApiError(400, f"{what} is not supported by this server's model", code="unsupported")
