"""What every request passes before a route sees it: keys, rates, sizes, time; and what every answer carries.

Without a key file the service listens on the loopback interface only and takes any key. A browser on the same machine
would still carry requests of foreign pages to it, so there a request must name a loopback host, and a page of another
origin is refused.
"""

from __future__ import annotations

import asyncio
import re
import time
from math import ceil
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from pylumiere.serve.keys import KeyRing, RateLimit
from pylumiere.serve.metrics import Metrics
from pylumiere.serve.schema import ApiError

ANYONE = ""  # the owner of all jobs where there are no keys
BODY_SECONDS = 60.0
_ASSETS = ("page.css", "page.js", "painter.js", "icon.svg")
_PUBLIC = frozenset({"/", "/healthz", "/readyz", *(f"/assets/{name}" for name in _ASSETS)})
_METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "PUT", "PATCH", "OPTIONS"})
_LOOPBACK_HOST = re.compile(r"(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
# One answer for every path and every kind of wrong key: whoever has none learns nothing.
_UNAUTHORIZED = ApiError(401, "give a valid API key as a bearer token", code="invalid_api_key")


class Gate:
    """ASGI middleware.

    Args:
        keys: None takes any key.
        max_body: bytes of one request's body.
        max_bodies: bytes of all bodies that are being read or used.
    """

    def __init__(self, app, *, keys: KeyRing | None, metrics: Metrics, max_body: int, max_bodies: int):
        self.app, self.keys, self.metrics = app, keys, metrics
        self.max_body, self.max_bodies = max_body, max_bodies
        self._rates = RateLimit()
        self._body_bytes = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        begun, answer = time.monotonic(), _Answer(send)
        body = _Body(self, receive)
        try:
            try:
                self._admit(scope, Headers(scope=scope))
            except ApiError as error:
                await _refusal(error)(scope, receive, answer)
                return
            await self.app(scope, body.receive, answer)
        finally:
            self._body_bytes -= body.received
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.metrics.requests.labels(route, method, str(answer.status)).inc()
            if not answer.is_event_stream:
                self.metrics.request_seconds.labels(route).observe(time.monotonic() - begun)

    def _admit(self, scope, headers: Headers) -> None:
        """Sets `scope["state"]["key"]`, or raises the answer."""
        state = scope.setdefault("state", {})
        state["key"] = None
        if self.keys is None:
            _check_same_machine(headers)
        elif scope["path"] not in _PUBLIC:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            key = self.keys.find(token.strip()) if scheme.lower() == "bearer" else None
            if key is None:
                raise _UNAUTHORIZED
            wait = self._rates.take(key)
            if wait:
                raise ApiError(
                    429, f"more than {key.requests_per_minute} requests a minute", code="rate_limited",
                    retry_after=ceil(wait),
                )  # fmt: skip
            state["key"] = key
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or len(length) > 18:
            raise ApiError(400, "Content-Length is no number", code="invalid_header")
        if int(length) > self.max_body:
            raise self.too_large()

    def too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.max_body} bytes", code="body_too_large")


class _Body:
    """Counts the bytes of a request's body, and bounds the time that they may take."""

    def __init__(self, gate: Gate, receive):
        self._gate, self._receive = gate, receive
        self._deadline = time.monotonic() + BODY_SECONDS
        self._is_whole = False
        self.received = 0

    async def receive(self) -> dict[str, Any]:
        if self._is_whole:  # what may still come is the end of the connection
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.001, self._deadline - time.monotonic()))
        except TimeoutError:
            raise ApiError(408, f"the body took more than {BODY_SECONDS:g} s", code="body_too_slow") from None
        size = len(message.get("body", b""))
        self.received += size
        self._gate._body_bytes += size
        self._is_whole = not message.get("more_body", False)
        if self.received > self._gate.max_body:
            raise self._gate.too_large()
        if self._gate._body_bytes > self._gate.max_bodies:
            raise ApiError(429, "too many large requests at once", code="overloaded", retry_after=1)
        return message


class _Answer:
    """Adds the headers, and remembers the status."""

    def __init__(self, send):
        self._send = send
        self.status = 0
        self.is_event_stream = False

    async def __call__(self, message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
            headers.setdefault("Cache-Control", "no-store")
            self.is_event_stream = headers.get("content-type", "").startswith("text/event-stream")
        await self._send(message)


def _check_same_machine(headers: Headers) -> None:
    if not _LOOPBACK_HOST.fullmatch(headers.get("host", "")):
        raise ApiError(
            403,
            "without API keys this server answers to localhost only; the Host header names another",
            code="wrong_host",
        )
    origin = headers.get("origin")
    if origin is not None and not _LOOPBACK_HOST.fullmatch(origin.partition("://")[2]):
        raise ApiError(403, "without API keys this server takes no requests from other origins", code="wrong_origin")


def _refusal(error: ApiError) -> JSONResponse:
    headers = {**error.headers, **({"WWW-Authenticate": "Bearer"} if error.status == 401 else {})}
    # The body was not read; the connection cannot be used again.
    return JSONResponse(error.body(), error.status, {**headers, "Connection": "close"})
