"""What there are two of, one of which goes: brokers, and a Redis with a replica that lags."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
import torch
from pools import GREEDY, PROMPTS, record_of, reference_tokens
from waiting import wait_until

from deploy.child import Child, midspan_command
from deploy.embedded_redis import EmbeddedRedis, choose_port
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

SESSIONS = 6
NEW_TOKENS = 72
HARM_AT = 24  # tokens of the first session
AGAIN_AT = 40


def generate_all(
    brokers: list[str],
    ends: ModelEnds,
    prompts: list[list[int]],
    on_token: Callable[[int, Session], None],
) -> tuple[list[list[int]], list[Session]]:
    """A session for each prompt, at once; what is done at the first one's tokens others feel."""
    tokens: list[list[int]] = [[] for _ in prompts]
    clients = [BrokerClient(brokers) for _ in prompts]
    sessions = [Session(ends, client, uniform_settings("fp32")) for client in clients]

    errors: list[BaseException] = []

    def run(index: int) -> None:
        torch.set_num_threads(1)
        try:
            for token in sessions[index].generate(prompts[index], NEW_TOKENS, GREEDY):
                tokens[index].append(token)
                if index == 0:
                    on_token(len(tokens[0]), sessions[0])
        except BaseException as error:  # shown in the main thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        client.close()
    if errors:
        raise errors[0]
    return tokens, sessions


@pytest.fixture(scope="module")
def prompts(demo_ends: ModelEnds) -> list[list[int]]:
    tokenizer = TextTokenizer(demo_ends.directory)
    return [tokenizer.encode(prompt) for prompt in PROMPTS[:SESSIONS]]


@pytest.fixture(scope="module")
def want(whole_model: torch.nn.Module, demo_ends: ModelEnds) -> list[list[int]]:
    tokenizer = TextTokenizer(demo_ends.directory)
    return reference_tokens(whole_model, tokenizer, PROMPTS[:SESSIONS], NEW_TOKENS)


def test_one_of_two_brokers_is_killed_under_load(
    demo_ends: ModelEnds, prompts: list[list[int]], want: list[list[int]], tmp_path: Path
) -> None:
    command = midspan_command(
        "broker", "--edge-endpoint", "tcp://127.0.0.1:*", "--worker-endpoint", "tcp://127.0.0.1:*"
    )
    second = Child("second", command, tmp_path)
    try:
        words = second.wait_for("broker ready").split()
        edges, workers = words[words.index("edges") + 1], words[words.index("workers") + 1]
        with LocalPool(PoolSettings(workers=2, worker_options=["--broker", workers])) as pool:
            first = pool.broker
            assert first is not None

            def kill_first(count: int, _: Session) -> None:
                if count == HARM_AT:
                    first.kill()

            brokers = [pool.edge_endpoint, edges]
            tokens, _ = generate_all(brokers, demo_ends, prompts, kill_first)
            assert tokens == want
            left = BrokerClient([edges])
            assert left.status()["counters"]["steps"] > SESSIONS * (NEW_TOKENS - HARM_AT) / 2
            left.close()
    finally:
        second.stop()


@dataclass
class Replicated:
    """A Redis with a replica, and a path that leads to the one in charge."""

    directory: Path

    def __post_init__(self) -> None:
        places = [self.directory / name for name in ("master", "replica")]
        for place in places:
            place.mkdir()
        port = choose_port(0)
        self.master = EmbeddedRedis(places[0], port)
        self.replica = EmbeddedRedis(places[1], choose_port(0))
        self.link = self.directory / "store.sock"
        self.link.symlink_to(places[0] / "redis.sock")
        self.url = f"unix://{self.link}"
        self.second = redis.Redis.from_url(self.replica.url)
        self.second.replicaof("127.0.0.1", str(port))
        wait_until(lambda: self.second.info("replication")["master_link_status"] == "up")

    def part(self) -> None:
        """From now on the replica misses what is written."""
        self.second.replicaof("NO", "ONE")

    def promote(self) -> None:
        """The first one dies, and the other is in charge."""
        self.master.child.kill()
        moved = self.directory / "moved.sock"
        moved.symlink_to(self.directory / "replica" / "redis.sock")
        moved.replace(self.link)

    def close(self) -> None:
        self.second.close()
        self.master.stop()
        self.replica.stop()


@pytest.fixture
def replicated(tmp_path: Path) -> Iterator[Replicated]:
    store = Replicated(tmp_path)
    try:
        yield store
    finally:
        store.close()


@pytest.mark.parametrize("with_kill", [False, True], ids=["alone", "and a worker dies"])
def test_a_replica_that_lacks_the_last_rows_is_promoted_under_load(
    demo_ends: ModelEnds,
    prompts: list[list[int]],
    want: list[list[int]],
    replicated: Replicated,
    with_kill: bool,
) -> None:
    caught_up: list[bool] = []

    def position(session: Session) -> int:
        return int(replicated.second.hget(record_of(session), "position") or 0)

    with LocalPool(PoolSettings(workers=2, redis_url=replicated.url)) as pool:

        def harm(count: int, session: Session) -> None:
            if count == 4:
                wait_until(lambda: position(session) > 0)
                replicated.part()
            if count == HARM_AT:
                before = position(session)
                assert 0 < before < session.stats.prompt_tokens + HARM_AT - 5
                replicated.promote()
                if with_kill:
                    pool.kill_worker("w1")
            if count == AGAIN_AT:  # what it lacked is committed again
                rows = session.stats.prompt_tokens + AGAIN_AT - 1
                wait_until(lambda: position(session) >= rows)
                caught_up.append(True)

        tokens, _ = generate_all([pool.edge_endpoint], demo_ends, prompts, harm)
    assert tokens == want
    assert caught_up == [True]
