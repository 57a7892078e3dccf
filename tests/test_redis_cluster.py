"""KV in a real Redis Cluster: its nodes die, slots move, and nobody notices."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pools import PROMPTS, record_of, reference_tokens
from redis_cluster import Node, RedisCluster
from test_failovers import HARM_AT, NEW_TOKENS, SESSIONS, generate_all
from test_store_contract import commit_of, load_of, new_session, read, rows, run_commit
from waiting import wait_until

from cloud_worker.state.redis_cluster import read_view, split_addresses
from cloud_worker.state.redis_store import RedisKvStore, record_key
from cloud_worker.state.store import CommitFailed, Committed, StoreEvent
from common.errors import SettingsError
from deploy.embedded_redis import EmbeddedRedis, choose_port
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session import Session
from edge_agent.text.tokenizer import TextTokenizer

MOVING = b"m" * 16


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RedisCluster]:
    """One of its own, for what harms it."""
    cluster = RedisCluster(tmp_path)
    yield cluster
    cluster.close()


def position_of(cluster: RedisCluster, session: Session) -> int:
    key = record_of(session)
    return int(cluster.master_of(key).client.hget(key, "position") or 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "with_kill",
    [
        pytest.param(False, marks=pytest.mark.long, id="alone"),
        pytest.param(True, id="and a worker dies"),
    ],
)
def test_a_node_is_killed_under_load_and_another_takes_its_place(
    demo_ends: ModelEnds, whole_model: torch.nn.Module, cluster: RedisCluster, with_kill: bool
) -> None:
    tokenizer = TextTokenizer(demo_ends.directory)
    want = reference_tokens(whole_model, tokenizer, PROMPTS[:SESSIONS], NEW_TOKENS)
    lost: list[Node] = []
    caught_up: list[bool] = []

    with LocalPool(PoolSettings(workers=2, redis_url=cluster.url)) as pool:

        def harm(count: int, session: Session) -> None:
            if count == HARM_AT:
                wait_until(lambda: position_of(cluster, session) > 0)
                lost.append(cluster.master_of(record_of(session)))
                lost[0].child.kill()
                if with_kill:
                    pool.kill_worker("w1")
            if count == NEW_TOKENS - 1:  # all of it is at the new master, lost rows again
                cluster.wait_until_healthy()
                assert cluster.master_of(record_of(session)) is not lost[0]
                rows = session.stats.prompt_tokens + NEW_TOKENS - 2
                wait_until(lambda: position_of(cluster, session) >= rows)
                caught_up.append(True)

        prompts = [tokenizer.encode(prompt) for prompt in PROMPTS[:SESSIONS]]
        tokens, _ = generate_all([pool.edge_endpoint], demo_ends, prompts, harm)
        counts = [len(node.client.keys()) for node in cluster.nodes if node is not lost[0]]  # type: ignore[arg-type]
    assert tokens == want
    assert all(counts)  # the sessions lie on all of them
    assert caught_up == [True]


def keep_committing(store: RedisKvStore, step: int) -> StoreEvent:
    """A row more of a session, until it is there."""
    give_up_at = time.monotonic() + 20
    commit = dataclasses.replace(commit_of(1, start=step, step=step), session_key=MOVING)
    while isinstance(event := run_commit(store, commit), CommitFailed):
        assert time.monotonic() < give_up_at, event
        time.sleep(0.02)
    return event


def test_a_slot_that_moves_to_another_master_is_found_there(redis_cluster: RedisCluster) -> None:
    store = RedisKvStore(redis_cluster.url)
    keep_committing(store, 0)
    key = MOVING
    before = redis_cluster.master_of(record_key(key))
    after = next(node for node in redis_cluster.nodes[:3] if node is not before)
    redis_cluster.move_slot_of(record_key(key), after)
    assert redis_cluster.master_of(record_key(key)) is after
    assert keep_committing(store, 1).code == "gap"  # type: ignore[union-attr]  # it came empty
    assert isinstance(keep_committing(store, 0), Committed)
    assert read(store, load_of(dataclasses.replace(commit_of(1), session_key=MOVING), 1)) == rows(1)
    store.close()


def test_a_worker_that_came_before_its_cluster_finds_it(redis_cluster: RedisCluster) -> None:
    node = redis_cluster.nodes[-1]
    node.child.kill()
    store = RedisKvStore(node.url, must_answer=False)
    try:
        assert not store.is_up()
        node.start()
        assert isinstance(keep_committing(store, 0), Committed)
    finally:
        redis_cluster.wait_until_healthy()
        store.close()


def test_one_address_of_a_cluster_is_enough(redis_cluster: RedisCluster) -> None:
    store, other = RedisKvStore(redis_cluster.nodes[3].url), RedisKvStore(redis_cluster.url)
    commits = [new_session(commit_of(3)) for _ in range(12)]
    assert all(isinstance(run_commit(store, commit), Committed) for commit in commits)
    assert all(read(other, load_of(commit, 3)) == commit.rows for commit in commits)
    assert store.identity == other.identity != ""
    assert store.eviction_policy == "noeviction"
    store.close()
    other.close()


def test_several_addresses_that_are_no_clusters_are_refused(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path, port := choose_port(0))
    try:
        with pytest.raises(SettingsError, match=f"has 2 addresses.*; .*:{port}/0 is no cluster's"):
            RedisKvStore(f"redis://127.0.0.1:{port},127.0.0.1:1/0")
    finally:
        server.stop()


def test_every_address_has_the_password_and_a_node_may_not_know_its_host() -> None:
    assert split_addresses("rediss://u:p@a:1,b:2/0?x=y") == [
        "rediss://u:p@a:1/0?x=y", "rediss://u:p@b:2/0?x=y",
    ]  # fmt: skip
    answer = [[0, 16383, [b"", 7, b"id2"], [b"fe80::1", 8, b"id1"]]]
    view = read_view("rediss://u:p@a:1/0", answer)
    assert view.master_of(5) == "rediss://u:p@a:7/0"
    assert view.nodes == {"rediss://u:p@a:7/0", "rediss://u:p@[fe80::1]:8/0"}
    assert view.identity == "id1"
