"""/v1/models: the model that is served."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Path

from pylumiere.serve.openapi import responses
from pylumiere.serve.schema import ApiError, ModelList, ModelObject
from pylumiere.serve.service import Service


def add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", response_model=ModelList)
    def list_models():
        """The model that is served, with its defaults and limits; and its other names."""
        return ModelList(data=[service.model(name) for name in service.names])

    @app.get("/v1/models/{name}", response_model=ModelObject, responses=responses(400, 404))
    def retrieve_model(name: Annotated[str, Path(max_length=200)]):
        if name not in service.names:
            raise ApiError(404, f"there is no model {name[:60]!r}", code="model_not_found", param="model")
        return service.model(name)
