"""The race of test_fence.py with drafts: workers hold rows that are taken back, and come back late.

The edge here gives every row that it appends bytes of its own, so that a draft that was taken back
differs from the row that took its place. Workers are real services on a real store with a model
that keeps what it is sent; a reply is the rows that a step was computed on. Mutants of the worker
show that the test would see a draft that outlives its step.
"""

from __future__ import annotations

import inspect
import random
import secrets
import textwrap
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cloud_worker.loop.batcher import Batcher, Task, make_session_key
from cloud_worker.state.redis_store import RedisKvStore
from cloud_worker.state.row_seals import Checksum, ForgedRows, unseal
from cloud_worker.state.stage_cache import CacheBudget
from cloud_worker.state.store import Load, Loaded
from cloud_worker.text.service import TextService
from cloud_worker.text.stage import TextStage
from common.protocol.messages import Need, Opening, Part, Service, Step, StepReply
from common.spans.kv_rows import KvRows, make_layout
from common.spans.states import StateLayout
from deploy.embedded_redis import EmbeddedRedis

ROW_BYTES = 64
LAYOUT = make_layout([((1, ROW_BYTES // 2), (1, ROW_BYTES // 2))], torch.uint8)
WORKERS = 4
SESSIONS = 20
TURNS = 60  # of a session
MOST_DRAFTS = 4
OFFERED = Service("model", "model", "1-2", 1)
OPENING = Opening("model", ["1-2"], 1, ["fp32"], "")


class Keeper:
    """An executor whose KV rows are the rows of the steps."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(
            layout=LAYOUT, states_layout=StateLayout(), keeps_states=False,
            new_pool=lambda limit: None, new_kv=lambda pool: KvRows(LAYOUT),
        )  # fmt: skip

    def check(self, task: Task) -> None:
        """All steps are well-formed."""

    def run(self, batch: Sequence[tuple[Task, TextStage]]) -> list[bytes]:
        return [self._run_one(task.step, task.body, session) for task, session in batch]

    def _run_one(self, step: Step, body: bytes, session: TextStage) -> bytes:
        before = session.kv.read_bytes(0, step.position)
        session.kv.reserve(step.end)
        rows = torch.frombuffer(bytearray(body), dtype=torch.uint8).view(-1, ROW_BYTES)
        session.kv.buffer[step.position : step.end] = rows
        session.kv.length = step.end
        return before


class Worker:
    """A service, its store, and where it puts its answers: it is the outbox, too."""

    def __init__(self, url: str, name: str) -> None:
        self.worker_id = name
        self.answers: list[tuple[Need | StepReply, bytes]] = []
        self.later: list[Callable[[], None]] = []
        self.store = RedisKvStore(url, timeout_s=5)
        self.forget()

    def forget(self) -> None:
        """As if it had been started again."""
        self.later.clear()
        executor: Any = Keeper()
        self.service = TextService(
            executor, OFFERED, self.store, self,
            batcher=Batcher(512, 32), budget=CacheBudget(64 << 20), pool_key=None,
        )  # fmt: skip

    def answer(self, task: Task, message: StepReply | Need, *bodies: bytes) -> None:
        self.answers.append((message, b"".join(bodies)))

    def fail(self, task: Task, reason: str) -> None:
        """A step of an old generation."""

    def drop(self, task: Task) -> None:
        """A newer step is there."""

    def is_cancelled(self, task: Task) -> bool:
        return False

    def when_answered(self, work: Callable[[], None]) -> None:
        self.later.append(work)

    def turn(self) -> None:
        while self.later:
            self.later.pop(0)()
        for event in self.store.poll():
            self.service.on_store_event(event)
        self.service.run_batch()


class DraftRace:
    """Counts rows that somebody was served and the edge never said or had taken back."""

    def __init__(self, url: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.workers = [Worker(url, f"w{index}") for index in range(WORKERS)]
        self.reader = RedisKvStore(url, timeout_s=5)
        self.before: dict[tuple[bytes, int, int], bytes] = {}  # of each step, what it stands on
        self.late: list[tuple[Worker, Task]] = []
        self.wrong = 0
        self.taken_back = 0
        self.last = self.workers[0]
        self.begin_session()

    def close(self) -> None:
        for store in [self.reader, *(worker.store for worker in self.workers)]:
            store.close()

    def begin_session(self) -> None:
        self.session_id = secrets.token_bytes(16)
        self.generation, self.fork, self.number = 0, 0, 0
        self.rows = [self.new_row() for _ in range(3)]
        self.ask(0, drafts=0)

    def new_row(self) -> bytes:
        return self.rng.randbytes(ROW_BYTES)

    def take_turn(self) -> None:
        """A row that holds and drafts, of which the first few are kept."""
        held = len(self.rows)
        drafts = self.rng.randrange(MOST_DRAFTS + 1)
        self.rows += [self.new_row() for _ in range(1 + drafts)]
        self.ask(held, drafts)
        kept = self.rng.randrange(drafts + 1)
        self.taken_back += drafts - kept
        del self.rows[held + 1 + kept :]
        self.check_store()
        if self.rng.random() < 0.1:
            self.cut_back()
        if self.rng.random() < 0.05:
            self.rng.choice(self.workers).forget()

    def cut_back(self) -> None:
        """The edge goes back a few rows and on from there, in a new generation."""
        self.generation += 1
        self.fork = max(1, len(self.rows) - self.rng.randrange(6))
        del self.rows[self.fork :]

    def ask(self, position: int, drafts: int) -> None:
        """Have the rows from `position` on computed, and those before it where they are missing."""
        while True:
            worker = self.last if self.rng.random() < 0.5 else self.rng.choice(self.workers)
            task = self.make_task(position, drafts)
            if self.rng.random() < 0.3:
                self.late.append((self.rng.choice(self.workers), task))
            self.last = worker
            worker.service.on_step(task)
            answer = self.wait_for(worker, task)
            self.disturb()
            if isinstance(answer, StepReply):
                return
            position = answer.have

    def make_task(self, position: int, drafts: int) -> Task:
        self.number += 1
        body = b"".join(self.rows[position:])
        count = len(self.rows) - position
        step = Step(
            self.session_id, self.generation, self.fork, self.number, position,
            [Part(0, [count], len(body))], count, 0, 60_000, tentative=drafts,
        )  # fmt: skip
        self.before[step.key] = b"".join(self.rows[:position])
        return Task(step, OPENING, body, 1, 0, 0, time.monotonic())

    def wait_for(self, worker: Worker, task: Task) -> Need | StepReply:
        give_up_at = time.monotonic() + 10
        while True:
            for answer in self.collect(worker):
                if answer.key == task.step.key:
                    return answer
            assert time.monotonic() < give_up_at

    def collect(self, worker: Worker) -> list[Need | StepReply]:
        """What a worker has said, after a turn of its loop; what it computed on is checked."""
        worker.turn()
        answers, worker.answers = worker.answers, []
        for answer, body in answers:
            if isinstance(answer, StepReply):
                self.wrong += body != self.before[answer.key]
        return [answer for answer, _ in answers]

    def disturb(self) -> None:
        """Steps from before arrive where they were sent first, and others get on with theirs."""
        if self.late and self.rng.random() < 0.4:
            worker, task = self.late.pop(self.rng.randrange(len(self.late)))
            worker.service.on_step(task)
        for worker in self.workers:
            if self.rng.random() < 0.5:
                self.collect(worker)

    def check_store(self) -> None:
        """The store has rows that hold, and nothing else."""
        key = make_session_key(self.session_id, "", OFFERED.part)
        seal = Checksum(key)
        size = ROW_BYTES + seal.overhead
        shape = f"model 1-2 {LAYOUT.dtype} {ROW_BYTES} {seal.name}"
        self.reader.begin_load(Load(key, shape, self.generation, self.fork, 0, 1 << 10, size))
        events: list[Any] = []
        give_up_at = time.monotonic() + 10
        while not events:
            events = self.reader.poll()
            assert time.monotonic() < give_up_at
        (loaded,) = events
        assert isinstance(loaded, Loaded)
        try:
            stored = unseal(seal, loaded.rows, 0, ROW_BYTES, loaded.written_in)
        except ForgedRows:
            self.wrong += 1
        else:
            self.wrong += not b"".join(self.rows).startswith(stored)


def race(url: str, seed: int = 1) -> DraftRace:
    """Run until something is wrong, or to the end."""
    running = DraftRace(url, seed)
    try:
        for _ in range(SESSIONS):
            running.begin_session()
            for _ in range(TURNS):
                running.take_turn()
                if running.wrong:
                    return running
        return running
    finally:
        running.close()


def test_no_draft_is_served_once_it_was_taken_back(redis_server: EmbeddedRedis) -> None:
    ended = race(redis_server.url)
    assert ended.wrong == 0
    assert ended.taken_back > SESSIONS * TURNS / 2


def mutate(function: Callable[..., Any], old: str, new: str) -> Callable[..., Any]:
    """The function with another text."""
    source = textwrap.dedent(inspect.getsource(function))
    assert old in source
    names: dict[str, Any] = {}
    exec(source.replace(old, new), function.__globals__, names)
    mutant: Callable[..., Any] = names[function.__name__]
    return mutant


@pytest.mark.parametrize(
    ("owner", "name", "old", "new"),
    [
        (TextService, "_compute", "task.step.final", "task.step.end"),
        (TextService, "_commit", "end = min(stage.final,", "end = min(stage.kv.length,"),
        (TextStage, "adjust_to", "else min(step.position, self.final)", "else step.position"),
        (TextStage, "adjust_to", "step.fork, self.final)", "step.fork)"),
        (TextStage, "adjust_to", "+ 1)\n", "+ 1, self.last_step + 2)\n"),
    ],
    ids=[
        "all rows are final", "drafts are committed", "drafts outlive missed steps",
        "drafts outlive a cut-back", "drafts outlive one missed step",
    ],
)  # fmt: skip
def test_without_a_rule_for_drafts_the_race_goes_wrong(
    redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch,
    owner: type, name: str, old: str, new: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(owner, name, mutate(getattr(owner, name), old, new))
    assert race(redis_server.url).wrong > 0
