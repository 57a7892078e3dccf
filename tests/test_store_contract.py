"""What every KvStore must hold, run against the one in memory and the one in a real Redis."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterator

import pytest
import redis

from cloud_worker.state.memory_store import MemoryKvStore
from cloud_worker.state.redis_store import RedisKvStore, chunk_key, record_key
from cloud_worker.state.store import (
    CHUNK_BYTES,
    Commit,
    CommitFailed,
    CommitRefused,
    Committed,
    KvStore,
    Load,
    Loaded,
    StoreEvent,
)
from common.errors import SettingsError, StoreUnavailable
from deploy.embedded_redis import EmbeddedRedis

ROW = 16  # bytes
SHAPE = "model 2-6 float32 16"

SERVERS = {"redis": "redis_server", "cluster": "redis_cluster"}  # fixtures


@pytest.fixture(params=["memory", "redis", "cluster"])
def store(request: pytest.FixtureRequest) -> Iterator[KvStore]:
    if request.param == "memory":
        opened: KvStore = MemoryKvStore()
    else:
        opened = RedisKvStore(request.getfixturevalue(SERVERS[request.param]).url)
    yield opened
    opened.close()


def wait(store: KvStore, count: int = 1) -> list[StoreEvent]:
    """The next `count` events."""
    events: list[StoreEvent] = []
    give_up_at = time.monotonic() + 10
    while len(events) < count:
        assert time.monotonic() < give_up_at, events
        events += store.poll()
    return events


def rows(count: int, mark: int = 1, row_bytes: int = ROW) -> bytes:
    return b"".join(bytes([mark, i % 256]) + b"r" * (row_bytes - 2) for i in range(count))


def commit_of(count: int, mark: int = 1, start: int = 0, step: int = 0) -> Commit:
    return Commit(
        b"s" * 16, SHAPE, 0, 0, step, "w1", start, start + count, False, rows(count, mark), ROW
    )


def new_session(commit: Commit) -> Commit:
    return dataclasses.replace(commit, session_key=secrets.token_bytes(16))


def load_of(commit: Commit, end: int, start: int = 0) -> Load:
    return Load(
        commit.session_key, commit.shape, commit.generation, commit.fork, start, end,
        commit.row_bytes,
    )  # fmt: skip


def run_commit(store: KvStore, commit: Commit) -> StoreEvent:
    store.begin_commit(commit)
    return wait(store)[0]


def read(store: KvStore, load: Load) -> bytes:
    store.begin_load(load)
    (event,) = wait(store)
    assert isinstance(event, Loaded)
    assert (event.session_key, event.start) == (load.session_key, load.start)
    return event.rows


def test_what_was_committed_is_loaded(store: KvStore) -> None:
    commit = new_session(commit_of(5))
    assert run_commit(store, commit) == Committed(commit.session_key, 0, 5)
    assert read(store, load_of(commit, 5)) == rows(5)
    assert read(store, load_of(commit, 4, start=2)) == rows(5)[2 * ROW : 4 * ROW]


def test_a_load_beyond_what_is_there_gives_what_is_there(store: KvStore) -> None:
    commit = new_session(commit_of(3))
    run_commit(store, commit)
    assert read(store, load_of(commit, 9)) == rows(3)


def test_an_unknown_session_is_a_miss(store: KvStore) -> None:
    assert read(store, load_of(new_session(commit_of(1)), 5)) == b""


def test_another_shape_is_a_miss_and_never_an_answer(store: KvStore) -> None:
    commit = new_session(commit_of(3))
    run_commit(store, commit)
    other = dataclasses.replace(load_of(commit, 3), shape="model 2-6 float16 16")
    assert read(store, other) == b""


def test_rows_are_appended_step_by_step(store: KvStore) -> None:
    first = new_session(commit_of(3))
    run_commit(store, first)
    second = dataclasses.replace(
        commit_of(1, mark=2, start=3, step=1), session_key=first.session_key
    )
    assert run_commit(store, second) == Committed(first.session_key, 0, 4)
    assert read(store, load_of(first, 4)) == rows(3) + rows(1, mark=2)


def test_a_repeated_step_is_committed_already_and_writes_nothing(store: KvStore) -> None:
    commit = new_session(commit_of(3))
    run_commit(store, commit)
    again = dataclasses.replace(commit, rows=rows(3, mark=9), writer="w2")
    assert run_commit(store, again) == Committed(commit.session_key, 0, 3)
    assert read(store, load_of(commit, 3)) == rows(3)


def test_an_older_step_is_stale(store: KvStore) -> None:
    commit = new_session(commit_of(3, step=5))
    run_commit(store, commit)
    older = dataclasses.replace(commit, step=4, rows=rows(3, mark=9))
    assert run_commit(store, older) == CommitRefused(commit.session_key, 0, "stale", 3)
    assert read(store, load_of(commit, 3)) == rows(3)


def test_an_older_generation_is_stale(store: KvStore) -> None:
    commit = dataclasses.replace(new_session(commit_of(3)), generation=2)
    run_commit(store, commit)
    older = dataclasses.replace(commit, generation=1, step=99, rows=rows(3, mark=9))
    assert run_commit(store, older) == CommitRefused(commit.session_key, 1, "stale", 3)
    assert read(store, load_of(commit, 3)) == rows(3)


def test_rows_beyond_a_gap_are_refused(store: KvStore) -> None:
    commit = new_session(commit_of(2, start=3))
    assert run_commit(store, commit) == CommitRefused(commit.session_key, 0, "gap", 0)
    assert read(store, load_of(commit, 5)) == b""


def test_a_cut_back_keeps_what_the_generations_share(store: KvStore) -> None:
    commit = new_session(commit_of(6))
    run_commit(store, commit)
    fork = dataclasses.replace(
        commit, generation=1, fork=4, step=1, start=4, end=5, rows=rows(1, mark=7)
    )
    before = dataclasses.replace(load_of(commit, 6), generation=1, fork=4)
    assert read(store, before) == rows(6)[: 4 * ROW]
    assert run_commit(store, fork) == Committed(commit.session_key, 1, 5)
    assert read(store, dataclasses.replace(before, end=9)) == rows(6)[: 4 * ROW] + rows(1, mark=7)


def test_a_commit_beyond_the_fork_is_a_gap(store: KvStore) -> None:
    commit = new_session(commit_of(6))
    run_commit(store, commit)
    beyond = dataclasses.replace(commit, generation=1, fork=4, step=1, start=5, end=6, rows=rows(1))
    assert run_commit(store, beyond) == CommitRefused(commit.session_key, 1, "gap", 4)


def test_a_generation_two_later_shares_nothing(store: KvStore) -> None:
    commit = new_session(commit_of(6))
    run_commit(store, commit)
    assert read(store, dataclasses.replace(load_of(commit, 6), generation=2, fork=4)) == b""


def test_the_pieces_of_one_step_come_from_one_writer(store: KvStore) -> None:
    first = new_session(commit_of(2))
    run_commit(store, first)
    other = dataclasses.replace(first, writer="w2", end=1, rows=rows(1, mark=8))
    longer = dataclasses.replace(first, writer="w2", end=3, rows=rows(3, mark=8))
    assert run_commit(store, other) == Committed(first.session_key, 0, 2)  # there already
    assert run_commit(store, longer) == Committed(first.session_key, 0, 3)  # begun anew by w2
    late = dataclasses.replace(first, start=2, end=5, continues=True, rows=rows(3, mark=1))
    assert run_commit(store, late) == CommitRefused(first.session_key, 0, "stale", 3)
    assert read(store, load_of(first, 9)) == rows(3, mark=8)


def test_a_deleted_session_is_gone(store: KvStore) -> None:
    commit = new_session(commit_of(3))
    run_commit(store, commit)
    store.begin_delete(commit.session_key)
    assert read(store, load_of(commit, 3)) == b""


def test_rows_of_many_chunks_come_back_in_order(store: KvStore) -> None:
    row_bytes = CHUNK_BYTES // 4
    first = dataclasses.replace(new_session(commit_of(1)), row_bytes=row_bytes)
    sent = b""
    for start in range(0, 11, 4):  # three chunks of four rows, the last one not full
        count = min(4, 11 - start)
        part = rows(count, mark=start, row_bytes=row_bytes)
        sent += part
        run_commit(
            store,
            dataclasses.replace(
                first, start=start, end=start + count, rows=part, continues=start > 0
            ),
        )
    assert read(store, load_of(first, 11)) == sent
    assert read(store, load_of(first, 10, start=3)) == sent[3 * row_bytes : 10 * row_bytes]


def test_every_key_expires_and_shares_the_sessions_hash_tag(redis_server: EmbeddedRedis) -> None:
    store = RedisKvStore(redis_server.url, ttl_s=100)
    commit = new_session(commit_of(3))
    run_commit(store, commit)
    client = redis.Redis.from_url(redis_server.url)
    home = record_key(commit.session_key).removesuffix("record").encode()
    keys = [key for key in client.scan_iter() if key.startswith(home)]
    assert len(keys) == 2
    for key in keys:
        assert b"{" in home
        assert b"}" in home
        assert 0 < client.pttl(key) <= 100_000
    store.close()


def test_a_missing_chunk_is_a_miss(redis_server: EmbeddedRedis) -> None:
    store = RedisKvStore(redis_server.url)
    commit = new_session(commit_of(3))
    run_commit(store, commit)
    redis.Redis.from_url(redis_server.url).delete(chunk_key(commit.session_key, 0))
    assert read(store, load_of(commit, 3)) == b""
    store.close()


def test_out_of_memory_means_not_committed(redis_server: EmbeddedRedis) -> None:
    store = RedisKvStore(redis_server.url)
    client = redis.Redis.from_url(redis_server.url)
    client.config_set("maxmemory", 1)
    try:
        event = run_commit(store, new_session(commit_of(3)))
        assert isinstance(event, CommitFailed)
        assert "OOM" in event.reason or "memory" in event.reason
    finally:
        client.config_set("maxmemory", 0)
    assert isinstance(run_commit(store, new_session(commit_of(3))), Committed)
    store.close()


def test_a_redis_that_dies_fails_what_is_pending_and_is_found_again(
    redis_server: EmbeddedRedis,
) -> None:
    store = RedisKvStore(redis_server.url)
    redis_server.child.kill()
    assert isinstance(run_commit(store, new_session(commit_of(3))), CommitFailed)
    assert read(store, load_of(new_session(commit_of(1)), 3)) == b""
    assert not store.is_up()
    redis_server.restart()
    give_up_at = time.monotonic() + 10
    while not store.is_up():
        assert time.monotonic() < give_up_at
    assert isinstance(run_commit(store, new_session(commit_of(3))), Committed)
    store.close()


def test_a_redis_that_stalls_is_given_up_after_the_timeout(redis_server: EmbeddedRedis) -> None:
    import signal

    store = RedisKvStore(redis_server.url, timeout_s=0.1)
    redis_server.child.signal(signal.SIGSTOP)
    try:
        assert isinstance(run_commit(store, new_session(commit_of(3))), CommitFailed)
    finally:
        redis_server.child.signal(signal.SIGCONT)
    store.close()


def test_a_redis_that_is_not_there_is_said_without_its_password() -> None:
    with pytest.raises(StoreUnavailable, match=r"redis://127\.0\.0\.1:1/0 cannot be") as caught:
        RedisKvStore("redis://:secret@127.0.0.1:1/0")
    assert "secret" not in str(caught.value)


def test_a_bad_redis_url_is_named() -> None:
    with pytest.raises(SettingsError, match="--redis-url localhost is no Redis URL"):
        RedisKvStore("localhost")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://[::1", "is no URL"),
        ("redis://127.0.0.1:1,[::1", "is no URL"),
        ("redis://127.0.0.1:1,,127.0.0.1:2", "has nothing between two commas"),
        ("redis://,", "has nothing between two commas"),
        ("redis://127.0.0.1:x", "is no Redis URL"),
        ("redis://127.0.0.1:1/0?x=y", "is no Redis URL"),
    ],
)
@pytest.mark.parametrize("must_answer", [True, False])
def test_a_url_that_is_none_is_named(url: str, words: str, must_answer: bool) -> None:
    with pytest.raises(SettingsError, match=f"--redis-url .* {words}"):
        RedisKvStore(url, must_answer=must_answer)


@pytest.mark.parametrize(
    "url",
    [
        "rdis://:hunter2@h/0",
        "redis://u:hunter2@127.0.0.1:1",
        "redis://127.0.0.1:1?password=hunter2",
    ],
)
def test_no_message_has_the_password(url: str) -> None:
    with pytest.raises((SettingsError, StoreUnavailable)) as caught:
        RedisKvStore(url)
    assert "hunter2" not in str(caught.value)
