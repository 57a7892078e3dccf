"""One edge's sessions take a bounded share of the store that all edges use."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable

import pytest
import redis
import torch
from pools import PROMPTS, record_of, reference_tokens
from test_store_contract import SERVERS, load_of, read, run_commit

from cloud_worker.state.memory_store import MemoryKvStore
from cloud_worker.state.redis_store import RedisKvStore, record_key
from cloud_worker.state.store import COUNTED_BYTES, Commit, CommitRefused, Committed, KvStore
from deploy.embedded_redis import EmbeddedRedis
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

ROW = COUNTED_BYTES // 4
SHARE = 3 * COUNTED_BYTES
NewStore = Callable[..., KvStore]


@pytest.fixture(params=["memory", "redis", "cluster"])
def new_store(request: pytest.FixtureRequest) -> NewStore:
    if request.param == "memory":
        return lambda: MemoryKvStore(SHARE)
    url = request.getfixturevalue(SERVERS[request.param]).url
    return lambda: RedisKvStore(url, share_bytes=SHARE)


def commit_of(count: int, account: str, step: int = 0, start: int = 0) -> Commit:
    """Rows of a new session; four are one counted piece."""
    return Commit(
        secrets.token_bytes(16), "shape", 0, 0, step, "w1", start, start + count, False,
        bytes(count * ROW), ROW, account,
    )  # fmt: skip


def next_of(commit: Commit, count: int) -> Commit:
    return dataclasses.replace(
        commit, step=commit.step + 1, start=commit.end, end=commit.end + count,
        rows=bytes(count * ROW),
    )  # fmt: skip


def over(commit: Commit, position: int) -> CommitRefused:
    return CommitRefused(commit.session_key, commit.generation, "over", position)


def done(commit: Commit) -> Committed:
    return Committed(commit.session_key, commit.generation, commit.end)


def new_account() -> str:
    return secrets.token_hex(8)


def test_an_account_has_its_share_and_no_more(new_store: NewStore) -> None:
    store, account = new_store(), new_account()
    first, second, third = (commit_of(count, account) for count in (4, 7, 1))
    other = commit_of(4, new_account())
    assert [run_commit(store, commit) for commit in (first, second)] == [done(first), done(second)]
    assert run_commit(store, third) == over(third, 0)
    assert read(store, load_of(third, 1)) == b""
    assert run_commit(store, other) == done(other)
    assert run_commit(store, next_of(second, 1)) == done(next_of(second, 1))  # counted already
    assert run_commit(store, next_of(first, 1)) == over(first, 4)
    assert read(store, load_of(first, 9)) == first.rows  # what was there is there
    store.close()


def test_what_is_deleted_leaves_the_share(new_store: NewStore) -> None:
    store, account = new_store(), new_account()
    first, second = commit_of(8, account), commit_of(8, account)
    run_commit(store, first)
    assert run_commit(store, second) == over(second, 0)
    store.begin_delete(first.session_key)
    store.begin_delete(first.session_key)  # brokers tell every worker
    assert run_commit(store, second) == done(second)
    store.close()


def test_a_session_that_is_cut_back_counts_for_what_it_had(new_store: NewStore) -> None:
    """Its chunks are still there."""
    store, account = new_store(), new_account()
    first, second = commit_of(12, account), commit_of(1, account)
    run_commit(store, first)
    back = dataclasses.replace(first, generation=1, fork=1, start=1, end=2, rows=bytes(ROW))
    assert run_commit(store, back) == done(back)
    assert run_commit(store, second) == over(second, 0)
    store.close()


def test_sessions_without_an_account_are_not_bounded(new_store: NewStore) -> None:
    store = new_store()
    for _ in range(5):
        commit = commit_of(8, "")
        assert run_commit(store, commit) == done(commit)
    store.close()


def run_until_done(store: RedisKvStore, commit: Commit, timeout_s: float = 10.0) -> None:
    give_up_at = time.monotonic() + timeout_s
    while (event := run_commit(store, commit)) != done(commit):
        assert event == over(commit, 0)
        assert time.monotonic() < give_up_at


@pytest.mark.parametrize("loss", ["expired", "evicted", "flushed", "account lost"])
def test_the_count_heals_whatever_becomes_of_the_keys(
    redis_server: EmbeddedRedis, loss: str
) -> None:
    store = RedisKvStore(redis_server.url, ttl_s=0.5, share_bytes=SHARE)
    raw, account = redis.Redis.from_url(redis_server.url), new_account()
    first, second = commit_of(8, account), commit_of(8, account)
    run_commit(store, first)
    assert run_commit(store, second) == over(second, 0)
    if loss == "evicted":
        raw.delete(record_key(first.session_key))
    elif loss == "flushed":
        raw.flushall()
    elif loss == "account lost":
        raw.delete(*raw.keys("midspan:account:*"))  # type: ignore[misc]
        assert run_commit(store, next_of(first, 1)) == done(next_of(first, 1))  # counts anew
        assert run_commit(store, second) == over(second, 0)
    run_until_done(store, second)
    if loss == "flushed":
        assert run_commit(store, first) == over(first, 0)
    store.close()


def use(store: RedisKvStore, session: Commit) -> Commit:
    """Cut a session back by its last row and compute that again; what it is then."""
    new = session.generation + 1
    start = session.end - 1
    changes = {"generation": new, "fork": start, "start": start, "rows": bytes(ROW), "step": new}
    session = dataclasses.replace(session, **changes)  # type: ignore[arg-type]
    assert run_commit(store, session) == done(session)
    return session


def test_a_session_that_is_in_use_counts_beyond_its_time_to_live(
    redis_server: EmbeddedRedis,
) -> None:
    store = RedisKvStore(redis_server.url, ttl_s=0.4, share_bytes=SHARE)
    account = new_account()
    used, second = commit_of(8, account), commit_of(8, account)
    run_commit(store, used)
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        used = use(store, used)
        assert run_commit(store, second) == over(second, 0)
    store.close()


def test_an_abandoned_session_expires_beside_one_that_is_in_use(
    redis_server: EmbeddedRedis,
) -> None:
    store = RedisKvStore(redis_server.url, ttl_s=0.4, share_bytes=SHARE)
    account = new_account()
    used, abandoned, second = (commit_of(count, account) for count in (4, 8, 8))
    run_commit(store, used)
    run_commit(store, abandoned)
    give_up_at = time.monotonic() + 10
    while (event := run_commit(store, second)) != done(second):
        assert event == over(second, 0)
        assert time.monotonic() < give_up_at
        used = use(store, used)
    assert run_commit(store, commit_of(1, account)).code == "over"  # type: ignore[union-attr]
    store.close()


def test_an_edge_with_too_much_is_recomputed_and_others_are_not(
    demo_ends: ModelEnds, whole_model: torch.nn.Module
) -> None:
    """Four sessions of 668 KB in a store with 1 MB for each edge: one of them fits."""
    tokenizer = TextTokenizer(demo_ends.directory)
    prompts = [" ".join(PROMPTS[at:] + PROMPTS[:at]) for at in range(5)]
    references = reference_tokens(whole_model, tokenizer, prompts, 6)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    with LocalPool(PoolSettings(workers=1, worker_options=["--edge-store-mb", "1"])) as pool:
        greedy, modest = pool.connect(), pool.connect()
        sessions = [Session(demo_ends, greedy, uniform_settings("fp32")) for _ in range(4)]
        sessions.append(Session(demo_ends, modest, uniform_settings("fp32")))
        streams = [
            session.generate(prompt_ids, 6, SamplingSettings())
            for session, prompt_ids in zip(sessions, ids, strict=True)
        ]
        tokens = [[next(stream), next(stream)] for stream in streams]
        wait_for_commits(pool, sessions[-1], len(ids[-1]) + 1)
        wait_until_refused(pool, 3)
        kept = redis.Redis.from_url(pool.redis_url).keys("*:kv:*")
        pool.kill_worker("w1")
        pool.start_worker()
        pool.wait_for_workers(1)
        for stream, begun in zip(streams, tokens, strict=True):
            begun += list(stream)
        greedy.close()
        modest.close()
    assert tokens == references
    replayed = [session.stats.rows_replayed for session in sessions]
    assert [rows > 0 for rows in replayed] == [False, True, True, True, False]
    # those that fit, and perhaps the first pieces of another prompt
    assert len(kept) in (2, 3)  # type: ignore[arg-type]


def wait_until_refused(pool: LocalPool, commits: int) -> None:
    """Until the worker has announced that it could not store so many pieces."""
    client = pool.connect()
    give_up_at = time.monotonic() + 10
    while client.status()["workers"][0]["stats"]["commits_over_share"] < commits:
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    client.close()


def wait_for_commits(pool: LocalPool, session: Session, rows: int) -> None:
    raw = redis.Redis.from_url(pool.redis_url)
    give_up_at = time.monotonic() + 10
    while int(raw.hget(record_of(session), "position") or 0) < rows:  # type: ignore[arg-type]
        assert time.monotonic() < give_up_at
        time.sleep(0.01)
