"""Ask a pool through engines: many edges in this process, each with a connection of its own."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from typing import Protocol

from edge_agent.engine.engine import Engine
from edge_agent.engine.streams import Token, TokenStream
from edge_agent.text.ends import ModelEnds
from edge_agent.text.sampling import BAN, SamplingSettings
from loadtest.answers import Answer
from loadtest.demand import draw_prompt
from loadtest.pacing import Clock


class Oracle(Protocol):
    """Knows what a model must write."""

    def count_wrong(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> int: ...


class EngineTarget:
    """Sessions go to the engines in turn. No text ends before its number of tokens is reached."""

    def __init__(
        self, ends: ModelEnds, engines: Sequence[Engine], seed: int, oracle: Oracle | None = None
    ) -> None:
        self._engines = itertools.cycle(engines)
        self._oracle = oracle
        self._rng = random.Random(seed)
        self._token_ids = [i for i in range(ends.vocabulary) if i not in ends.eos_ids]
        self._sampling = SamplingSettings(logit_bias=dict.fromkeys(ends.eos_ids, BAN))

    async def ask(self, answer: Answer, clock: Clock) -> None:
        """Raises a MidspanError for a session that failed."""
        request = answer.request
        prompt = draw_prompt(request.prompt_tokens, self._token_ids, self._rng)
        sent_at = time.monotonic()
        answer.sent_s = clock.since(sent_at)
        stream = next(self._engines).submit(prompt, request.tokens, self._sampling)
        tokens: list[Token] = []
        try:
            async for token in stream:  # the engine's own times: this loop may be late
                answer.token_s.append(answer.sent_s + token.at_s)
                tokens.append(token)
        finally:
            note_costs(answer, stream, tokens)
        if self._oracle is not None:
            answer.tokens_wrong = self._oracle.count_wrong(prompt, [t.token_id for t in tokens])


def note_costs(answer: Answer, stream: TokenStream, tokens: Sequence[Token]) -> None:
    """What an answer that has ended says of itself."""
    stats = stream.stats
    answer.bytes_up, answer.bytes_down = stats.bytes_up, stats.bytes_down
    answer.rows_replayed = stats.rows_replayed
    answer.queue_s = stats.stage_s["queue"]
    workers = [token.worker_id for token in tokens]
    answer.takeovers = sum(a != b for a, b in itertools.pairwise(workers))
