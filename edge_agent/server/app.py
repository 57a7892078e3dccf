"""The application: which path is answered by whom, and errors in OpenAI's shape."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from common.errors import MidspanError
from edge_agent.server.errors import SERVER, Fault, RequestFault, fault_of
from edge_agent.server.gate import Drain, Gate
from edge_agent.server.images import ImageService
from edge_agent.server.json_bodies import JsonResponse
from edge_agent.server.metrics import Metrics
from edge_agent.server.page import add_page
from edge_agent.server.pool_view import PoolView, check_ready
from edge_agent.server.schema import ChatRequest, CompletionRequest, ImageRequest
from edge_agent.server.text_service import TextService, no_such_model

log = logging.getLogger("midspan.serve")
NO_IMAGES = Fault(404, "no image model is served here; start with --image-model", param="model")
SUMMARY = "Split inference: the prompt's text stays on this device, rows of hidden states do not."


@dataclass(slots=True)
class Services:
    """What requests are answered by."""

    text: TextService
    images: ImageService | None
    pool: PoolView
    metrics: Metrics
    description: dict[str, Any]  # of the model, for whoever shows it
    api_keys: Sequence[str] = ()
    drain: Drain = field(default_factory=Drain)
    started_at: int = field(default_factory=lambda: int(time.time()))

    def close(self) -> None:
        """End what is running and what is kept."""
        self.text.kept.close()
        self.text.engine.close()
        if self.images is not None:
            self.images.close()
        self.pool.close()

    def list_models(self) -> list[dict[str, Any]]:
        names = [self.text.ends.name, *([self.images.name] if self.images else [])]
        return [
            {"id": name, "object": "model", "created": self.started_at, "owned_by": "midspan"}
            for name in names
        ]


def make_app(services: Services) -> FastAPI:
    # FastAPI's own /docs has browsers load scripts from a server of somebody else
    app = FastAPI(title="midspan", summary=SUMMARY, docs_url=None, redoc_url=None)
    add_text(app, services)
    add_images(app, services)
    add_watching(app, services)
    add_page(app)
    app.exception_handler(RequestValidationError)(answer_invalid)
    app.exception_handler(HTTPException)(answer_http)
    app.exception_handler(MidspanError)(answer_error)
    app.exception_handler(Exception)(answer_error)
    app.add_middleware(
        Gate, api_keys=services.api_keys, drain=services.drain, metrics=services.metrics
    )
    return app


def add_text(app: FastAPI, services: Services) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(http: Request, request: ChatRequest) -> Response:
        return await services.text.chat(http, request)

    @app.post("/v1/completions", response_model=None)
    async def completions(http: Request, request: CompletionRequest) -> Response:
        return await services.text.complete(http, request)

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return JsonResponse({"object": "list", "data": services.list_models()})

    @app.get("/v1/models/{name}", response_model=None)
    async def model(name: str) -> Response:
        models = services.list_models()
        found = next((model for model in models if model["id"] == name), None)
        if found is None:
            raise RequestFault(no_such_model(name, ", ".join(model["id"] for model in models)))
        return JsonResponse(found)


def add_images(app: FastAPI, services: Services) -> None:
    @app.post("/v1/images/generations", response_model=None)
    async def images(http: Request, request: ImageRequest) -> Response:
        if services.images is None:
            raise RequestFault(NO_IMAGES)
        return await services.images.generate(http, request)

    @app.post("/v1/images/edits", response_model=None)
    async def edits(http: Request) -> Response:
        if services.images is None:
            raise RequestFault(NO_IMAGES)
        return await services.images.edit(http)

    @app.get("/images/{name}.png", response_model=None)
    async def picture(name: str) -> Response:
        file = services.images.find(name) if services.images else None
        if file is None:
            raise RequestFault(Fault(404, "there is no such picture, or not any more"))
        return Response(file, media_type="image/png")


def add_watching(app: FastAPI, services: Services) -> None:
    @app.get("/health", response_model=None)
    async def health() -> Response:
        return JsonResponse({"status": "draining" if services.drain.is_asked else "ok"})

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        return JsonResponse(await check_ready(services.text.engine))

    @app.get("/docs", response_model=None, include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(describe_paths(app.openapi()))

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/midspan/pool", response_model=None)
    async def pool() -> Response:
        return JsonResponse(await services.pool.report())

    @app.get("/midspan/model", response_model=None)
    async def model() -> Response:
        return JsonResponse(services.description)


def describe_paths(schema: dict[str, Any]) -> str:
    """A page of all paths; it loads nothing."""
    lines = [
        f"<li><code>{method.upper()} {escape(path)}</code></li>"
        for path, methods in schema["paths"].items()
        for method in methods
    ]
    return (
        f"<!doctype html><title>midspan</title><h1>midspan</h1><p>{escape(SUMMARY)}</p>"
        f"<ul>{''.join(lines)}</ul>"
        '<p>What each takes is in <a href="/openapi.json">/openapi.json</a>; '
        'to try it, there is <a href="/">the page</a>.</p>'
    )


def answer(fault: Fault) -> Response:
    return JsonResponse(fault.body, fault.status, fault.headers)


async def answer_error(_: Request, error: Exception) -> Response:
    fault = fault_of(error)
    if fault.kind == SERVER:
        log.warning("answered %d: %s", fault.status, fault.message)
    return answer(fault)


async def answer_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return answer(Fault(error.status_code, str(error.detail)))


async def answer_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return answer(describe_invalid(error.errors()[0]))


def describe_invalid(problem: dict[str, Any]) -> Fault:
    """The first thing that is wrong with a body, and the field that it is in."""
    place = [str(part) for part in problem["loc"][1:]]
    words = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return Fault(400, f"the body is no JSON: {words}")
    if not place:  # what fields say together begins with the name of one
        field_name, separator, rest = words.partition(": ")
        if not separator:
            return Fault(400, f"the body: {words}")
        place, words = [field_name], rest
    code = "unsupported_value" if place[0] in ("tools", "functions", "response_format") else None
    return Fault(400, f"{'.'.join(place)}: {words}", param=place[0], code=code)
