"""A text session's middle layers in the pool: boundary rows go in, and come back computed.

Whatever happens to workers: the rows that were sent are kept in a log, from which the pool can have
any KV computed again, and where a part of the route is served no more the session goes another way.

The last rows of a step may be drafts, which the session takes back where they turn out wrong. They
travel together, and a step that begins after them says by its position how many have held.
"""

from __future__ import annotations

import shlex
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
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
    StepOvertaken,
)
from common.protocol.messages import BOUNDARY, PROMPT, Need, Opening, StepReply
from common.security.sealing import draw_key, seal
from common.settings import MAX_ATTEMPTS, MAX_EXACT_PARTS
from common.spans.cut import Span, read_span
from edge_agent.engine.exchange import Answered, Ask
from edge_agent.engine.session_asks import SessionAsks
from edge_agent.text.ends import ModelEnds
from edge_agent.text.replay_log import MAX_PARTS, Encoded, ReplayLog, parts_of
from edge_agent.text.session_settings import SessionSettings, check_route
from edge_agent.text.stats import GenerationStats
from edge_agent.text.work import (
    AwaitAnswer,
    DecodeRow,
    DropAsks,
    EncodeRows,
    EndElsewhere,
    SendAhead,
    Work,
)

LOGIT_BYTES = 16 << 20  # of one answer
DRAFTED_LOGIT_BYTES = 64 << 10  # of an answer to a step with drafts
MOST_BYTES_PER_VALUE = 4  # of boundary rows, whatever the codec


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """Rows that the pool has computed, and the seconds that it took."""

    rows: Tensor  # (T, D)
    pool_s: float  # from sending to having them back
    queue_s: float  # of these, in queues
    middle_s: float  # and in the middle layers


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Rows of the log that are computed together, and which of them come back."""

    start: int
    end: int
    wanted: int  # rows from here on come back
    final: int  # rows from here on are drafts
    is_prompt: bool

    def count_wanted(self, pieces: list[Encoded]) -> int:
        """How many rows of these pieces come back: none of those that are only replayed."""
        return max(0, pieces[-1].end - max(pieces[0].start, self.wanted))


class RemoteMiddle:
    """What a session has sent to the pool, and how it gets an answer. No sockets.

    Raises SettingsError for a codec that cannot be used.
    """

    def __init__(
        self,
        ends: ModelEnds,
        settings: SessionSettings,
        calibration: Calibration | None = None,
        pool_key: bytes | None = None,
    ) -> None:
        """`settings` are those that hold for the model. `pool_key` as for TextSession."""
        self.stats = GenerationStats()
        self.last_worker_id = ""
        self._ends = ends
        self._settings = settings
        self._names = settings.codecs
        self._most_parts = MAX_EXACT_PARTS if settings.exact else MAX_PARTS  # of a step
        self._up = [make_codec(name, "up", calibration) for name in self._names]
        self._down = [make_codec(name, "down", calibration) for name in self._names]
        needed = any(codec.spec.needs_calibration for codec in self._up)
        route = check_route(settings.route or ends.route, ends.cut.middle)
        self._check_codecs_of(route)
        self._asks = self._make_asks(
            Opening(
                ends.fingerprint, [str(span) for span in route], ends.hidden, self._names,
                calibration.fingerprint if calibration is not None and needed else "",
                seal(draw_key(), pool_key) if pool_key is not None else b"",
                between=self._names.index(settings.between),
                exact=settings.exact,
            )
        )  # fmt: skip
        self._log = ReplayLog()
        self._asked_to = 0  # rows of it that went out, and need not again as far as is known
        self._ahead: deque[Stretch] = deque()  # sent, and not received yet
        self._generation = 0
        self._sent_generation = -1  # the newest that any step was sent in
        self._fork = 0

    def __len__(self) -> int:
        """Rows that were sent, or are about to be."""
        return len(self._log)

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
    def session_id(self) -> bytes:
        return self._asks.session_id

    @property
    def route(self) -> list[Span]:
        """The parts that compute the middle layers, one after another."""
        return [read_span(part) for part in self._asks.opening.route]

    @property
    def generation(self) -> int:
        """How often it was cut back where rows had been sent."""
        return self._generation

    @property
    def prompt_codec(self) -> Codec:
        """In which the pool answers a prompt."""
        return self._down[self._names.index(self._settings.prompt_down)]

    @property
    def most_drafts(self) -> int:
        """How many rows of one step may be drafts: they come back together.

        Logits of a large vocabulary are more than guesses are worth, on most links.
        """
        most = min(self._most_parts, self.rows_at_once(wants_all=True))
        if not self._ends.cut.has_tail:
            codec = self._down[self._names.index(self._settings.decode_down)]
            most = min(most, DRAFTED_LOGIT_BYTES // codec.row_bytes(self._ends.reply_width))
        return max(0, most - 1)

    def cut_back(self, position: int) -> int:
        """Forget the rows from `position` on, for good; returns how many are left.

        Rows that were encoded together go together. A new generation begins.
        """
        before, left = len(self._log), self._log.cut_back(position)
        self._ahead.clear()  # of an answer that has failed
        self._asked_to = min(self._asked_to, left)
        if left == before:
            return left
        if self._sent_generation == self._generation:
            self._generation += 1
            self._fork = left
        self._fork = min(self._fork, left)
        return left

    def take_back(self, position: int) -> None:
        """Forget the drafts from `position` on, which nobody takes for more than that."""
        self._asked_to = self._log.cut_back(position)

    def run(
        self, boundary: Tensor, is_prompt: bool, wants_all: bool, drafts: int = 0
    ) -> Generator[Work, Any, Computed]:
        """Have the pool compute the next rows (T, D), of which the last `drafts` are tentative.

        Gives all that it answers, or the last one alone. Raises StepRefused when it cannot go on.
        """
        start = len(self._log)
        for chunk in torch.split(boundary, self.rows_at_once(wants_all)):
            yield from self._encode(chunk, is_prompt)
        end = len(self._log)
        wanted = start if wants_all else end - 1
        return (yield from self._compute(Stretch(start, end, wanted, end - drafts, is_prompt)))

    def send_ahead(self, boundary: Tensor, wanted: int) -> Generator[Work, Any, Stretch]:
        """Send the next rows (T, D) of a prompt without a wait; the last `wanted` come back.

        They are no more than `rows_at_once`. What was sent first is to be received first.
        """
        start = len(self._log)
        yield from self._encode(boundary, is_prompt=True)
        end = len(self._log)
        stretch = Stretch(start, end, end - wanted, end, is_prompt=True)
        if self._asked_to == start:  # else one before it will have to be sent again
            yield SendAhead(self._ask(self._read(start, end - start, stretch), stretch))
            self._ahead.append(stretch)
            self._asked_to = end
        return stretch

    def receive(self, stretch: Stretch) -> Generator[Work, Any, Computed]:
        """What comes back of rows that were sent ahead, whatever had to be done again for it."""
        return (yield from self._compute(stretch))

    def drop_ahead(self) -> Generator[Work, Any, None]:
        """Nobody waits for what was sent ahead: it will be sent again."""
        if self._ahead:
            self._asked_to = self._ahead[0].start
            self._ahead.clear()
            yield DropAsks()

    def rows_at_once(self, wants_all: bool) -> int:
        """Of a prompt: logits of all are a few rows at a time."""
        rows = self._settings.prefill_rows
        if self._ends.cut.has_tail or not wants_all:
            return rows
        return max(1, min(rows, LOGIT_BYTES // (4 * self._ends.reply_width)))

    def _encode(self, rows: Tensor, is_prompt: bool) -> Generator[Work, Any, None]:
        """Put rows into the log: of a prompt together, others each by itself."""
        settings = self._settings
        index = self._names.index(settings.prompt_up if is_prompt else settings.decode_up)
        name = PROMPT if is_prompt and self._ends.marks_prompts else BOUNDARY
        if is_prompt and len(rows) > 1:
            self._log.append(len(rows), index, self._up[index].encode(rows), name)
            return
        bodies: list[bytes] | MidspanError = yield EncodeRows(self._up[index], rows)
        if isinstance(bodies, MidspanError):
            raise bodies
        for body in bodies:
            self._log.append(1, index, body, name)

    def _compute(self, stretch: Stretch) -> Generator[Work, Any, Computed]:
        """Have the pool compute rows of the log, replaying earlier ones if it must."""
        parts: list[Tensor] = []
        position, overtaken, queue_s, middle_s = stretch.start, 0, 0.0, 0.0
        at_once = self.rows_at_once(stretch.wanted == stretch.start)
        begun_at = time.monotonic()
        self._asks.begin_work()
        while position < stretch.end:
            pieces = self._read(position, at_once, stretch)
            first, last = pieces[0].start, pieces[-1].end
            answered = yield from self._have_answered(pieces, stretch)
            if not isinstance(answered, Answered):
                yield from self.drop_ahead()
                if isinstance(answered, NoWorker):
                    yield from self._take_detour(answered)
                elif (overtaken := overtaken + 1) >= MAX_ATTEMPTS:
                    raise answered
                continue
            self._count_answer(answered)
            answer, body = answered.answer, answered.body
            try:
                _check_need(answer, first)
                if isinstance(answer, StepReply):
                    rows = yield from self._decode(answer, body, pieces, stretch)
            except (NonFiniteError, ProtocolError) as error:
                yield from self.drop_ahead()
                self.stats.answers_unusable += 1
                self._asks.on_unusable(answer, error)
                continue
            self._asks.on_usable(answer)
            if isinstance(answer, Need):
                yield from self.drop_ahead()
                self.stats.rows_replayed += position - answer.have
                received = max(0, answer.have - stretch.wanted)
                parts = [torch.cat(parts)[:received]] if parts and received else []
                position = answer.have
                hint = "; is their --cache-mb smaller than one session, and Redis down?"
                self._asks.on_need(answer, "the session's KV", hint)
                continue
            parts.append(rows)
            if len(rows):
                self.stats.tokens_by_worker[answer.worker_id] += len(rows)
            self.stats.committed = answer.committed
            self.last_worker_id = answer.worker_id
            queue_s += answer.queue_us / 1e6
            middle_s += answer.compute_us / 1e6
            position = last
            self._asked_to = max(self._asked_to, last)
        rows = parts[-1] if len(parts) == 1 else torch.cat(parts)
        return Computed(rows, time.monotonic() - begun_at, queue_s, middle_s)

    def _have_answered(
        self, pieces: list[Encoded], stretch: Stretch
    ) -> Generator[Work, Any, Answered | NoWorker | StepOvertaken]:
        """The answer to a step, which may have been sent ahead."""
        work: Work = AwaitAnswer()
        if self._ahead and self._ahead[0] is stretch:
            self._ahead.popleft()
        else:
            work = self._ask(pieces, stretch)
        answered: Answered | NoWorker | StepOvertaken = yield work
        return answered

    def _read(self, position: int, at_once: int, stretch: Stretch) -> list[Encoded]:
        """The next pieces to send: of drafts all, or none.

        A step that began among the drafts would say that those before it hold.
        """
        read = self._log.read(position, at_once, self._most_parts)
        pieces = [piece for piece in read if piece.end <= stretch.end]
        if not stretch.final < pieces[-1].end < stretch.end:
            return pieces
        return [piece for piece in pieces if piece.end <= stretch.final]

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

    def _ask(self, pieces: list[Encoded], stretch: Stretch) -> Ask:
        self._sent_generation = self._generation
        reply_rows = stretch.count_wanted(pieces)
        return self._asks.make(
            generation=self._generation,
            fork=self._fork,
            position=pieces[0].start,
            parts=parts_of(pieces),
            body=pieces[0].body if len(pieces) == 1 else b"".join(piece.body for piece in pieces),
            reply_rows=reply_rows,
            reply_codec=self._reply_codec(stretch),
            deadline_s=self._settings.step_deadline_s,
            reply_bytes=reply_rows * self._ends.reply_width * MOST_BYTES_PER_VALUE,
            tentative=max(0, pieces[-1].end - stretch.final),
        )

    def _reply_codec(self, stretch: Stretch) -> int:
        settings = self._settings
        name = settings.prompt_down if stretch.is_prompt else settings.decode_down
        return self._names.index(name)

    def _decode(
        self, reply: StepReply, body: bytes, pieces: list[Encoded], stretch: Stretch
    ) -> Generator[Work, Any, Tensor]:
        """A reply's rows (rows, D). Raises ProtocolError or NonFiniteError, naming the worker."""
        rows = stretch.count_wanted(pieces)
        if reply.rows != rows:
            raise ProtocolError(f"worker {reply.worker_id} answered {reply.rows} rows of {rows}")
        codec, width = self._down[self._reply_codec(stretch)], self._ends.reply_width
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
