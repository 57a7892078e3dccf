"""Who is let in: what every request must have before anything looks at what it says.

Without a key only this machine may ask, so a request must also be addressed to this machine: a
page in a browser can have its own name lead here, but not say another one. That a body must be
called JSON keeps such a page from sending one without asking the browser first. Forms, which
pictures come in, a browser sends unasked: with the origin of the page, which must be ours.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_agent.server.errors import Fault, unavailable
from edge_agent.server.json_bodies import JsonResponse
from edge_agent.server.metrics import Metrics
from edge_agent.server.page import PATHS as PAGE_PATHS

MAX_BODY_BYTES = 16 << 20
OPEN_PATHS = ("/health", "/docs", "/openapi.json", *PAGE_PATHS)
FORM, FORM_PATHS = "multipart/form-data", ("/v1/images/edits",)
OPEN_PREFIX = "/images/"  # their names are secrets


@dataclass(slots=True)
class Drain:
    """Whether the server is to end, and how many requests it still answers."""

    is_asked: bool = False
    running: int = 0


class Gate:
    """Around the application. Raises nothing: who is refused gets an answer."""

    def __init__(
        self, app: ASGIApp, *, api_keys: Sequence[str], drain: Drain, metrics: Metrics
    ) -> None:
        self._app = app
        self._api_keys = [key.encode() for key in api_keys]
        self._drain = drain
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        fault = self._find_fault(scope)
        self._drain.running += 1
        try:
            if fault is None:
                await self._app(scope, bounded(receive), note_status)
            else:
                refusal = JsonResponse(fault.body, fault.status, fault.headers)
                await refusal(scope, receive, note_status)
        finally:
            self._drain.running -= 1
            self._metrics.count_request(scope["path"], status)

    def _find_fault(self, scope: Scope) -> Fault | None:
        headers, path = Headers(scope=scope), scope["path"]
        if path == "/health":
            return None
        if self._drain.is_asked:
            return unavailable("the server is shutting down", "shutting_down")
        if not self._api_keys and not is_this_machine(headers.get("host", "")):
            return Fault(
                403, "without an API key this server answers to localhost and to addresses only"
            )
        is_open = path in OPEN_PATHS or path.startswith(OPEN_PREFIX)
        if self._api_keys and not is_open and not self._has_key(headers):
            return Fault(
                401, "no valid API key; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
            )  # fmt: skip
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        expected = FORM if path in FORM_PATHS else "application/json"
        if scope["method"] == "POST" and kind != expected:
            return Fault(415, f"the body is {kind or 'of no type'}; expected {expected}")
        if kind == FORM and not is_of_this_page(headers):
            return Fault(403, "a page of another origin may not send forms here")
        return None

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        return any(hmac.compare_digest(given.strip().encode(), key) for key in self._api_keys)


def bounded(receive: Receive) -> Receive:
    """Raises HTTPException when a body has more than MAX_BODY_BYTES."""
    received = 0

    async def receive_bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body has more than {MAX_BODY_BYTES} bytes")
        return message

    return receive_bounded


def is_of_this_page(headers: Headers) -> bool:
    """Whether no page sent a request, or one of ours: browsers say the origin of what they post."""
    origin, host = headers.get("origin"), headers.get("host", "")
    return origin is None or origin in (f"http://{host}", f"https://{host}")


def is_this_machine(host: str) -> bool:
    """Whether a Host header can only mean the machine that it was sent to."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
