"""The page at /: HTML, styles and modules as they are, nothing built and nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FILES = Path(__file__).parent
PATHS = ("/", *(f"/{file.name}" for file in FILES.iterdir() if file.suffix != ".py"))
POLICY = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'"


class Page(StaticFiles):
    """Hands out the files here; a browser loads nothing for them from anywhere else."""

    def __init__(self) -> None:
        super().__init__(directory=FILES, html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        if path.endswith(".py") or "__pycache__" in path:
            path = "none"
        response = await super().get_response(path, scope)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Cache-Control"] = "no-cache"
        return response


def add_page(app: FastAPI) -> None:
    """Its own paths only, so that what nobody serves is still not found."""
    page = Page()

    async def show(http: Request) -> Response:
        return await page.get_response(http.url.path.removeprefix("/") or ".", http.scope)

    for path in PATHS:
        app.add_route(path, show, include_in_schema=False)
