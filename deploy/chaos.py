"""`midspan chaos`: break a real pool on a seeded schedule and compare every token.

Sessions generate over and over while workers are killed, paused and drained, the broker is
restarted, and Redis is emptied, filled up, paused and restarted. Every answer is compared with
that of an undisturbed run of the same prompt. Links that lose or reorder bytes and workers that
answer garbage are not in here yet.
"""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from common.errors import MidspanError
from common.tables import format_table
from deploy.pool import LocalPool, PoolSettings

if TYPE_CHECKING:
    from edge_agent.ends import ModelEnds

PROMPTS = (
    "Once upon a time, there was a brave fox named Mia.",
    "One rainy day, a bear named Tom",
    "Long ago, near a quiet forest, there lived a kind owl named Ella.",
    "There once was a shy duck named Max who loved the lake.",
)
PAUSE_S = 1.2  # longer than the heartbeat limit


@dataclass(slots=True)
class Outcome:
    """What became of all sessions. Threads add to it under its lock."""

    sessions_completed: int = 0
    sessions_failed: int = 0
    tokens: int = 0
    tokens_different: int = 0
    tokens_lost: int = 0
    tokens_doubled: int = 0
    rows_replayed: int = 0
    longest_stall_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, got: list[int], want: list[int], stall_s: float, rows_replayed: int) -> None:
        """Count one finished answer."""
        with self.lock:
            self.sessions_completed += 1
            self.tokens += len(got)
            self.tokens_different += sum(a != b for a, b in zip(got, want, strict=False))
            self.tokens_lost += max(0, len(want) - len(got))
            self.tokens_doubled += max(0, len(got) - len(want))
            self.rows_replayed += rows_replayed
            self.longest_stall_s = max(self.longest_stall_s, stall_s)

    def add_failure(self, error: MidspanError) -> None:
        with self.lock:
            self.sessions_failed += 1
            self.errors.append(str(error))

    def to_json(self) -> dict[str, Any]:
        names = [n for n in self.__slots__ if n not in ("lock", "faults", "errors")]
        numbers = {name: getattr(self, name) for name in names}
        numbers["longest_stall_s"] = round(self.longest_stall_s, 2)
        return numbers | {"faults": dict(self.faults), "errors": self.errors[:10]}


class Saboteur:
    """Does one kind of harm after another to a pool, chosen by a seeded generator."""

    def __init__(self, pool: LocalPool, rng: random.Random) -> None:
        self._pool = pool
        self._rng = rng
        self.faults: dict[str, Callable[[], None]] = {
            "worker killed": self._kill_worker,
            "worker paused": self._pause_worker,
            "worker drained": self._drain_worker,
            "broker restarted": self._restart_broker,
            "Redis flushed": self._flush_redis,
            "Redis restarted empty": self._restart_redis,
            "Redis out of memory": self._fill_redis,
            "Redis paused": self._pause_redis,
        }

    def do_harm(self) -> str:
        """One fault, and what repairs it; returns its name."""
        name = self._rng.choice(list(self.faults))
        self.faults[name]()
        return name

    def _pick_worker(self) -> str:
        return self._rng.choice(sorted(self._pool.workers))

    def _kill_worker(self) -> None:
        self._pool.kill_worker(self._pick_worker())
        self._pool.start_worker()

    def _drain_worker(self) -> None:
        self._pool.drain_worker(self._pick_worker())
        self._pool.start_worker()

    def _pause_worker(self) -> None:
        child = self._pool.workers[self._pick_worker()]
        child.signal(signal.SIGSTOP)
        time.sleep(PAUSE_S)
        child.signal(signal.SIGCONT)

    def _restart_broker(self) -> None:
        assert self._pool.broker is not None
        self._pool.broker.kill()
        self._pool.start_broker()

    def _flush_redis(self) -> None:
        self._redis().flushall()

    def _restart_redis(self) -> None:
        assert self._pool.redis is not None
        self._pool.redis.restart()

    def _fill_redis(self) -> None:
        client = self._redis()
        client.config_set("maxmemory", 1)
        time.sleep(PAUSE_S)
        client.config_set("maxmemory", 0)

    def _pause_redis(self) -> None:
        assert self._pool.redis is not None
        self._pool.redis.child.signal(signal.SIGSTOP)
        time.sleep(PAUSE_S)
        self._pool.redis.child.signal(signal.SIGCONT)

    def _redis(self) -> Any:
        import redis

        return redis.Redis.from_url(self._pool.redis_url)


@click.command()
@click.option("--sessions", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--workers", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--duration", "duration_s", default=60.0, show_default=True, help="Seconds.")
@click.option("--every", "every_s", default=4.0, show_default=True, help="Seconds between faults.")
@click.option("--tokens", default=60, show_default=True, help="Of one answer.")
@click.option("--seed", default=1, show_default=True)
@click.option("--model", help="Hugging Face directory.  [default: the demo model]")
@click.option("--cut", help="As A:B.  [default: middle half]")
@click.option("--codec", default="fp32", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def chaos(
    sessions: int,
    workers: int,
    duration_s: float,
    every_s: float,
    tokens: int,
    seed: int,
    model: str | None,
    cut: str | None,
    codec: str,
    as_json: bool,
) -> None:
    """Break a pool on purpose, on a seeded schedule, and compare every token.

    Exits with 1 if a session failed or a token differs from an undisturbed run.
    """
    from common.demo_model import find_model
    from common.processes import set_up_torch
    from edge_agent.ends import load_ends
    from edge_agent.tokenizer import TextTokenizer

    set_up_torch(threads=1)
    directory = find_model(model)
    ends, tokenizer = load_ends(directory, cut), TextTokenizer(directory)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    settings = PoolSettings(workers=workers, model=str(directory), span=str(ends.cut.middle))
    with LocalPool(settings) as pool:
        wanted = [_generate(pool, ends, prompt, tokens, codec)[0] for prompt in prompts]
        outcome = Outcome()
        stop_at = time.monotonic() + duration_s

        def keep_generating(index: int) -> None:
            turn = index
            while time.monotonic() < stop_at:
                which = turn % len(prompts)
                try:
                    answer = _generate(pool, ends, prompts[which], tokens, codec)
                except MidspanError as error:
                    outcome.add_failure(error)
                else:
                    outcome.add(answer[0], wanted[which], *answer[1:])
                turn += 1

        threads = [threading.Thread(target=keep_generating, args=(i,)) for i in range(sessions)]
        for thread in threads:
            thread.start()
        saboteur = Saboteur(pool, random.Random(seed))
        while time.monotonic() + every_s < stop_at:
            time.sleep(every_s)
            outcome.faults[saboteur.do_harm()] += 1
            pool.heal()  # a worker cannot start while Redis is away; as a supervisor would
        for thread in threads:
            thread.join()
    result = outcome.to_json()
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(format_table(("what", "how many"), list(result.items())))
    wrong = outcome.tokens_different + outcome.tokens_lost + outcome.tokens_doubled
    if outcome.sessions_failed or wrong:
        raise MidspanError("the pool did not keep its promise")


def _generate(
    pool: LocalPool, ends: ModelEnds, prompt_ids: list[int], count: int, codec: str
) -> tuple[list[int], float, int]:
    """Tokens, the longest wait for one of them in seconds, and rows replayed."""
    from edge_agent.client import BrokerClient
    from edge_agent.sampler import SamplingSettings
    from edge_agent.session import Session, uniform_settings

    client = BrokerClient([pool.edge_endpoint])
    session = Session(ends, client, uniform_settings(codec))
    tokens: list[int] = []
    stall_s, last_at = 0.0, time.monotonic()
    try:
        for token in session.generate(prompt_ids, count, SamplingSettings()):
            tokens.append(token)
            now = time.monotonic()
            stall_s, last_at = max(stall_s, now - last_at), now
    finally:
        client.close()
    return tokens, stall_s, session.stats.rows_replayed
