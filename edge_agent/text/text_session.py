"""One text session: a prompt goes through head, pool and tail, and comes out token by token.

The session owns what nobody else needs to keep: the KV of head and tail, and the replay log of
encoded boundary rows, from which the pool can have any KV computed again.

A session that is kept open takes a next prompt: what it shares with the last one is not computed
again. Where they part the session is cut back, which begins a new generation: rows of the old one
that a slow worker still writes are refused, so that what was rolled back stays rolled back.

With a drafter a step takes guesses of the next tokens along, and as many tokens come of it as were
guessed rightly, and one more. They are those that would have come one by one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.codecs.calibration import Calibration
from common.errors import MidspanError, SettingsError
from common.spans.cut import Span
from edge_agent.text.drafting.company import Company
from edge_agent.text.drafting.drafter import Draft, Drafter, DrafterSource
from edge_agent.text.drafting.policy import DraftPolicy
from edge_agent.text.ends import ModelEnds, Scores, scores_of
from edge_agent.text.logprobs import TokenLogprob, check_top, rank
from edge_agent.text.remote_middle import Computed, RemoteMiddle, Stretch
from edge_agent.text.sampler import Sampler
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session_settings import (
    SessionSettings,
    count_new_tokens,
    settle,
    why_no_drafts,
)
from edge_agent.text.stats import GenerationStats
from edge_agent.text.work import (
    NewToken,
    PromptScored,
    RunHead,
    RunTail,
    ScoreRows,
    Work,
    Working,
)

SCORED_ROWS = 128  # whose logits are held at once
LEAST_PIECE = 64  # rows of a prompt
PIECES = 8  # about so many of a long one


@dataclass(slots=True, eq=False)
class _Text:
    """A text that is being written, and by what its tokens are chosen."""

    token_ids: list[int]
    sampler: Sampler
    top_logprobs: int | None
    room: int  # tokens that may still be added
    started_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """A token and what is guessed to follow, and what the model says after each of these."""

    drafts: list[Draft]
    boundary: Tensor  # (1 + drafts, D), as the head gave it
    rows: Tensor  # as they came from the pool
    scores: list[Scores]


class TextSession:
    """One conversation's state, and what it wants done next. No sockets; not thread-safe.

    Raises SettingsError for a codec that cannot be used.
    """

    def __init__(
        self,
        ends: ModelEnds,
        settings: SessionSettings | None = None,
        calibration: Calibration | None = None,
        pool_key: bytes | None = None,
        drafters: DrafterSource | None = None,
        company: Company | None = None,
    ) -> None:
        """With `pool_key`, the public half of the pool's, the session's KV is encrypted at rest.

        The session's own key is drawn here and sealed for the workers; the broker cannot read it.
        `drafters` gives the session's drafter, if it is to have one. Raises SettingsError where one
        is demanded that cannot be. `company` are those that it shares a pool with.
        """
        self.stats = GenerationStats()
        self._ends = ends
        self._settings = settle(settings or SessionSettings(), ends)
        self._middle = RemoteMiddle(ends, self._settings, calibration, pool_key)
        self._caches = ends.new_caches(self._settings.exact)
        self._token_ids: list[int] = []  # of the rows that were sent
        self._drafters = drafters
        self._drafter = self._open_drafter()
        most_drafts = min(self._settings.draft_tokens, self._middle.most_drafts)
        if self._drafter is not None and company is None:
            company = Company(ends.rows_per_pass(self._settings.exact))
        self._policy = DraftPolicy(most_drafts, company)
        self.ended_by_itself = False  # with an end-of-sequence token

    def _open_drafter(self) -> Drafter | None:
        if self._drafters is None:
            return None
        reason = why_no_drafts(self._settings, self._ends)
        if reason and self._drafters.is_demanded:
            raise SettingsError(f"{self._ends.name} cannot be drafted for: {reason}")
        return None if reason else self._drafters(self._ends, self._caches)

    @property
    def ends(self) -> ModelEnds:
        """The model's, as it is cut for this session."""
        return self._ends

    @property
    def session_id(self) -> bytes:
        return self._middle.session_id

    @property
    def last_worker_id(self) -> str:
        return self._middle.last_worker_id

    @property
    def route(self) -> list[Span]:
        """The parts that compute its middle layers, one after another."""
        return self._middle.route

    @property
    def held(self) -> int:
        """Tokens whose rows it has."""
        return len(self._token_ids)

    @property
    def generation(self) -> int:
        """How often it was cut back where rows had been sent."""
        return self._middle.generation

    def answer(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingSettings,
        top_logprobs: int | None = None,
        score_prompt: bool = False,
    ) -> Working:
        """Give NewTokens until the end of the text, `max_new_tokens`, or the end of the context.

        With `top_logprobs` each has its log-probability, and those of so many likeliest tokens;
        with `score_prompt` the prompt's come first, as PromptScored, and no new tokens need be
        asked for. The session may be used again afterwards, also after an error. Raises
        SettingsError if the prompt does not fit into the context, StepRefused when the pool cannot
        go on.
        """
        limit = count_new_tokens(self._ends, prompt_ids, max_new_tokens, score_prompt)
        prompt_codec = self._middle.prompt_codec
        if score_prompt and prompt_codec.spec.kind == "top":
            raise SettingsError(
                f"codec {prompt_codec.name} leaves tokens out, which a score of given tokens "
                "needs; expected fp32, fp16 or bf16 for the logits of the prompt"
            )
        check_top(top_logprobs)
        token_ids = list(prompt_ids)
        text = _Text(token_ids, Sampler(sampling, len(token_ids)), top_logprobs, limit)
        self.stats = self._middle.stats = GenerationStats(
            prompt_tokens=len(token_ids),
            codecs=self._settings.codec_by_step,
            chosen_for=self._settings.chosen_for,
        )
        self.ended_by_itself = False
        if score_prompt:
            self.cut_back(0)
            last = yield from self._score_prompt(token_ids, top_logprobs or 0)
        else:
            known = self.cut_back(self.count_shared(token_ids))
            last = yield from self._run_prompt(token_ids[known:])
        try:
            going_on = yield from self._take_token(text, last)
            while going_on:
                step = yield from self._run_step(text)
                going_on = yield from self._take_tokens(text, step)
        finally:
            self._policy.rest()
            if self._drafters is not None:
                self._drafters.keep(self._ends, prompt_ids, text.token_ids[len(prompt_ids) :])

    def _take_token(self, text: _Text, scores: Scores) -> Generator[Work, Any, bool]:
        """Choose the next token; whether the text goes on after it."""
        if not text.room:
            return False
        token = text.sampler.choose(scores, text.token_ids)
        self.ended_by_itself = token in self._ends.eos_ids
        text.token_ids.append(token)
        text.room -= 1
        self._count_token(text)
        self._policy.on_token(token)
        if text.top_logprobs is None:
            yield NewToken(token)
        else:
            yield NewToken(token, *rank(scores.logits[None], [token], text.top_logprobs))
        return bool(text.room) and not self.ended_by_itself

    def _take_tokens(self, text: _Text, step: _Step) -> Generator[Work, Any, bool]:
        """Choose tokens as long as they are those that were guessed; whether the text goes on."""
        first = len(self._token_ids) - len(step.drafts)  # of the rows that may not hold
        try:
            for scores, guess in zip(step.scores, [*step.drafts, None], strict=True):
                going_on = yield from self._take_token(text, scores)
                if not going_on or guess is None or text.token_ids[-1] != guess.token_id:
                    return going_on
            return True
        finally:
            self._settle(step, first, max(first, len(text.token_ids) - 1))

    def _settle(self, step: _Step, first: int, held: int) -> None:
        """Take back the drafts that were wrong: rows from `first` on were drafts, `held` hold."""
        if self._drafter is None:
            return
        right = held - first
        self._drafter.observe(step.boundary[: 1 + right], step.rows[: 1 + right])
        if step.drafts:
            self._middle.take_back(held)
            self._caches.cut_back(held)
            del self._token_ids[held:]
            self.stats.count_drafts(self._drafter.name, len(step.drafts), right)
            self.stats.tokens_by_worker[self.last_worker_id] -= len(step.drafts) - right

    def _run_step(self, text: _Text) -> Generator[Work, Any, _Step]:
        """Head, pool and tail for the last token and what is guessed to follow on it."""
        drafts = self._guess(text)
        head_at = time.monotonic()
        token_ids = [text.token_ids[-1], *(draft.token_id for draft in drafts)]
        boundary, middle = yield from self._run_middle(token_ids, drafts=len(drafts))
        back_at = time.monotonic()
        scores: list[Scores] = yield RunTail(middle.rows, self._caches, wanted=len(token_ids))
        done_at = time.monotonic()
        stats = self.stats
        stats.round_trips += 1
        stats.add_stage("head", back_at - head_at - middle.pool_s)
        stats.add_stage("network", max(0.0, middle.pool_s - middle.queue_s - middle.middle_s))
        stats.add_stage("queue", middle.queue_s)
        stats.add_stage("middle", middle.middle_s)
        stats.add_stage("tail", done_at - back_at)
        self._policy.on_step(done_at - head_at)
        return _Step(drafts, boundary, middle.rows, scores)

    def _guess(self, text: _Text) -> list[Draft]:
        """What may follow on the last token, as far as it is worth to be checked."""
        if self._drafter is None:
            return []
        return self._policy.propose(self._drafter, text.token_ids, text.room - 1)

    def _run_prompt(self, token_ids: Sequence[int]) -> Generator[Work, Any, Scores]:
        """Head, pool and tail for a prompt's tokens; the scores after the last of them.

        A long prompt goes in pieces: while the pool computes one, the next go through the head and
        over the link, and those before it through the tail.
        """
        wants_all = self._ends.cut.has_tail
        at_once = min(self._middle.rows_at_once(wants_all), rows_of_piece(len(token_ids)))
        pieces: deque[tuple[Tensor, Stretch]] = deque()
        try:
            for at in range(0, len(token_ids), at_once):
                piece = token_ids[at : at + at_once]
                is_last = at + at_once >= len(token_ids)
                self._token_ids += piece
                boundary: Tensor = yield RunHead(piece, self._caches, is_prompt=True)
                wanted = len(piece) if wants_all else int(is_last)
                pieces.append((boundary, (yield from self._middle.send_ahead(boundary, wanted))))
                if len(pieces) >= self._settings.pieces_ahead or is_last:
                    scores = yield from self._take_piece(*pieces.popleft(), is_last and not pieces)
            while pieces:
                scores = yield from self._take_piece(*pieces.popleft(), not pieces)
        except MidspanError:
            yield from self._middle.drop_ahead()
            raise
        return scores[0]

    def _take_piece(
        self, boundary: Tensor, stretch: Stretch, is_last: bool
    ) -> Generator[Work, Any, list[Scores]]:
        """The pool's rows of a piece, through the tail."""
        rows = (yield from self._middle.receive(stretch)).rows
        if not len(rows):
            return []
        scores: list[Scores] = yield RunTail(rows, self._caches, True, wanted=int(is_last))
        self._observe(boundary, rows)
        return scores

    def _score_prompt(self, token_ids: list[int], top: int) -> Generator[Work, Any, Scores]:
        """Run a prompt and give its PromptScored; the scores after its last token."""
        boundary, middle = yield from self._run_middle(token_ids, is_prompt=True)
        logprobs: list[TokenLogprob] = []
        for chunk in torch.split(middle.rows, SCORED_ROWS):
            logits: Tensor = yield ScoreRows(chunk, self._caches)
            done = len(logprobs)
            following = token_ids[done + 1 : done + 1 + len(chunk)]
            logprobs += rank(logits[: len(following)], following, top)
        self._observe(boundary, middle.rows)
        yield PromptScored(logprobs)
        return scores_of(logits[-1])

    def _observe(self, boundary: Tensor, rows: Tensor) -> None:
        if self._drafter is not None:
            self._drafter.observe(boundary, rows)

    def middle_rows(self, token_ids: Sequence[int]) -> Generator[Work, Any, Tensor]:
        """The pool's rows (T, D) for a text, as one prompt; (T, V) where it has the tail."""
        _, middle = yield from self._run_middle(token_ids, is_prompt=True)
        return middle.rows

    def _run_middle(
        self,
        token_ids: Sequence[int],
        *,
        is_prompt: bool = False,
        wants_all: bool = True,
        drafts: int = 0,
    ) -> Generator[Work, Any, tuple[Tensor, Computed]]:
        """Head and pool for the next tokens: the head's rows (T, D), and the pool's.

        Those are of all, or of the last row alone.
        """
        self._token_ids += token_ids
        boundary: Tensor = yield RunHead(token_ids, self._caches, is_prompt)
        computed = yield from self._middle.run(boundary, is_prompt, wants_all, drafts)
        return boundary, computed

    def count_shared(self, prompt_ids: Sequence[int]) -> int:
        """How many rows of the session hold for a prompt; its last token is always run."""
        pairs = zip(self._token_ids, prompt_ids[:-1], strict=False)
        differing = (index for index, (old, new) in enumerate(pairs) if old != new)
        return next(differing, min(len(self._token_ids), len(prompt_ids) - 1))

    def cut_back(self, position: int) -> int:
        """Forget all rows from `position` on; returns how many are left.

        Rows that were encoded together go together, and layers with states go back to one that
        they have, so those may be fewer than `position`.
        """
        left = self._middle.cut_back(min(position, self._caches.tail.length))
        # an error may have left more in head and tail than ever was sent
        while (kept := self._caches.cut_back(left)) < left:
            left = self._middle.cut_back(kept)
        del self._token_ids[left:]
        if self._drafter is not None:
            self._drafter.cut_back(left)
        return left

    def _count_token(self, text: _Text) -> None:
        stats = self.stats
        stats.new_tokens += 1
        stats.total_s = time.monotonic() - text.started_at
        if stats.new_tokens == 1:
            stats.first_token_s = stats.total_s
            stats.prompt_bytes_up, stats.prompt_bytes_down = stats.bytes_up, stats.bytes_down

    def score_tail(self, rows: Tensor) -> Tensor:
        """Logits after every one of the pool's rows, (T, vocabulary)."""
        return self._ends.score_tail(rows, self._caches)


def rows_of_piece(prompt_rows: int) -> int:
    """In how large pieces a prompt is sent, if its codecs and workers take as many at once."""
    return max(LEAST_PIECE, -(-prompt_rows // PIECES))
