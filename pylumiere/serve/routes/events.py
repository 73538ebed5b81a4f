"""/v1/videos/{id}/events: progress and preview frames as they come, as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from pylumiere.serve.incoming import VideoId, key_of
from pylumiere.serve.keys import Key
from pylumiere.serve.openapi import responses
from pylumiere.serve.schema import ApiError
from pylumiere.serve.service import Service, owner

BEAT_SECONDS = 15.0
MAX_LISTENERS = 256


def add_events(app: FastAPI, service: Service) -> None:
    events = {"text/event-stream": {"schema": {"type": "string"}}}

    @app.get(
        "/v1/videos/{video_id}/events", response_class=Response,
        responses={**responses(400, 404, 429), 200: {"content": events, "description": "Server-sent events."}},
    )  # fmt: skip
    async def video_events(request: Request, video_id: VideoId):
        """Events until the end: `status` (the video object), `progress` (stage, stage_index, num_stages, step, steps,
        frames_final, num_frames, seconds_left, percent), `preview` (frame, image: a data URL of a final frame), then
        `completed` or `failed` (the video object) or `deleted` (its id)."""
        key = key_of(request)
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
