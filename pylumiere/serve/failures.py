"""Every error as an answer in OpenAI's form."""

from __future__ import annotations

import logging
import sqlite3

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pylumiere.serve.schema import ApiError

logger = logging.getLogger("pylumiere")


def add_errors(app: FastAPI) -> None:
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
