"""One text session: a prompt goes through head, pool and tail, and comes out token by token.

The session owns what nobody else needs to keep: the KV of head and tail, and the replay log of
encoded boundary rows, from which the pool can have any KV computed again.

A session that is kept open takes a next prompt: what it shares with the last one is not computed
again. Where they part the session is cut back, which begins a new generation: rows of the old one
that a slow worker still writes are refused, so that what was rolled back stays rolled back.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Generator, Sequence
from typing import Any

import torch
from msgspec import structs
from torch import Tensor

from common.codecs.calibration import Calibration
from common.codecs.codec import Codec, make_codec
from common.errors import (
    MidspanError,
    NonFiniteError,
    NoWorker,
    ProtocolError,
    SettingsError,
)
from common.protocol.messages import BOUNDARY, PROMPT, Need, Opening, StepReply
from common.security.sealing import draw_key, seal
from common.spans.cut import Span, read_span
from edge_agent.engine.exchange import Answered, Ask
from edge_agent.engine.session_asks import SessionAsks
from edge_agent.text.ends import ModelEnds, Scores, scores_of
from edge_agent.text.logprobs import TokenLogprob, check_top, rank
from edge_agent.text.replay_log import Encoded, ReplayLog, parts_of
from edge_agent.text.sampler import Sampler
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session_settings import SessionSettings, check_route, count_new_tokens, settle
from edge_agent.text.stats import GenerationStats
from edge_agent.text.work import (
    DecodeRow,
    EncodeRow,
    EndElsewhere,
    NewToken,
    PromptScored,
    RunHead,
    RunTail,
    ScoreRows,
    Work,
    Working,
)

LOGIT_BYTES = 16 << 20  # of one answer
MOST_BYTES_PER_VALUE = 4  # of boundary rows, whatever the codec
SCORED_ROWS = 128  # whose logits are held at once


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
    ) -> None:
        """With `pool_key`, the public half of the pool's, the session's KV is encrypted at rest.

        The session's own key is drawn here and sealed for the workers; the broker cannot read it.
        """
        self.stats = GenerationStats()
        self._ends = ends
        self._settings = settle(settings or SessionSettings(), ends)
        self._names = self._settings.codecs
        self._up = [make_codec(name, "up", calibration) for name in self._names]
        self._down = [make_codec(name, "down", calibration) for name in self._names]
        needed = any(codec.spec.needs_calibration for codec in self._up)
        route = check_route(self._settings.route or ends.route, ends.cut.middle)
        self._check_codecs_of(route)
        self._asks = self._make_asks(
            Opening(
                ends.fingerprint, [str(span) for span in route], ends.hidden, self._names,
                calibration.fingerprint if calibration is not None and needed else "",
                seal(draw_key(), pool_key) if pool_key is not None else b"",
                between=self._names.index(self._settings.between),
            )
        )  # fmt: skip
        self._caches = ends.new_caches()
        self._log = ReplayLog()
        self._token_ids: list[int] = []  # of the rows in the log
        self._generation = 0
        self._sent_generation = -1  # the newest that any step was sent in
        self._fork = 0
        self.ended_by_itself = False  # with an end-of-sequence token
        self.last_worker_id = ""

    def _check_codecs_of(self, route: Sequence[Span]) -> None:
        used = (self._settings.prompt_down, self._settings.decode_down)
        sent = (self._settings.prompt_up, self._settings.decode_up, self._settings.between)
        for name, codec in zip(self._names, self._down, strict=True):
            is_top = codec.spec.kind == "top"
            if is_top and (name in sent or self._ends.cut.has_tail):
                raise SettingsError(
                    f"codec {name} is for logits, which come from workers that have the LM head "
                    "(--span A:); expected one for boundary rows"
                )
            if codec.spec.needs_calibration and name in used and not self._ends.cut.has_tail:
                raise SettingsError(
                    f"codec {name} is for boundary rows; expected one for the logits that come "
                    "back, such as fp32, fp16 or top100"
                )
            if len(route) > 1 and codec.needs_uplink and name in used:
                raise SettingsError(
                    f"codec {codec.spec} builds on the rows that were sent, and the last of "
                    "several spans gets others; choose another one"
                )

    def _make_asks(self, opening: Opening) -> SessionAsks:
        words = ["midspan", "worker", "--model", str(self._ends.directory)]
        words += [word for span in opening.route for word in ("--span", span)]
        command = shlex.join([*words, *self._ends.worker_words])
        return SessionAsks(opening, command, takes_detours=True)

    @property
    def ends(self) -> ModelEnds:
        """The model's, as it is cut for this session."""
        return self._ends

    @property
    def _prompt_codec(self) -> Codec:
        """In which the pool answers a prompt."""
        return self._down[self._names.index(self._settings.prompt_down)]

    @property
    def session_id(self) -> bytes:
        return self._asks.session_id

    @property
    def route(self) -> list[Span]:
        """The parts that compute its middle layers, one after another."""
        return [read_span(part) for part in self._asks.opening.route]

    @property
    def held(self) -> int:
        """Tokens whose rows it has."""
        return len(self._token_ids)

    @property
    def generation(self) -> int:
        """How often it was cut back where rows had been sent."""
        return self._generation

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
        if score_prompt and self._prompt_codec.spec.kind == "top":
            raise SettingsError(
                f"codec {self._prompt_codec.name} leaves tokens out, which a score of given tokens "
                "needs; expected fp32, fp16 or bf16 for the logits of the prompt"
            )
        check_top(top_logprobs)
        sampler = Sampler(sampling, len(prompt_ids))
        token_ids = list(prompt_ids)
        started_at = time.monotonic()
        self.stats = GenerationStats(prompt_tokens=len(token_ids))
        self.ended_by_itself = False
        if score_prompt:
            self.cut_back(0)
            scores = yield from self._score_prompt(token_ids, top_logprobs or 0)
        else:
            known = self.cut_back(self.count_shared(token_ids))
            scores = yield from self._run(token_ids[known:], is_prompt=True)
        for index in range(limit):
            token = sampler.choose(scores, token_ids)
            self.ended_by_itself = token in self._ends.eos_ids
            self._count_token(index, started_at)
            if top_logprobs is None:
                yield NewToken(token)
            else:
                yield NewToken(token, *rank(scores.logits[None], [token], top_logprobs))
            token_ids.append(token)
            if self.ended_by_itself or index + 1 == limit:
                return
            scores = yield from self._run([token], is_prompt=False)

    def _score_prompt(self, token_ids: list[int], top: int) -> Generator[Work, Any, Scores]:
        """Run a prompt and give its PromptScored; the scores after its last token."""
        rows, _, _ = yield from self._run_middle(token_ids, is_prompt=True, wants_all=True)
        logprobs: list[TokenLogprob] = []
        for chunk in torch.split(rows, SCORED_ROWS):
            logits: Tensor = yield ScoreRows(chunk, self._caches)
            done = len(logprobs)
            following = token_ids[done + 1 : done + 1 + len(chunk)]
            logprobs += rank(logits[: len(following)], following, top)
        yield PromptScored(logprobs)
        return scores_of(logits[-1])

    def middle_rows(self, token_ids: Sequence[int]) -> Generator[Work, Any, Tensor]:
        """The pool's rows (T, D) for a text, as one prompt; (T, V) where it has the tail."""
        rows, _, _ = yield from self._run_middle(token_ids, is_prompt=True, wants_all=True)
        return rows

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
        position = min(position, self._caches.tail.length)
        before = len(self._log)
        left = self._log.cut_back(position)
        # an error may have left more in head and tail than ever went into the log
        while (kept := self._caches.cut_back(left)) < left:
            left = self._log.cut_back(kept)
        del self._token_ids[left:]
        if left == before:
            return left
        if self._sent_generation == self._generation:
            self._generation += 1
            self._fork = left
        self._fork = min(self._fork, left)
        return left

    def _count_token(self, index: int, started_at: float) -> None:
        stats = self.stats
        stats.new_tokens += 1
        stats.total_s = time.monotonic() - started_at
        if index == 0:
            stats.first_token_s = stats.total_s
            stats.prompt_bytes_up, stats.prompt_bytes_down = stats.bytes_up, stats.bytes_down

    def score_tail(self, rows: Tensor) -> Tensor:
        """Logits after every one of the pool's rows, (T, vocabulary)."""
        return self._ends.score_tail(rows, self._caches)

    def _run(self, token_ids: Sequence[int], is_prompt: bool) -> Generator[Work, Any, Scores]:
        """Head, pool and tail for the next tokens; the scores after the last of them."""
        rows, head_s, (pool_s, queue_s, middle_s) = yield from self._run_middle(
            token_ids, is_prompt, wants_all=self._ends.cut.has_tail
        )
        back_at = time.monotonic()
        scores: Scores = yield RunTail(rows, self._caches, is_prompt)
        if not is_prompt:
            self.stats.add_stage("head", head_s)
            self.stats.add_stage("network", max(0.0, pool_s - queue_s - middle_s))
            self.stats.add_stage("queue", queue_s)
            self.stats.add_stage("middle", middle_s)
            self.stats.add_stage("tail", time.monotonic() - back_at)
        return scores

    def _run_middle(
        self, token_ids: Sequence[int], is_prompt: bool, wants_all: bool
    ) -> Generator[Work, Any, tuple[Tensor, float, tuple[float, float, float]]]:
        """Head and pool for the next tokens: rows (T, D), seconds in the head, and in the pool.

        Or the last row alone. The seconds are those from sending to having the rows, of which in
        queues, of which in the middle.
        """
        head_at = time.monotonic()
        self._token_ids += token_ids
        boundary: Tensor = yield RunHead(token_ids, self._caches, is_prompt)
        settings = self._settings
        up = self._names.index(settings.prompt_up if is_prompt else settings.decode_up)
        down = self._names.index(settings.prompt_down if is_prompt else settings.decode_down)
        name = PROMPT if is_prompt and self._ends.marks_prompts else BOUNDARY
        start = len(self._log)
        for chunk in torch.split(boundary, self._rows_at_once(wants_all)):
            body: bytes | MidspanError
            if len(chunk) == 1:
                body = yield EncodeRow(self._up[up], chunk)
                if isinstance(body, MidspanError):
                    raise body
            else:
                body = self._up[up].encode(chunk)
            self._log.append(len(chunk), up, body, name)
        sent_at = time.monotonic()
        wanted = start if wants_all else len(self._log) - 1
        rows, queue_s, middle_s = yield from self._compute_middle(start, wanted, down)
        return rows, sent_at - head_at, (time.monotonic() - sent_at, queue_s, middle_s)

    def _rows_at_once(self, wants_all: bool) -> int:
        """Of a prompt: logits of all are a few rows at a time."""
        rows = self._settings.prefill_rows
        if self._ends.cut.has_tail or not wants_all:
            return rows
        return max(1, min(rows, LOGIT_BYTES // (4 * self._ends.reply_width)))

    def _compute_middle(
        self, start: int, wanted: int, down: int
    ) -> Generator[Work, Any, tuple[Tensor, float, float]]:
        """Have the pool compute the log from row `start` on, replaying earlier ones if it must.

        Returns the rows from `wanted` on, (T, D), and the seconds spent in queues and in the
        middle layers.
        """
        parts: list[Tensor] = []
        end, at_once = len(self._log), self._rows_at_once(wanted == start)
        position, queue_s, middle_s = start, 0.0, 0.0
        self._asks.begin_work()
        while position < end:
            pieces = self._log.read(position, at_once)
            first, last = pieces[0].start, pieces[-1].end
            reply_rows = max(0, last - max(position, wanted))
            answered: Answered | NoWorker = yield self._ask(pieces, reply_rows, down)
            if isinstance(answered, NoWorker):
                yield from self._take_detour(answered)
                continue
            self._count_answer(answered)
            answer, body = answered.answer, answered.body
            try:
                _check_need(answer, first)
                if isinstance(answer, StepReply):
                    rows = yield from self._decode(answer, body, pieces, reply_rows, down)
            except (NonFiniteError, ProtocolError) as error:
                self.stats.answers_unusable += 1
                self._asks.on_unusable(answer, error)
                continue
            self._asks.on_usable(answer)
            if isinstance(answer, Need):
                self.stats.rows_replayed += position - answer.have
                received = max(0, answer.have - wanted)
                parts = [torch.cat(parts)[:received]] if parts and received else []
                position = answer.have
                hint = "; is their --cache-mb smaller than one session, and Redis down?"
                self._asks.on_need(answer, "the session's KV", hint)
                continue
            if reply_rows:
                parts.append(rows)
                self.stats.tokens_by_worker[answer.worker_id] += reply_rows
            self.stats.committed = answer.committed
            self.last_worker_id = answer.worker_id
            queue_s += answer.queue_us / 1e6
            middle_s += answer.compute_us / 1e6
            position = last
        return (parts[0] if len(parts) == 1 else torch.cat(parts)), queue_s, middle_s

    def _take_detour(self, error: NoWorker) -> Generator[Work, Any, None]:
        """Go on over other parts: as a new session of the pool's, whose KV the log brings back.

        Raises the error if it knows no way round, or none that can be gone.
        """
        opening = self._asks.opening
        assert isinstance(opening, Opening)
        if not error.detour:
            raise error
        try:
            route = check_route([read_span(part) for part in error.detour], self._ends.cut.middle)
            self._check_codecs_of(route)
        except SettingsError:
            raise error from None
        yield EndElsewhere(self._asks.session_id)
        self._asks = self._make_asks(structs.replace(opening, route=[str(span) for span in route]))
        self._asks.begin_work()
        self.stats.detours += 1
        self._generation, self._fork, self._sent_generation = 0, 0, -1

    def _count_answer(self, answered: Answered) -> None:
        self._asks.is_known = True
        self.stats.bytes_up += answered.bytes_up
        self.stats.bytes_down += answered.bytes_down
        self.stats.asked_again += answered.asked_again

    def _ask(self, pieces: list[Encoded], reply_rows: int, down: int) -> Ask:
        self._sent_generation = self._generation
        return self._asks.make(
            generation=self._generation,
            fork=self._fork,
            position=pieces[0].start,
            parts=parts_of(pieces),
            body=pieces[0].body if len(pieces) == 1 else b"".join(piece.body for piece in pieces),
            reply_rows=reply_rows,
            reply_codec=down,
            deadline_s=self._settings.step_deadline_s,
            reply_bytes=reply_rows * self._ends.reply_width * MOST_BYTES_PER_VALUE,
        )

    def _decode(
        self, reply: StepReply, body: bytes, pieces: list[Encoded], rows: int, down: int
    ) -> Generator[Work, Any, Tensor]:
        """A reply's rows (rows, D). Raises ProtocolError or NonFiniteError, naming the worker."""
        if reply.rows != rows:
            raise ProtocolError(f"worker {reply.worker_id} answered {reply.rows} rows of {rows}")
        codec, width = self._down[down], self._ends.reply_width
        uplink = None
        if rows == 1 and not codec.needs_uplink:
            decoded_row: Tensor | MidspanError = yield DecodeRow(codec, body, width)
            if isinstance(decoded_row, MidspanError):
                raise _name_worker(decoded_row, reply.worker_id)
            return decoded_row.to(self._ends.tail.dtype)
        if codec.needs_uplink:
            decoded = [self._up[p.codec].decode(p.body, p.rows, self._ends.hidden) for p in pieces]
            uplink = torch.cat(decoded)[-reply.rows :]
        dtype = self._ends.tail.dtype
        try:
            return codec.decode(body, reply.rows, width, dtype, uplink)
        except (NonFiniteError, ProtocolError) as error:
            raise _name_worker(error, reply.worker_id) from error


def _name_worker(error: MidspanError, worker_id: str) -> MidspanError:
    return type(error)(f"worker {worker_id} answered badly: {error}")


def _check_need(answer: StepReply | Need, first: int) -> None:
    """Raise ProtocolError for what a worker cannot lack of a step from row `first` on."""
    if isinstance(answer, StepReply):
        return
    if answer.names:
        raise ProtocolError(f"worker {answer.worker_id} asks text for {answer.names}")
    if answer.have >= first:
        raise ProtocolError(
            f"worker {answer.worker_id} asks for rows from {answer.have} on, "
            f"which a step at {first} has sent"
        )
