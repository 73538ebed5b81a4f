"""/ and /assets: the page."""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.exceptions import HTTPException

_PAGE = {
    "page.css": "text/css", "page.js": "text/javascript", "painter.js": "text/javascript", "icon.svg": "image/svg+xml",
}  # fmt: skip


def add_page(app: FastAPI) -> None:
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
