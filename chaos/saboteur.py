"""What `midspan chaos` does to a pool: kinds of harm, and a pool whose links can be harmed."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from typing import Any

from chaos.bad_peers import LyingWorker, abandon, flood
from chaos.thin_link import ThinLink
from chaos.unreliable_link import FAULTS, UnreliableLink
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient

PAUSE_S = 1.2  # longer than the heartbeat limit
THIN_BYTES_PER_S = 20_000.0
FLOOD_STEPS = 400
ABANDONED_STEPS = 8


class HarmedPool(LocalPool):
    """A pool whose workers reach their broker over links of their own, and edges over one."""

    def __init__(self, settings: PoolSettings, seed: int) -> None:
        super().__init__(settings)
        self._seed = seed
        self._links: dict[str, UnreliableLink] = {}
        self.edge_link: ThinLink | None = None

    def connect(self, timeout_s: float = 60.0) -> BrokerClient:
        return BrokerClient([self.edge_address()], timeout_s)

    def edge_address(self) -> str:
        """Where edges meet the link to the broker."""
        if self.edge_link is None:
            self.edge_link = ThinLink(self.edge_endpoint)
        return self.edge_link.endpoint

    def start_worker(self, endpoint: str | None = None, span: str | None = None) -> str:
        link = UnreliableLink(endpoint or self.worker_endpoint, self._seed)
        name = super().start_worker(link.endpoint, span)
        self._links[name] = link
        for gone in self._links.keys() - self.workers.keys():
            self._links.pop(gone).close()
        return name

    def link(self, name: str) -> UnreliableLink:
        """The link of a worker."""
        return self._links[name]

    def stop(self) -> None:
        super().stop()
        if self.edge_link is not None:
            self.edge_link.close()
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
        self._known: list[dict[str, Any]] = []
        self._known = self._services()
        self.faults: dict[str, Callable[[], None]] = {
            "worker killed": self._kill_worker,
            "worker paused": self._pause_worker,
            "worker drained": self._drain_worker,
            "broker restarted": self._restart_broker,
            "Redis flushed": self._flush_redis,
            "Redis restarted empty": self._restart_redis,
            "Redis out of memory": self._fill_redis,
            "Redis paused": self._pause_redis,
            "Redis evicting": self._evict_from_redis,
            "edge link thin": self._thin_edge_link,
            "worker lying": self._let_a_worker_lie,
            "edge flooding": self._flood,
            "edge abandoning": self._abandon,
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

    def _evict_from_redis(self) -> None:
        """Keys are dropped at random, whatever they are: the rest of their sessions stays."""
        client = self._redis()
        limit = client.info("memory")["used_memory"]
        client.config_set("maxmemory-policy", "allkeys-random")
        client.config_set("maxmemory", int(limit))
        time.sleep(PAUSE_S)
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")

    def _thin_edge_link(self) -> None:
        assert self._pool.edge_link is not None
        self._pool.edge_link.bytes_per_s = THIN_BYTES_PER_S
        time.sleep(PAUSE_S)
        self._pool.edge_link.bytes_per_s = None

    def _let_a_worker_lie(self) -> None:
        liar = LyingWorker(self._pool.worker_endpoint, self._services(), self._rng.randrange(999))
        time.sleep(PAUSE_S)
        liar.close()

    def _flood(self) -> None:
        flood(self._pool.edge_endpoint, self._services(), FLOOD_STEPS)

    def _abandon(self) -> None:
        abandon(self._pool.edge_endpoint, self._services()[0], ABANDONED_STEPS)

    def _services(self) -> list[dict[str, Any]]:
        """What the pool serves, also while all of its workers are starting."""
        client = self._pool.connect()
        workers = client.status()["workers"]
        client.close()
        self._known = [service for w in workers for service in w["services"]] or self._known
        return self._known

    def _redis(self) -> Any:
        import redis

        return redis.Redis.from_url(self._pool.redis_url)
