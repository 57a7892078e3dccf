"""A worker that has nothing of a session goes on from the store: two services, no processes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
import torch
from test_store_contract import commit_of, load_of, new_session, rows, run_commit, wait

from cloud_worker.loop.batcher import Task
from cloud_worker.serving import ServingSettings, load_text_service
from cloud_worker.state.memory_store import MemoryKvStore
from cloud_worker.state.redis_store import RedisKvStore, chunk_key
from cloud_worker.state.stage_cache import CacheBudget
from cloud_worker.state.store import Commit, KvStore, Load, Loaded, Part, chunk_rows
from cloud_worker.text.service import TextService
from common.codecs.codec import make_codec
from common.protocol.messages import Need, Opening, Step, StepReply
from common.protocol.messages import Part as StepPart
from deploy.embedded_redis import EmbeddedRedis

ROWS = 511  # the demo model's context less one; its KV lies in two chunks
KEY = b"s" * 16
SEALED_ROW = 2048 + 8
CHUNK = chunk_rows(SEALED_ROW)
Said = StepReply | Need


class Answers:
    """An outbox that keeps what is put into it."""

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.said: list[tuple[Said, bytes]] = []
        self.dropped = 0

    def answer(self, task: Task, message: Said, *bodies: bytes) -> None:
        self.said.append((message, b"".join(bodies)))

    def fail(self, task: Task, reason: str) -> None:
        raise AssertionError(reason)

    def drop(self, task: Task) -> None:
        self.dropped += 1

    def when_answered(self, work: Callable[[], None]) -> None:
        work()

    def is_cancelled(self, task: Task) -> bool:
        return False


class Server:
    """One worker's text service, its store and its answers."""

    def __init__(
        self,
        directory: Path,
        store: KvStore,
        name: str,
        settings: ServingSettings | None = None,
    ) -> None:
        self.store = store
        self.answers = Answers(name)
        make = load_text_service(
            directory, None, None, store, settings or ServingSettings(), CacheBudget(64 << 20)
        )
        service = make(self.answers)
        assert isinstance(service, TextService)
        self.service = service

    def task(self, step: int, position: int, count: int, generation: int = 0) -> Task:
        hidden = self.service.service.hidden
        noise = torch.Generator().manual_seed(position)
        body = make_codec("fp32", "up").encode(torch.randn(count, hidden, generator=noise))
        offered = self.service.service
        opening = Opening(offered.model, [offered.part], hidden, ["fp32"], "")
        parts = [StepPart(0, [count], len(body))]
        message = Step(KEY, generation, 0, step, position, parts, 1, 0, 60_000)
        return Task(message, opening, body, 1, 0, 0, time.monotonic())

    def turn(self) -> None:
        for event in self.store.poll():
            self.service.on_store_event(event)
        self.service.run_batch()

    def turn_until(self, is_so: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + 20
        while not is_so():
            assert time.monotonic() < give_up_at
            self.turn()

    def compute(self, task: Task) -> tuple[Said, bytes]:
        before = len(self.answers.said)
        self.service.on_step(task)
        self.turn_until(lambda: len(self.answers.said) > before)
        return self.answers.said[-1]

    def commit_all(self) -> None:
        self.turn_until(self.service.is_settled)

    def kv_bytes(self) -> bytes:
        session = self.service._stages.find(self.task(0, 0, 1).session_key)
        return b"" if session is None else session.kv.read_bytes(0, session.kv.length)


@pytest.fixture
def first(demo_directory: Path, redis_server: EmbeddedRedis) -> Server:
    """Has computed and committed the session's rows."""
    redis.Redis.from_url(redis_server.url).flushall()
    server = Server(demo_directory, RedisKvStore(redis_server.url, timeout_s=10), "w1")
    server.compute(server.task(0, 0, ROWS))
    server.commit_all()
    return server


@pytest.fixture
def second(demo_directory: Path, redis_server: EmbeddedRedis) -> Server:
    return Server(demo_directory, RedisKvStore(redis_server.url, timeout_s=10), "w2")


def test_the_next_row_and_all_kv_are_the_same_to_the_last_bit(
    first: Server, second: Server
) -> None:
    task = first.task(1, ROWS, 1)
    reply, body = second.compute(task)
    assert isinstance(reply, StepReply)
    assert second.service.stats["rows_pulled"] == ROWS
    assert second.service.stats["bytes_pulled"] == ROWS * SEALED_ROW
    assert body == first.compute(task)[1]
    assert second.kv_bytes() == first.kv_bytes()


@pytest.mark.parametrize("row", [0, 5, CHUNK - 1, CHUNK])
def test_a_damaged_row_is_found_and_those_before_it_are_kept(
    first: Server, second: Server, redis_server: EmbeddedRedis, row: int
) -> None:
    task = first.task(1, ROWS, 1)
    chunk, index = divmod(row, CHUNK)
    raw = redis.Redis.from_url(redis_server.url)
    key = chunk_key(task.session_key, chunk)
    at = index * SEALED_ROW + 77
    (byte,) = raw.getrange(key, at, at)
    raw.setrange(key, at, bytes([byte ^ 1]))
    need, _ = second.compute(task)
    assert isinstance(need, Need)
    assert need.have == row
    assert second.kv_bytes() == first.kv_bytes()[: row * 2048]
    assert second.service.stats["rows_refused"] == 1


def test_of_a_session_without_its_last_chunk_the_others_are_kept(
    first: Server, second: Server, redis_server: EmbeddedRedis
) -> None:
    task = first.task(1, ROWS, 1)
    redis.Redis.from_url(redis_server.url).delete(chunk_key(task.session_key, 1))
    need, _ = second.compute(task)
    assert isinstance(need, Need)
    assert need.have == CHUNK
    assert second.kv_bytes() == first.kv_bytes()[: CHUNK * 2048]


class HeldStore(MemoryKvStore):
    """Hands loaded rows over when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Load] = []
        self.commits: list[Commit] = []

    def begin_commit(self, commit: Commit) -> None:
        self.commits.append(commit)
        super().begin_commit(commit)

    def begin_load(self, load: Load) -> None:
        self.held.append(load)

    def hand_over(self, load: Load, start: int, end: int) -> bool:
        """As a store does it; the memory is used again."""
        took: list[bool] = []

        def take(part: Part) -> bool:
            memory = bytearray(part.rows)
            assert load.take is not None
            view = memoryview(memory)
            took.append(load.take(dataclasses.replace(part, rows=view, end=load.end)))
            memory[:] = bytes(len(memory))
            return took[-1]

        super().begin_load(dataclasses.replace(load, start=start, end=end, take=take))
        self._events.clear()
        return took == [True]

    def finish(self, load: Load) -> None:
        self._events.append(Loaded(load.session_key, load.generation, load.start, b"", 0))


def test_loads_of_two_steps_of_a_session_bring_each_row_once(demo_directory: Path) -> None:
    store = HeldStore()
    first, second = (Server(demo_directory, store, name) for name in ("w1", "w2"))
    first.compute(first.task(0, 0, 100))
    first.commit_all()
    second.service.on_step(second.task(1, 100, 1))
    (load,) = store.held
    assert store.hand_over(load, 0, 40)
    second.service.on_step(second.task(2, 90, 1))  # the first one was overtaken
    assert second.answers.dropped == 1
    newer = store.held[1]
    assert (newer.start, newer.end) == (40, 90)
    assert store.hand_over(load, 40, 60)
    assert store.hand_over(newer, 40, 50)
    assert store.hand_over(newer, 50, 90)
    assert second.service.stats["rows_pulled"] == 90
    assert second.kv_bytes() == first.kv_bytes()[: 90 * 2048]
    assert not store.hand_over(load, 95, 100)  # beyond what is there
    store.finish(newer)
    second.turn()
    assert isinstance(second.answers.said[-1][0], StepReply)
    assert not store.hand_over(load, 91, 100)  # nobody waits for these


def test_rows_that_are_coming_are_not_committed(demo_directory: Path) -> None:
    """Half of what the store has would take the place of all of it."""
    store = HeldStore()
    first, second = (Server(demo_directory, store, name) for name in ("w1", "w2"))
    first.compute(first.task(0, 0, 100))
    first.commit_all()
    task = second.task(1, 100, 1)
    second.service.on_step(task)
    assert store.hand_over(store.held[0], 0, 40)
    session = second.service._stages.find(task.session_key)
    assert session is not None
    session.committed = 0  # as after a cut-back of an encrypted session
    before = len(store.commits)
    second.service.tidy()
    assert len(store.commits) == before


def test_a_session_that_ends_gives_its_slots_back(demo_directory: Path) -> None:
    server = Server(demo_directory, MemoryKvStore(), "w1")
    server.compute(server.task(0, 0, 100))
    server.commit_all()
    pool = server.service._pool
    assert pool is not None
    assert server.service.warm_bytes() == 128 * 2048
    assert pool._used == 2
    server.service.on_end(server.task(0, 0, 1).session_key)
    assert (server.service.warm_bytes(), pool._used) == (0, 0)


@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_rows_are_taken_in_order_until_they_are_not_wanted(
    redis_server: EmbeddedRedis, kind: str
) -> None:
    store: KvStore = MemoryKvStore() if kind == "memory" else RedisKvStore(redis_server.url)
    row_bytes = 1 << 18
    first = dataclasses.replace(new_session(commit_of(1)), row_bytes=row_bytes)
    sent = b""
    for start in range(0, 12, 4):
        part = rows(4, mark=start, row_bytes=row_bytes)
        sent += part
        piece = dataclasses.replace(
            first, start=start, end=start + 4, rows=part, continues=start > 0
        )
        run_commit(store, piece)
    for most in (99, 1):
        parts: list[tuple[int, bytes]] = []

        def take(part: Part, parts: list[tuple[int, bytes]] = parts, most: int = most) -> bool:
            assert part.end <= 12
            parts.append((part.start, bytes(part.rows)))
            return len(parts) < most

        store.begin_load(dataclasses.replace(load_of(first, 20, start=1), take=take))
        (event,) = wait(store)
        assert event == Loaded(first.session_key, 0, 1, b"", 0)
        ends = [start + len(body) // row_bytes for start, body in parts]
        assert [start for start, _ in parts] == [1, *ends[:-1]]
        if most > 1:
            assert b"".join(body for _, body in parts) == sent[row_bytes:]
        elif kind == "redis":
            assert ends == [4]
    store.close()


def test_a_server_that_forgot_the_scripts_is_connected_to_anew(
    redis_server: EmbeddedRedis,
) -> None:
    store = RedisKvStore(redis_server.url)
    commit = new_session(commit_of(3))
    run_commit(store, commit)
    redis.Redis.from_url(redis_server.url).script_flush()
    store.begin_load(load_of(commit, 3))
    assert wait(store) == [Loaded(commit.session_key, 0, 0, b"", 0)]
    give_up_at = time.monotonic() + 10
    while not store.is_up():
        assert time.monotonic() < give_up_at
    store.begin_load(load_of(commit, 3))
    assert wait(store) == [Loaded(commit.session_key, 0, 0, rows(3), 0)]
    store.close()
