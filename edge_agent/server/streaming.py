"""Answers to a client: several at once, as events, and no longer than the client is there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from edge_agent.server.answers import Answer, Piece

Event = tuple[Answer, Piece | None]  # None is the answer's end
DONE = b"data: [DONE]\n\n"


class Cancellable(Protocol):
    def cancel(self) -> None:
        """Nobody wants it any more."""


async def merge(answers: Sequence[Answer]) -> AsyncIterator[Event]:
    """The pieces of several answers as they come. Raises what the first that fails does."""
    events: asyncio.Queue[Event | Exception] = asyncio.Queue()

    async def read(answer: Answer) -> None:
        try:
            async for piece in answer.pieces():
                events.put_nowait((answer, piece))
            events.put_nowait((answer, None))
        except Exception as error:  # raised where the events are read
            events.put_nowait(error)

    tasks = [asyncio.create_task(read(answer)) for answer in answers]
    unfinished = len(tasks)
    try:
        while unfinished:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            unfinished -= event[1] is None
            yield event
    finally:
        for answer in answers:
            answer.cancel()
        for task in tasks:
            task.cancel()


@contextlib.asynccontextmanager
async def cancelled_with(request: Request, works: Sequence[Cancellable]) -> AsyncIterator[None]:
    """Works end when the client goes away, also while nothing is sent to it."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        for work in works:
            work.cancel()

    waiting = asyncio.create_task(wait())
    try:
        yield
    finally:
        waiting.cancel()


class EventStream(StreamingResponse):
    """Events of some answers, which end with it however it ends."""

    def __init__(self, answers: Sequence[Answer], events: AsyncIterator[bytes]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self._answers:
                answer.cancel()
