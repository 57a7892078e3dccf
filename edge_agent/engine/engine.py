"""Many text sessions in one thread over one connection: heads and tails run in batches.

The engine turns a crank: take all answers, run the tails of all sessions that have one in one
batch, let them choose their tokens, run the heads in one batch, send. While some sessions are in
the pool, others are computed here. Sessions (edge_agent/text/text_session.py) and exchanges
(edge_agent/engine/exchange.py) are pure; this is where their sockets, clock and thread are.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import zmq

from common.codecs.calibration import Calibration
from common.codecs.codec import Codec
from common.errors import (
    BrokerUnavailable,
    EngineClosed,
    MidspanError,
    NoWorker,
    StepOvertaken,
    TooManySessions,
)
from common.protocol.messages import EndSession, StepKey
from common.protocol.wire import encode_header
from common.security.keys import ClientKeys
from common.spans.cut import Cut, Span
from edge_agent.engine.client import BrokerClient
from edge_agent.engine.exchange import Ask
from edge_agent.engine.exchanges import Exchanges, Outcome
from edge_agent.engine.link import BrokerLink
from edge_agent.engine.link_meter import LinkMeter
from edge_agent.engine.streams import Conversation, Token, TokenStream, Wanted
from edge_agent.text.codec_choice import CodecChooser
from edge_agent.text.drafting.company import Company
from edge_agent.text.drafting.drafter import DrafterSource
from edge_agent.text.ends import ModelEnds
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session_settings import SessionSettings
from edge_agent.text.text_session import TextSession
from edge_agent.text.work import (
    AwaitAnswer,
    DecodeRow,
    DropAsks,
    EncodeRows,
    EndElsewhere,
    NewToken,
    PromptScored,
    RunHead,
    RunTail,
    ScoreRows,
    SendAhead,
    Work,
    Working,
)

log = logging.getLogger("midspan.edge")

MAX_SESSIONS = 64  # computed at once
MAX_WAITING = 1024  # accepted, and begun when another ends
MAX_BATCH_ROWS = 512
IDLE_POLL_S = 1.0
HOLD_PART = 0.5  # of the time that a batch takes, for which the others of it are waited for

RowWork = TypeVar("RowWork", EncodeRows, DecodeRow)


@dataclass(slots=True, eq=False)
class _Running:
    """An answer that is being made."""

    stream: TokenStream
    text: TextSession
    wanted: Wanted
    ends_session: bool
    working: Working | None = None
    asked: deque[StepKey] = field(default_factory=deque)  # its steps, in order
    outcomes: dict[StepKey, Outcome] = field(default_factory=dict)  # of those that are answered
    awaits: bool = False  # the answer to the first of them
    asked_at: float = field(default_factory=time.monotonic)
    is_over: bool = False


class Engine:
    """Answers prompts of one model, many at once. Its methods may be called from any thread.

    Raises SettingsError for codecs that cannot be used, and what BrokerLink raises.
    """

    def __init__(
        self,
        ends: ModelEnds,
        brokers: Sequence[str],
        settings: SessionSettings | None = None,
        *,
        keys: ClientKeys | None = None,
        timeout_s: float = 60.0,
        calibration: Calibration | None = None,
        pool_key: bytes | None = None,
        max_sessions: int = MAX_SESSIONS,
        max_waiting: int = MAX_WAITING,
        choose_cut: Callable[[], ModelEnds] | None = None,
        drafters: DrafterSource | None = None,
    ) -> None:
        """`choose_cut` gives the ends for each session, all of the model that `ends` are of.

        `drafters` gives the drafter of each.
        """
        self._choose_cut = choose_cut or (lambda: ends)
        self._detours: dict[Cut, list[Span]] = {}  # that sessions have found lately
        self._settings = settings or SessionSettings()
        self._chooser = CodecChooser(self._settings, calibration)
        self._calibration, self._pool_key = calibration, pool_key
        self._drafters, self._company = drafters, None
        if drafters is not None and self._settings.exact:
            self._company = Company(ends.rows_per_pass(exact=True))
        self._meter = LinkMeter()
        self._new_session()  # complains now, if ever
        if self._settings.is_open:
            self._measure_link(brokers, keys)
        self._max_sessions, self._max_waiting = max_sessions, max_waiting
        self._link = BrokerLink(brokers, keys)
        self._exchanges = Exchanges[_Running](self._link, timeout_s, self._meter)
        self._commands: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._closing = False
        self._is_over = False
        self._accepted = 0  # answers that are neither over nor refused
        self._waiting: deque[_Running] = deque()
        self._running: dict[TokenStream, _Running] = {}
        self._heads: list[tuple[_Running, RunHead]] = []
        self._tails: list[tuple[_Running, RunTail]] = []
        self._scorings: deque[tuple[_Running, ScoreRows]] = deque()
        self._encodings: list[tuple[_Running, EncodeRows]] = []
        self._decodings: list[tuple[_Running, DecodeRow]] = []
        self._ready_since = 0.0  # the first of the answers that are here
        self._batch_s = 0.0  # that tails and heads take, lately
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="midspan-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingSettings | None = None,
        *,
        top_logprobs: int | None = None,
        score_prompt: bool = False,
    ) -> TokenStream:
        """Ask for an answer in a session of its own.

        As TextSession.answer. Raises TooManySessions when no more are taken now, EngineClosed.
        """
        wanted = Wanted(
            list(prompt_ids),
            max_new_tokens,
            sampling or SamplingSettings(),
            top_logprobs,
            score_prompt,
        )
        return self._submit(self.open(), wanted, ends_session=True)

    def open(self) -> Conversation:
        """A session for several turns; `close` it."""
        return Conversation(self, self._new_session())

    def _new_session(self) -> TextSession:
        ends = self._choose_cut()
        settings = self._chooser.choose(ends, self._meter.link)
        if ends.cut in self._detours:
            settings = replace(settings, route=self._detours[ends.cut])
        return TextSession(
            ends, settings, self._calibration, self._pool_key, self._drafters, self._company
        )

    def _measure_link(self, brokers: Sequence[str], keys: ClientKeys | None) -> None:
        """Over a connection that nothing else is on; steps go on with it."""
        client = BrokerClient(brokers, keys=keys, meter=self._meter)
        try:
            client.measure_link()
        finally:
            client.close()

    def count_answers(self) -> tuple[int, int]:
        """How many are being made, and how many wait."""
        made = len(self._running)
        return made, max(0, self._accepted - made)

    def close(self) -> None:
        """End all answers, with EngineClosed, and the connection."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._wake()
        self._thread.join()

    def _submit(
        self, conversation: Conversation, wanted: Wanted, ends_session: bool
    ) -> TokenStream:
        stream = TokenStream(self, conversation)
        running = _Running(stream, conversation._text, wanted, ends_session)
        with self._lock:
            if self._closing:
                raise EngineClosed("the engine is closed")
            if self._accepted >= self._max_sessions + self._max_waiting:
                raise TooManySessions(
                    f"{self._accepted} answers are being made or waited for; try again later"
                )
            if conversation._is_answering:
                raise TooManySessions("the conversation has an answer that is not over yet")
            conversation._is_answering = True
            self._accepted += 1
            self._commands.append(lambda: self._waiting.append(running))
            self._wake()
        return stream

    # --- from any thread to the engine's

    def _command(self, command: Callable[[], None]) -> None:
        with self._lock:
            self._commands.append(command)
            self._wake()

    def _wake(self) -> None:
        """The lock must be held: a number that was closed may be another file's."""
        if not self._is_over:
            os.eventfd_write(self._wake_fd, 1)

    # --- the engine's thread

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_fd, zmq.POLLIN)
        try:
            while not self._closing:
                self._take_commands()
                self._begin_waiting()
                self._receive()
                if self._is_worth_computing():
                    self._compute()
                    self._receive()  # who has spoken meanwhile was not silent
                self._look_after_exchanges()
                if not self._commands:
                    self._wait(poller)
        except Exception as error:
            log.exception("the engine failed")
            self._finish_all(error)
        finally:
            with self._lock:
                self._closing = True
            self._take_commands()  # what was asked for before it was closed
            self._finish_all(EngineClosed("the engine is closed"))
            self._link.close()
            with self._lock:
                self._is_over = True
                os.close(self._wake_fd)

    def _wait(self, poller: zmq.Poller) -> None:
        socket, events = self._link.socket, self._link.events
        for each in (socket, events):
            poller.register(each, zmq.POLLIN)
        now = time.monotonic()
        due_at = self._exchanges.due_at or now + IDLE_POLL_S
        if self._is_anything_ready:
            due_at = min(due_at, self._hold_until)
        if self._scorings:
            due_at = now
        wait_s = max(0.0, min(due_at - now, IDLE_POLL_S))
        poller.poll(math.ceil(wait_s * 1000))
        for each in (socket, events):
            poller.unregister(each)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def _take_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _begin_waiting(self) -> None:
        while self._waiting and len(self._running) < self._max_sessions:
            running = self._waiting.popleft()
            self._running[running.stream] = running
            running.working = running.wanted.begin(running.text)
            self._go_on(running, None)

    def _receive(self) -> None:
        try:
            for running, key, outcome in self._exchanges.receive():
                self._hear(running, key, outcome)
        except BrokerUnavailable as error:  # it speaks another protocol
            self._finish_all(error)

    def _hear(self, running: _Running, key: StepKey, outcome: Outcome) -> None:
        """A step of a session is answered, or will not be."""
        if isinstance(outcome, MidspanError) and not isinstance(outcome, NoWorker | StepOvertaken):
            self._finish(running, outcome)
            return
        running.outcomes[key] = outcome
        if running.awaits and running.asked[0] == key:
            self._go_on(running, self._take_outcome(running))

    def _take_outcome(self, running: _Running) -> Outcome:
        """What became of the first step that a session waits for."""
        running.awaits = False
        return running.outcomes.pop(running.asked.popleft())

    @property
    def _hold_until(self) -> float:
        return self._ready_since + HOLD_PART * self._batch_s

    @property
    def _is_anything_ready(self) -> bool:
        return bool(self._decodings or self._tails or self._heads or self._encodings)

    def _is_worth_computing(self) -> bool:
        """Weights are read once for a batch, so those who are still in the pool are waited for.

        Not for long: what comes later forms a group of its own, in the pool while this one is here.
        """
        if self._heads or self._scorings or not self._exchanges:
            return True
        return self._is_anything_ready and time.monotonic() >= self._hold_until

    def _compute(self) -> None:
        """Tails, then heads, of all who have come so far; what follows goes out at once."""
        begun_at, had_answers = time.monotonic(), bool(self._decodings or self._tails)
        while self._is_anything_ready:
            decodings, self._decodings = self._decodings, []
            self._run_rows(
                decodings,
                lambda codec, works: torch.split(
                    codec.decode_each([work.body for work in works], works[0].width), 1
                ),
            )
            tails, self._tails = self._tails, []
            self._run_by_cut(
                [(running, work.caches, work) for running, work in tails],
                lambda ends, batch: ends.run_tails(
                    [(work.rows, caches) for _, caches, work in batch],
                    [work.is_prompt for _, _, work in batch],
                    [work.wanted for _, _, work in batch],
                ),
            )
            heads, self._heads = self._heads, []
            self._run_by_cut(
                [(running, work.caches, work) for running, work in heads],
                lambda ends, batch: ends.run_heads(
                    [(work.token_ids, caches) for _, caches, work in batch],
                    [work.is_prompt for _, _, work in batch],
                ),
            )
            encodings, self._encodings = self._encodings, []
            self._run_rows(
                encodings,
                lambda codec, works: _deal(
                    codec.encode_each(torch.cat([work.rows for work in works])),
                    [len(work.rows) for work in works],
                ),
            )
        if self._scorings:  # one at a time: prompts that are scored are long
            running, work = self._scorings.popleft()
            self._run_by_cut(
                [(running, work.caches, work)],
                lambda ends, batch: [ends.score_tail(w.rows, caches) for _, caches, w in batch],
            )
        if had_answers:
            self._batch_s += (time.monotonic() - begun_at - self._batch_s) / 8

    def _run_by_cut(
        self,
        batch: list[tuple[_Running, Any, Any]],
        compute: Callable[[ModelEnds, list[tuple[_Running, Any, Any]]], Sequence[Any]],
    ) -> None:
        """Sessions whose model is cut at the same place go together."""
        groups: dict[Cut, list[tuple[_Running, Any, Any]]] = {}
        for each in batch:
            groups.setdefault(each[0].text.ends.cut, []).append(each)
        for group in groups.values():
            self._run_batch(group, functools.partial(compute, group[0][0].text.ends))

    def _run_rows(
        self,
        batch: Sequence[tuple[_Running, RowWork]],
        together: Callable[[Codec, list[RowWork]], Sequence[Any]],
    ) -> None:
        """Encode or decode single rows, those of one codec together; if that fails each alone."""
        groups: dict[tuple[str, int], list[tuple[_Running, RowWork]]] = {}
        for running, work in batch:
            groups.setdefault((work.codec.name, work.width), []).append((running, work))
        for group in groups.values():
            works = [work for _, work in group]
            try:
                results = together(works[0].codec, works)
            except Exception:  # whatever one row holds, others go on
                for running, work in group:
                    self._do_alone(running, work)
                continue
            for (running, _), result in zip(group, results, strict=True):
                self._go_on(running, result)

    def _do_alone(self, running: _Running, work: EncodeRows | DecodeRow) -> None:
        try:
            result = work.do()
        except Exception as error:
            self._finish(running, error)
        else:
            self._go_on(running, result)

    def _run_batch(
        self,
        batch: list[tuple[_Running, Any, Any]],
        compute: Callable[[list[tuple[_Running, Any, Any]]], Sequence[Any]],
    ) -> None:
        """Compute for several sessions together; if that fails each alone, to find the culprit."""
        for part in _split(batch):
            lengths = [(caches, caches.head.length, caches.tail.length) for _, caches, _ in part]
            try:
                results = compute(part)
            except Exception as error:  # whatever one session's numbers do, others go on
                for caches, head, tail in lengths:
                    caches.head.cut_back(head)
                    caches.tail.cut_back(tail)
                if len(part) == 1:
                    self._finish(part[0][0], error)
                else:
                    for each in part:
                        self._run_batch([each], compute)
                continue
            for (running, _, _), result in zip(part, results, strict=True):
                self._go_on(running, result)

    def _go_on(self, running: _Running, result: Any) -> None:
        """Let a session do what it can with a result, up to the next work that takes long."""
        while not running.is_over:
            assert running.working is not None
            try:
                work: Work = running.working.send(result)
            except StopIteration:
                self._finish(running, None)
                return
            except Exception as error:
                self._finish(running, error)
                return
            if isinstance(work, RunHead):
                self._heads.append((running, work))
                return
            if isinstance(work, RunTail):
                self._note_ready()
                self._tails.append((running, work))
                return
            if isinstance(work, ScoreRows):
                self._scorings.append((running, work))
                return
            if isinstance(work, DecodeRow):
                self._note_ready()
                self._decodings.append((running, work))
                return
            if isinstance(work, EncodeRows):
                self._encodings.append((running, work))
                return
            if isinstance(work, Ask | SendAhead):
                if not self._ask(running, work if isinstance(work, Ask) else work.ask):
                    return
                if isinstance(work, Ask):
                    running.awaits = True
                    return
            elif isinstance(work, AwaitAnswer):
                running.awaits = True
                if running.asked[0] not in running.outcomes:
                    return
                result = self._take_outcome(running)
                continue
            elif isinstance(work, DropAsks):
                self._drop_exchanges(running)
            elif isinstance(work, EndElsewhere):
                self._end_session(work.session_id)
            elif isinstance(work, PromptScored):
                running.stream.prompt_logprobs = work.logprobs
            else:
                self._tell(running, work)
            result = None

    def _note_ready(self) -> None:
        if not self._decodings and not self._tails:
            self._ready_since = time.monotonic()

    def _tell(self, running: _Running, new: NewToken) -> None:
        stats, text = running.text.stats, running.text
        at_s = time.monotonic() - running.asked_at
        running.stream._put(
            Token(
                new.token_id, text.last_worker_id, stats.bytes_up, stats.bytes_down, at_s,
                new.logprob, stats.last_stages(),
            )
        )  # fmt: skip

    # --- exchanges

    def _ask(self, running: _Running, ask: Ask) -> bool:
        """Have a step computed; False if it cannot be, which ends the answer."""
        try:
            running.asked.append(self._exchanges.begin(running, ask))
        except MidspanError as error:
            self._finish(running, error)
            return False
        return True

    def _drop_exchanges(self, running: _Running) -> None:
        for key in running.asked:
            self._exchanges.drop(key)
        running.asked.clear()
        running.outcomes.clear()
        running.awaits = False

    def _look_after_exchanges(self) -> None:
        for running, key, outcome in self._exchanges.look_after():
            self._hear(running, key, outcome)

    def _end_session(self, session_id: bytes) -> None:
        self._link.send([encode_header(EndSession(session_id))], 0.0)

    # --- ends

    def _cancel(self, stream: TokenStream) -> None:
        running = self._running.get(stream)
        if running is None:
            running = next((each for each in self._waiting if each.stream is stream), None)
            if running is None:
                return  # it is over
            self._waiting.remove(running)
        self._finish(running, None)

    def _finish(self, running: _Running, error: BaseException | None) -> None:
        """An answer is over: it is complete, was cancelled, or failed."""
        if running.is_over:
            return
        running.is_over = True
        self._drop_exchanges(running)
        self._drop_work(running)
        self._running.pop(running.stream, None)
        if running.working is not None:
            with contextlib.suppress(ValueError):  # it is what has called us
                running.working.close()
            if running.ends_session:
                self._end_session(running.text.session_id)
        if running.text.stats.detours:  # others need not find out
            self._detours[running.text.ends.cut] = running.text.route
        running.stream.stats = running.text.stats
        running.stream.ended_by_itself = running.text.ended_by_itself
        with self._lock:
            self._accepted -= 1
            running.stream.conversation._is_answering = False
        running.stream._put(error)

    def _drop_work(self, running: _Running) -> None:
        """What it waits for here is not computed: its caches may be the next answer's by then."""
        self._tails = [each for each in self._tails if each[0] is not running]
        self._scorings = deque(each for each in self._scorings if each[0] is not running)
        self._heads = [each for each in self._heads if each[0] is not running]
        self._encodings = [each for each in self._encodings if each[0] is not running]
        self._decodings = [each for each in self._decodings if each[0] is not running]

    def _finish_all(self, error: BaseException) -> None:
        for running in [*self._running.values(), *self._waiting]:
            self._finish(running, error)
        self._waiting.clear()


def _deal(items: Sequence[bytes], counts: Sequence[int]) -> list[list[bytes]]:
    """So many items to each, one after another."""
    rest = iter(items)
    return [list(itertools.islice(rest, count)) for count in counts]


def _split(batch: list[tuple[_Running, Any, Any]]) -> Iterator[list[tuple[_Running, Any, Any]]]:
    """Parts of about MAX_BATCH_ROWS rows; whoever has more goes alone."""
    part: list[tuple[_Running, Any, Any]] = []
    rows = 0
    for each in batch:
        if part and rows + each[2].size > MAX_BATCH_ROWS:
            yield part
            part, rows = [], 0
        part.append(each)
        rows += each[2].size
    if part:
        yield part
