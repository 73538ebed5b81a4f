"""The OpenAPI document where FastAPI does not see it: bodies, refusals, keys."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from pylumiere.serve.schema import FILES, KEYFRAME, CreateVideo, EditVideo, ErrorObject, ExtendVideo


def responses(*statuses: int) -> dict[int, dict[str, Any]]:
    texts = {
        400: "A value that is not allowed.", 404: "No such thing.", 408: "The body came too slowly.",
        413: "The body is too large.", 415: "Neither JSON nor a form.", 429: "Too much at once; see Retry-After.",
    }  # fmt: skip
    return {status: {"model": ErrorObject, "description": texts[status]} for status in statuses}


def body(model: type[BaseModel] | None, takes_file: bool) -> dict[str, Any]:
    """The request body's part of the OpenAPI document; `incoming.py` parses bodies, not FastAPI."""
    if model is None:
        any_object = {"schema": {"type": "object"}}
        return {"requestBody": {"content": {"application/json": any_object, "multipart/form-data": any_object}}}
    plain = model.model_json_schema(ref_template="#/components/schemas/{model}")
    plain.pop("$defs", None)
    content = {"application/json": {"schema": plain}}
    if takes_file:
        form, file = json.loads(json.dumps(plain)), {"type": "string", "format": "binary"}
        for name in FILES[model]:
            form["properties"][name] = file
        if "keyframes" in FILES[model]:
            del form["properties"]["keyframes"]
            form["patternProperties"] = {KEYFRAME.pattern: file}
        content["multipart/form-data"] = {"schema": form}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI, *, needs_key: bool) -> None:
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
