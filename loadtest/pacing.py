"""Have sessions answered when they are due: in a closed loop, or as they arrive.

Everything is in one event loop. Whoever answers (engines, an endpoint) is a `Target`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from common.errors import MidspanError
from loadtest.answers import Answer
from loadtest.demand import Request


class Clock:
    """Seconds since the load began."""

    def __init__(self) -> None:
        self._begun_at = time.monotonic()

    def now(self) -> float:
        return self.since(time.monotonic())

    def since(self, at: float) -> float:
        """Of an instant of the monotonic clock."""
        return at - self._begun_at


class AskFailed(MidspanError):
    """An answer failed in a way that has no class of its own. `kind` is how it is counted."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Target(Protocol):
    """Whoever answers."""

    async def ask(self, answer: Answer, clock: Clock) -> None:
        """Have the answer's request answered, and fill in what that was like.

        Raises a MidspanError for a session that failed.
        """
        ...


@dataclass(slots=True)
class Load:
    """Sessions that are asked for, and what has become of them so far.

    At most `concurrency` are under way at once, and none is begun that is due after `duration_s`.
    """

    target: Target
    clock: Clock
    concurrency: int
    duration_s: float | None
    answers: list[Answer] = field(default_factory=list)  # begun, in order

    async def run(self, requests: Iterable[Request], is_open: bool) -> None:
        """Until the last is over. `is_open`: requests say when they are due."""
        if is_open:
            await self._take_arrivals(iter(requests))
        else:
            shared = iter(requests)
            await asyncio.gather(*(self._ask_in_turn(shared) for _ in range(self.concurrency)))

    async def _ask_in_turn(self, requests: Iterator[Request]) -> None:
        """One after another, each due as soon as the last is over."""
        while self.duration_s is None or self.clock.now() < self.duration_s:
            request = next(requests, None)
            if request is None:
                return
            await self._ask(Answer(request, due_s=self.clock.now(), sent_s=self.clock.now()))

    async def _take_arrivals(self, requests: Iterator[Request]) -> None:
        places = asyncio.Semaphore(self.concurrency)
        tasks = []
        for request in requests:
            due_s = request.at_s or 0.0
            if self.duration_s is not None and due_s >= self.duration_s:
                break
            await asyncio.sleep(max(0.0, due_s - self.clock.now()))
            tasks.append(asyncio.create_task(self._ask_when_free(request, due_s, places)))
        await asyncio.gather(*tasks)

    async def _ask_when_free(
        self, request: Request, due_s: float, places: asyncio.Semaphore
    ) -> None:
        async with places:
            await self._ask(Answer(request, due_s=due_s, sent_s=self.clock.now()))

    async def _ask(self, answer: Answer) -> None:
        self.answers.append(answer)
        try:
            await self.target.ask(answer, self.clock)
        except MidspanError as error:
            answer.failure = error.kind if isinstance(error, AskFailed) else type(error).__name__
            answer.reason = str(error)
        answer.ended_s = self.clock.now()
        if not answer.failure and answer.tokens < answer.request.tokens:
            answer.failure = "incomplete"
            answer.reason = f"{answer.tokens} of {answer.request.tokens} tokens came"
