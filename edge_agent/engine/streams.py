"""What an engine hands out: the tokens of an answer as they come, and conversations over turns.

Both may be used from any thread, and from event loops; the engine's own thread does the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edge_agent.text.logprobs import TokenLogprob
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.stats import GenerationStats
from edge_agent.text.text_session import TextSession
from edge_agent.text.work import Working

if TYPE_CHECKING:
    from edge_agent.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Token:
    """A token, and what the step that it came from cost."""

    token_id: int
    worker_id: str
    bytes_up: int  # of the answer so far
    bytes_down: int
    at_s: float  # since the answer was asked for
    logprob: TokenLogprob | None = None  # where they were asked for
    stage_s: Mapping[str, float] = field(default_factory=dict)  # none after a prompt


class TokenStream:
    """The tokens of one answer, as they come: iterate over it, in a thread or with `async for`.

    Iterating raises what Session.generate raises. Stopping early needs `cancel`, or the answer is
    computed to its end.
    """

    def __init__(self, engine: Engine, conversation: Conversation) -> None:
        self._engine = engine
        self.conversation = conversation
        self._events: deque[Token | BaseException | None] = deque()  # the last one is the end
        self._changed = threading.Condition()
        self._wakers: list[Callable[[], object]] = []  # of event loops that wait for it
        self.stats = GenerationStats()  # complete when the stream has ended
        self.ended_by_itself = False  # with an end-of-sequence token
        self.prompt_logprobs: list[TokenLogprob] = []  # of its tokens after the first, if wanted

    def cancel(self) -> None:
        """Stop the answer; the stream ends, and what the pool holds for it is given up."""
        self._engine._command(lambda: self._engine._cancel(self))

    def __iter__(self) -> Iterator[Token]:
        while True:
            with self._changed:
                while not self._events:
                    self._changed.wait()
                token = self._take()
            if token is None:
                return
            yield token

    async def __aiter__(self) -> AsyncIterator[Token]:
        loop, has_changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(has_changed.set)

        with self._changed:
            self._wakers.append(wake)
        try:
            while True:
                has_changed.clear()
                with self._changed:
                    token = self._take() if (is_here := bool(self._events)) else None
                if token is not None:
                    yield token
                elif is_here:
                    return
                else:
                    await has_changed.wait()
        finally:
            with self._changed:
                self._wakers.remove(wake)

    def _take(self) -> Token | None:
        """The next token, or None at the end, which stays: whoever asks again hears the same."""
        event = self._events[0]
        if isinstance(event, BaseException):
            raise event
        if event is not None:
            self._events.popleft()
        return event

    def _put(self, event: Token | BaseException | None) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
            wakers = tuple(self._wakers)
        for wake in wakers:  # without the lock, which is the first thing that they want
            wake()


class Conversation:
    """A session that takes one prompt after another; what they share is computed once."""

    def __init__(self, engine: Engine, text: TextSession) -> None:
        self._engine = engine
        self._text = text
        self._is_answering = False

    @property
    def session_id(self) -> bytes:
        return self._text.session_id

    def submit(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingSettings | None = None,
        *,
        top_logprobs: int | None = None,
        score_prompt: bool = False,
    ) -> TokenStream:
        """Ask for an answer to a whole prompt, the earlier turns included. One at a time.

        As TextSession.answer. Raises TooManySessions when the engine takes no more now, or while
        an answer of this conversation is not over, and EngineClosed.
        """
        wanted = Wanted(
            list(prompt_ids),
            max_new_tokens,
            sampling or SamplingSettings(),
            top_logprobs,
            score_prompt,
        )
        return self._engine._submit(self, wanted, ends_session=False)

    def count_shared(self, prompt_ids: Sequence[int]) -> int:
        """How many of a prompt's tokens need not be computed again. Not while it is answering."""
        return self._text.count_shared(prompt_ids)

    @property
    def is_answering(self) -> bool:
        return self._is_answering

    @property
    def held(self) -> int:
        """Tokens of the last prompt and its answer that are kept. Not while it is answering."""
        return self._text.held

    def close(self) -> None:
        """Tell the pool that it may forget the session."""
        self._engine._command(lambda: self._engine._end_session(self.session_id))


@dataclass(frozen=True, slots=True)
class Wanted:
    """An answer, as it was asked for: the arguments of TextSession.answer."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: SamplingSettings
    top_logprobs: int | None = None
    score_prompt: bool = False

    def begin(self, text: TextSession) -> Working:
        return text.answer(
            self.prompt_ids, self.max_new_tokens, self.sampling, self.top_logprobs,
            self.score_prompt,
        )  # fmt: skip
