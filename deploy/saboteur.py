"""What `midspan chaos` does to a pool: kinds of harm, and a pool whose links can be harmed."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from typing import Any

from deploy.pool import LocalPool, PoolSettings
from deploy.unreliable_link import FAULTS, UnreliableLink

PAUSE_S = 1.2  # longer than the heartbeat limit


class HarmedPool(LocalPool):
    """A pool in which every worker reaches its broker over a link of its own."""

    def __init__(self, settings: PoolSettings, seed: int) -> None:
        super().__init__(settings)
        self._seed = seed
        self._links: dict[str, UnreliableLink] = {}

    def start_worker(self, endpoint: str | None = None) -> str:
        link = UnreliableLink(endpoint or self.worker_endpoint, self._seed)
        name = super().start_worker(link.endpoint)
        self._links[name] = link
        for gone in self._links.keys() - self.workers.keys():
            self._links.pop(gone).close()
        return name

    def link(self, name: str) -> UnreliableLink:
        """The link of a worker."""
        return self._links[name]

    def stop(self) -> None:
        super().stop()
        for link in self._links.values():
            link.close()
        self._links.clear()


class Saboteur:
    """Does one kind of harm after another to a pool, chosen by a seeded generator.

    All kinds come once, in an order drawn anew, before any comes again.
    """

    def __init__(self, pool: HarmedPool, rng: random.Random) -> None:
        self._pool = pool
        self._rng = rng
        self._coming: list[str] = []
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
        for fault in FAULTS:
            self.faults[f"link {fault}"] = lambda fault=fault: self._harm_link(fault)  # type: ignore[misc]

    def do_harm(self) -> str:
        """One fault, and what repairs it; returns its name."""
        if not self._coming:
            self._coming = self._rng.sample(sorted(self.faults), len(self.faults))
        name = self._coming.pop()
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

    def _harm_link(self, fault: str) -> None:
        link = self._pool.link(self._pick_worker())
        link.fault = fault
        time.sleep(PAUSE_S)
        link.fault = ""

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
