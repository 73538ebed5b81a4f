"""/healthz, /readyz and /metrics: for whoever runs the service."""

from __future__ import annotations

import sqlite3

from fastapi import FastAPI
from fastapi.responses import Response

from pylumiere.serve.metrics import CONTENT_TYPE
from pylumiere.serve.service import Service


def add_operations(app: FastAPI, service: Service) -> None:
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
