"""A pool with keys lets no stranger in, and keeps its own apart. Real processes, real CURVE."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import zmq
from forks import run_midspan
from pools import PROMPTS, generate, record_of

from cloud_worker.state.redis_link import read_script
from cloud_worker.state.redis_store import RedisKvStore
from cloud_worker.state.store import COUNTED_BYTES, Commit, CommitFailed, Committed, Load, Loaded
from common.errors import BrokerUnavailable, StepRefused
from common.protocol.messages import (
    Announce,
    EndSession,
    NotJoined,
    Opening,
    Part,
    Service,
    Step,
    StepReply,
)
from common.protocol.sockets import connect_dealer
from common.protocol.wire import decode_header, encode_header
from common.security.keys import (
    BROKER,
    ClientKeys,
    KeyPair,
    authorize,
    create_key,
    ensure_member,
    read_public,
)
from deploy.child import Child, midspan_command
from deploy.embedded_redis import EmbeddedRedis
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.text.ends import ModelEnds
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPool]:
    directory = tmp_path_factory.mktemp("keys")
    pool_key = create_key(directory, "pool").with_suffix(".key_secret")
    settings = PoolSettings(workers=2, keys=directory, worker_options=["--pool-key", str(pool_key)])
    with LocalPool(settings) as running:
        yield running


@pytest.fixture(scope="module")
def prompt_ids(demo_ends: ModelEnds) -> list[int]:
    return TextTokenizer(demo_ends.directory).encode(PROMPTS[0])


def keys_of(pool: LocalPool) -> Path:
    assert pool.settings.keys is not None
    return pool.settings.keys


def member(pool: LocalPool, name: str, role: str = "edge") -> ClientKeys:
    return ensure_member(keys_of(pool), name, role)


def stranger(pool: LocalPool) -> ClientKeys:
    return ClientKeys(
        KeyPair(*zmq.curve_keypair()), read_public(str(keys_of(pool) / f"{BROKER}.key"))
    )


def status(pool: LocalPool) -> dict[str, Any]:
    client = pool.connect()
    try:
        return client.status()
    finally:
        client.close()


def log_of(pool: LocalPool) -> str:
    assert pool.broker is not None
    return pool.broker.log_text()


def wait_for_count(pool: LocalPool, name: str, before: int) -> None:
    give_up_at = time.monotonic() + 5
    while status(pool)["counters"][name] <= before:
        assert time.monotonic() < give_up_at, f"{name} was not counted"
        time.sleep(0.05)


def test_an_authorized_edge_is_served(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int]
) -> None:
    assert len(generate(pool, demo_ends, prompt_ids, 5)[0]) == 5


@pytest.mark.parametrize("has_key", [True, False])
def test_an_unauthorized_edge_is_refused_logged_and_counted(pool: LocalPool, has_key: bool) -> None:
    before = status(pool)["refused_connections"].get("edge", 0)
    keys = stranger(pool) if has_key else None
    client = BrokerClient([pool.edge_endpoint], keys=keys)
    words = "refused this edge's key" if has_key else "wants --key and --broker-key"
    with pytest.raises(BrokerUnavailable, match=words):
        client.status()
    client.close()
    if has_key:
        assert status(pool)["refused_connections"]["edge"] > before
        assert f"refused the edge with key {keys.own.public.decode()}" in log_of(pool)


def test_an_edges_key_does_not_make_a_worker(pool: LocalPool) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = connect_dealer(context, pool.worker_endpoint, member(pool, "phone"))
    time.sleep(0.5)
    with pytest.raises(zmq.Again):
        socket.send(b"x", zmq.NOBLOCK)
    context.destroy(linger=0)
    assert status(pool)["refused_connections"]["worker"] > 0


def test_another_edges_session_is_neither_written_nor_ended_nor_read(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int]
) -> None:
    before = status(pool)["counters"]["foreign_sessions"]
    thief = BrokerClient([pool.edge_endpoint], keys=member(pool, "thief"))

    def steal(index: int, session: Session) -> None:
        if index != 3:
            return
        body = bytes(demo_ends.hidden * 4)
        span = str(demo_ends.cut.middle)
        opening = Opening(demo_ends.fingerprint, [span], demo_ends.hidden, ["fp32"], "")
        part = Part(0, [1], len(body))
        step = Step(session.session_id, 0, 0, 1000, session.stats.prompt_tokens, [part], 1, 0, 9000)
        with pytest.raises(StepRefused, match="the session belongs to another edge"):
            thief.ask(step, body, opening, is_known=False, wait_for_worker=False)
        thief.end_session(session.session_id)

    undisturbed, _ = generate(pool, demo_ends, prompt_ids, 8)
    tokens, session = generate(pool, demo_ends, prompt_ids, 8, on_token=steal)
    thief.close()
    assert tokens == undisturbed
    assert session.stats.rows_replayed == 0
    assert status(pool)["counters"]["foreign_sessions"] >= before + 2
    assert "named a session of another edge: refused" in log_of(pool)


def test_an_id_of_another_edge_opens_nothing_after_a_restart_of_the_broker(
    pool: LocalPool,
    demo_ends: ModelEnds,
    prompt_ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The broker has forgotten whose the session is; workers and Redis know by the key."""
    thief = BrokerClient([pool.edge_endpoint], keys=member(pool, "thief"))
    client = pool.connect()
    victim = Session(demo_ends, client, uniform_settings("fp32"))
    tokens = victim.generate(prompt_ids, 8, SamplingSettings())
    first = [next(tokens) for _ in range(3)]
    assert pool.broker is not None
    pool.broker.kill()
    pool.start_broker()
    pool.wait_for_workers(2)
    with monkeypatch.context() as stolen:
        stolen.setattr(secrets, "token_bytes", lambda _: victim.session_id)
        robber = Session(demo_ends, thief, uniform_settings("fp32"))
    assert robber.session_id == victim.session_id
    robbed = robber.generate(prompt_ids, 3, SamplingSettings(), keep_open=True)
    assert list(robbed) == first  # its own, computed from nothing
    thief.close()
    assert robber.stats.rows_replayed == 0
    tokens.close()
    client.close()


def test_a_worker_with_anothers_id_is_refused_logged_and_counted(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int]
) -> None:
    before = status(pool)["counters"]["forged_workers"]
    name = next(iter(pool.workers))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    forger = connect_dealer(context, pool.worker_endpoint, member(pool, "forger", "worker"))
    span = str(demo_ends.cut.middle)
    service = Service(demo_ends.fingerprint, "stories", span, demo_ends.hidden)
    forged = [
        Announce(name, [service], 64, 100),
        StepReply(b"s" * 16, 0, 0, 1, 0, 0, name, 0, 0),
    ]
    for message in forged:
        forger.send(encode_header(message))
    wait_for_count(pool, "forged_workers", before + 1)
    assert len(generate(pool, demo_ends, prompt_ids, 5)[0]) == 5
    while forger.poll(0):
        told = decode_header(forger.recv_multipart()[0])
        assert isinstance(told, NotJoined), "the forger was given a step"
    context.destroy(linger=0)
    assert f"claims to be worker {name}, which it is not" in log_of(pool)


def test_an_edge_may_not_say_whose_session_it_ends(pool: LocalPool) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    edge = connect_dealer(context, pool.edge_endpoint, member(pool, "phone"))
    edge.send(encode_header(EndSession(b"s" * 16, "somebody")))
    context.destroy(linger=500)
    pool.check()


def test_a_key_that_is_revoked_loses_its_connections_and_one_that_is_new_does_not(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int]
) -> None:
    where = ["--keys", str(keys_of(pool)), "--as", "edge"]
    leaving = BrokerClient([pool.edge_endpoint], 20, member(pool, "leaving"))
    stream = Session(demo_ends, leaving, uniform_settings("fp32")).generate(
        prompt_ids, 60, SamplingSettings()
    )
    assert len([next(stream) for _ in range(3)]) == 3
    ended = status(pool)["ended_connections"]
    assert "is not admitted any more" in run_midspan("keys", "revoke", "leaving", *where).stdout
    give_up_at = time.monotonic() + 5
    while status(pool)["ended_connections"] == ended:
        assert time.monotonic() < give_up_at
    for name in ("early", "bird"):  # each connects before the broker has looked at the keys again
        client = BrokerClient([pool.edge_endpoint], 20, member(pool, name))
        assert len(client.status()["workers"]) == 2
        time.sleep(0.2)
        assert len(client.status()["workers"]) == 2
        client.close()
    assert status(pool)["ended_connections"] == ended + 1
    stream.close()
    leaving.close()
    line = run_midspan("keys", "revoke", "leaving", *where).stderr
    assert "no edge is authorized as 'leaving'; those are: " in line


def test_kv_at_rest_is_encrypted_and_any_worker_takes_over(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int]
) -> None:
    pool_key = read_public(str(keys_of(pool) / "pool.key"))
    plain, _ = generate(pool, demo_ends, prompt_ids, 12)
    client = pool.connect()
    session = Session(demo_ends, client, uniform_settings("fp32"), pool_key=pool_key)
    tokens = []
    for token in session.generate(prompt_ids, 12, SamplingSettings()):
        tokens.append(token)
        if len(tokens) == 6:
            time.sleep(0.3)
            assert pool.client_keys is not None
            owner = pool.client_keys.own.public.decode()
            server = redis.Redis.from_url(pool.redis_url)
            shape = server.hget(record_of(session, owner), "shape")
            assert shape.endswith(b" encrypted")
            pool.kill_worker(session.last_worker_id)
            pool.start_worker()
    client.close()
    pool.wait_for_workers(2)
    assert tokens == plain
    assert session.stats.rows_replayed == 0
    assert len(session.stats.tokens_by_worker) == 2


def test_encryption_with_another_pool_key_is_refused_with_the_reason(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int]
) -> None:
    client = pool.connect()
    other = zmq.curve_keypair()[0]
    session = Session(demo_ends, client, uniform_settings("fp32"), pool_key=other)
    with pytest.raises(StepRefused, match="does not open with this worker's --pool-key"):
        list(session.generate(prompt_ids, 2, SamplingSettings()))
    client.close()


def test_the_check_goes_through_the_whole_path(pool: LocalPool) -> None:
    keys = keys_of(pool)
    options = [
        "--broker", pool.edge_endpoint, "--key", str(keys / "local-edge.key_secret"),
        "--broker-key", str(keys / "broker.key"), "--json",
    ]  # fmt: skip
    done = run_midspan("status", "--check", *options)
    (check,) = json.loads(done.stdout)["checks"]
    assert done.returncode == 0
    assert (check["failure"], check["stored"]) == ("", True)


def test_a_worker_commits_only_to_sessions_that_it_was_given(tmp_path: Path) -> None:
    """It may see the names of Redis's keys, but not the session keys that they are made from."""
    server = EmbeddedRedis(tmp_path)
    try:
        owner, thief = RedisKvStore(server.url), RedisKvStore(server.url)
        key, rows = secrets.token_bytes(16), bytes(8)
        commit = Commit(key, "shape", 0, 0, 0, "w1", 0, 1, False, rows, 8)
        owner.begin_commit(commit)
        wait(owner)
        (name,) = redis.Redis.from_url(server.url).keys("*record")
        for script, tail in (("commit", [1, 1]), ("load", [0, 7]), ("delete", [])):
            arguments = ["x"] * 11 if script == "commit" else tail
            with pytest.raises(redis.ResponseError, match="was not given to the caller"):
                redis.Redis.from_url(server.url).evalsha(
                    hashlib.sha1(read_script(script)).hexdigest(), 1, name, *arguments, b"guess"
                )
        thief.begin_load(Load(b"g" * 16, "shape", 0, 0, 0, 1, 8))
        assert wait(thief).rows == b""
        owner.begin_load(Load(key, "shape", 0, 0, 0, 1, 8))
        assert wait(owner).rows == rows
    finally:
        server.stop()


def wait(store: RedisKvStore) -> Any:
    give_up_at = time.monotonic() + 5
    while time.monotonic() < give_up_at:
        for event in store.poll():
            assert not isinstance(event, CommitFailed), event
            return event
    raise AssertionError("no answer")


def test_redis_with_a_password_and_an_acl_user(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    try:
        admin = redis.Redis.from_url(server.url)
        allowed = re.findall(r"\+[a-z|]+", _acl_of_the_docs())
        admin.execute_command(
            "ACL", "SETUSER", "worker", "on", ">secret", "~midspan:*", "-@all",
            *allowed,
        )  # fmt: skip
        url = server.url.replace("unix://", "unix://worker:secret@")
        store = RedisKvStore(url, share_bytes=COUNTED_BYTES)
        with pytest.raises(redis.exceptions.NoPermissionError):
            redis.Redis.from_url(url).keys("*")
        key, full = secrets.token_bytes(16), secrets.token_bytes(16)
        whole = bytes(8) * 131_072  # a chunk of it
        store.begin_commit(Commit(key, "shape", 0, 0, 0, "w1", 0, 1, False, bytes(8), 8, "edge"))
        wait(store)
        store.begin_commit(Commit(full, "shape", 0, 0, 0, "w1", 0, 131_072, False, whole, 8))
        wait(store)
        store.begin_commit(
            Commit(full, "shape", 0, 0, 0, "w1", 131_072, 131_073, True, bytes(8), 8)
        )
        assert wait(store) == Committed(full, 0, 131_073)
        other = Commit(secrets.token_bytes(16), "shape", 0, 0, 0, "w1", 0, 1, False, bytes(8), 8)
        store.begin_commit(dataclasses.replace(other, account="edge"))
        assert wait(store).code == "over"
        store.begin_load(Load(key, "shape", 0, 0, 0, 1, 8))
        loaded = wait(store)
        assert isinstance(loaded, Loaded)
        assert loaded.rows == bytes(8)
        store.begin_delete(full)
        store.begin_delete(key)
        store.begin_load(Load(key, "shape", 0, 0, 0, 1, 8))
        assert wait(store).rows == b""
        assert admin.keys("*:kv:*") == []
        store.close()
    finally:
        server.stop()


def _acl_of_the_docs() -> str:
    text = Path(__file__).parents[1].joinpath("docs/security.md").read_text()
    start = text.index("ACL SETUSER worker")
    return text[start : text.index("midspan worker", start)]


def test_a_worker_that_is_authorized_after_its_start_joins(pool: LocalPool, tmp_path: Path) -> None:
    keys = keys_of(pool)
    own = create_key(tmp_path, "late")
    command = midspan_command(
        "worker", "--broker", pool.worker_endpoint, "--redis-url", pool.redis_url, "--id", "late",
        "--model", "stories-llama", "--threads", "1", "--key", str(own.with_suffix(".key_secret")),
        "--broker-key", str(keys / f"{BROKER}.key"),
    )  # fmt: skip
    child = Child("late", command, tmp_path)
    try:
        child.wait_for("refuses this worker's key")
        assert "ready:" not in child.log_text()
        authorize(keys, read_public(str(own)), "worker", "late")
        give_up_at = time.monotonic() + 20
        while "late" not in {worker["worker_id"] for worker in status(pool)["workers"]}:
            assert time.monotonic() < give_up_at, "it did not join"
            time.sleep(0.1)
        child.wait_for("worker late ready")
    finally:
        child.stop()


def test_a_refused_worker_leaves_at_once(pool: LocalPool, tmp_path: Path) -> None:
    command = midspan_command(
        "worker", "--broker", "tcp://127.0.0.1:1", "--redis-url", pool.redis_url,
        "--model", "stories-llama", "--threads", "1",
    )  # fmt: skip
    child = Child("alone", command, tmp_path)
    child.wait_for("trying again")
    child.stop()
    assert "gave up draining" not in child.log_text()


def test_a_wrong_broker_key_is_told_from_a_refusal(pool: LocalPool) -> None:
    keys = ClientKeys(member(pool, "phone").own, zmq.curve_keypair()[0])
    client = BrokerClient([pool.edge_endpoint], keys=keys)
    with pytest.raises(BrokerUnavailable, match="has another key than --broker-key, or none"):
        client.status()
    client.close()
