"""What comes in with a request: the key, the client's name for it, the fields and files of its body."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import Path, Request
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pylumiere.serve import schema
from pylumiere.serve.keys import Key
from pylumiere.serve.schema import FILES, KEYFRAME, ApiError, Files
from pylumiere.serve.service import Limits

_MAX_FIELDS, _MAX_FILES = 128, 66
_TOKEN = re.compile(r"[\x21-\x7e]{1,200}")

VideoId = Annotated[str, Path(description="As POST /v1/videos returned it.", max_length=100)]


def key_of(request: Request) -> Key | None:
    return request.state.key


def token_of(request: Request) -> str | None:
    """The client's name for this request, so that sending it twice makes one job."""
    token = request.headers.get("idempotency-key")
    if token is not None and not _TOKEN.fullmatch(token):
        raise ApiError(400, "Idempotency-Key should be 1 to 200 printable characters", code="invalid_header")
    return token


async def parse_body(request: Request, model: type[BaseModel], limits: Limits) -> tuple[Any, Files]:
    """The body as a model, and the files that came with it."""
    fields, files, are_texts = await _fields(request, FILES[model], limits)
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
                known = "keyframes" if KEYFRAME.fullmatch(name) else name
                if known not in allowed or name == "keyframes":
                    names = ", ".join(allowed).replace("keyframes", "keyframes[FRAME]") or "none"
                    raise ApiError(400, f"unknown file {name[:60]!r}; allowed: {names}", code="unknown_field")
                if name in files:
                    raise _given_twice(name)
                files[name] = await value.read()
                continue
            if name.endswith("[]"):  # how OpenAI's client writes a list into a form
                values = fields.setdefault(name[:-2], [])
                if not isinstance(values, list):
                    raise _given_twice(name[:-2])
                values.append(value)
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
