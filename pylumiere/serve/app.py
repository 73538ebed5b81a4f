"""The ASGI application: errors, routes, the document and the gate around one service."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

import pylumiere
from pylumiere.serve.failures import add_errors
from pylumiere.serve.gate import Gate
from pylumiere.serve.openapi import describe
from pylumiere.serve.routes.events import add_events
from pylumiere.serve.routes.models import add_models
from pylumiere.serve.routes.operations import add_operations
from pylumiere.serve.routes.page import add_page
from pylumiere.serve.routes.videos import add_videos
from pylumiere.serve.service import Limits, Service

__all__ = ["Limits", "Service", "create_app"]


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
    add_errors(app)
    add_videos(app, service)
    add_events(app, service)
    add_models(app, service)
    add_operations(app, service)
    add_page(app)
    describe(app, needs_key=service.keys is not None)
    app.add_middleware(
        Gate, keys=service.keys, metrics=service.metrics, max_body=service.limits.body_bytes,
        max_bodies=8 * service.limits.body_bytes,
    )  # fmt: skip
    return app
