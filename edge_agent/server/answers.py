"""One answer as it is shown: tokens become text, and text ends before a stop string.

Where log-probabilities are told, the texts of an answer's tokens joined are its text: a token that
completes a character has all of it, those before have none, and one that a stop string cuts is cut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from edge_agent.engine.streams import Token, TokenStream
from edge_agent.server.metrics import Meter
from edge_agent.text.logprobs import TokenLogprob
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.stop_strings import StopStrings
from edge_agent.text.tokenizer import TextStream, TextTokenizer


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of the engine for one choice of a response."""

    index: int
    prompt_ids: list[int]
    max_new_tokens: int
    sampling: SamplingSettings
    stops: Sequence[str] = ()
    top_logprobs: int | None = None
    echo: bool = False

    @property
    def score_prompt(self) -> bool:
        return self.echo and (self.top_logprobs is not None or self.max_new_tokens == 0)


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token and the text that it completes."""

    token_id: int
    text: str
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What may be shown now: text, the tokens that are shown whole with it, what it cost."""

    text: str
    tokens: list[ShownToken]
    token: Token | None = None  # the one that came last; none for an echo and the rest at the end


class Answer:
    """One choice while it is being made."""

    def __init__(
        self,
        wish: Wish,
        stream: TokenStream,
        tokenizer: TextTokenizer,
        meter: Meter,
    ) -> None:
        self.wish = wish
        self.stream = stream
        self.finish_reason = "length"
        self.new_tokens = 0
        self._texts = TextStream(tokenizer, [] if wish.echo else wish.prompt_ids)
        self._shown = StoppableText(wish.stops)
        self._meter = meter

    @property
    def index(self) -> int:
        return self.wish.index

    def cancel(self) -> None:
        """It is not wanted any more; nothing happens after its end."""
        self.stream.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Raises what the stream raises. Stops the engine when it is left."""
        is_echo_due = self.wish.echo
        try:
            async for token in self.stream:
                if is_echo_due:
                    yield self._echo()
                    is_echo_due = False
                self.new_tokens += 1
                self._meter.note(token)
                text = self._texts.add(token.token_id)
                yield Piece(
                    *self._shown.add(ShownToken(token.token_id, text, token.logprob)), token
                )
                if self._shown.is_over:
                    self.finish_reason = "stop"
                    await self._end()
                    self.stream.stats.new_tokens = self.new_tokens  # others came with the last
                    return
            if is_echo_due:
                yield self._echo()
            if self.stream.ended_by_itself:
                self.finish_reason = "stop"
            yield Piece(*self._shown.finish())
        finally:
            self.cancel()
            self._meter.end(self.stream.stats)

    async def _end(self) -> None:
        """Whoever has heard the end finds the conversation ready for its next turn."""
        self.cancel()
        async for _ in self.stream:
            pass

    def _echo(self) -> Piece:
        """The prompt, whose tokens after the first are scored if that was wanted."""
        scores: list[TokenLogprob | None] = [None, *self.stream.prompt_logprobs]
        scores += [None] * (len(self.wish.prompt_ids) - len(scores))
        tokens = [
            ShownToken(token_id, self._texts.add(token_id), logprob)
            for token_id, logprob in zip(self.wish.prompt_ids, scores, strict=True)
        ]
        return Piece("".join(token.text for token in tokens), tokens)


class StoppableText:
    """Tokens wait until all of their text is known not to belong to a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = StopStrings(stops)
        self._waiting: deque[ShownToken] = deque()
        self._shown_chars = 0  # of the first that waits

    @property
    def is_over(self) -> bool:
        return self._stops.found

    def add(self, token: ShownToken) -> tuple[str, list[ShownToken]]:
        """Text and whole tokens that may be shown."""
        self._waiting.append(token)
        text = self._stops.add(token.text)
        tokens = self._release(len(text))
        if self.is_over and self._shown_chars:
            first = self._waiting.popleft()
            tokens.append(replace(first, text=first.text[: self._shown_chars]))
        return text, tokens

    def finish(self) -> tuple[str, list[ShownToken]]:
        """What was held back when the text ended by itself."""
        text = self._stops.finish()
        return text, self._release(len(text))

    def _release(self, chars: int) -> list[ShownToken]:
        self._shown_chars += chars
        released = []
        while self._waiting and len(self._waiting[0].text) <= self._shown_chars:
            token = self._waiting.popleft()
            self._shown_chars -= len(token.text)
            released.append(token)
        return released
