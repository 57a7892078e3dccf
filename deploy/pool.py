"""A whole pool on one machine: Redis, a broker and workers, each a process of its own."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from common.errors import BrokerUnavailable, ProcessFailed
from common.security.keys import BROKER, ClientKeys, create_key, ensure_member
from common.settings import REDIS_URL
from common.weights.demo_model import DEMO_TEXT_MODEL
from deploy.child import Child, midspan_command, stop_all
from deploy.departures import Departures
from deploy.embedded_redis import EmbeddedRedis
from deploy.endings import Endings
from edge_agent.engine.client import BrokerClient

START_LIMIT_S = 120.0
TOO_MANY_ENDINGS = 11
LEAVE_LIMIT_S = 120.0  # for a worker that drains
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What a local pool is made of. Endpoints of port * get a free port."""

    workers: int = 2
    model: str | None = None  # None: the demo model, unless there is an image model
    span: str | None = None
    image_model: str | None = None
    dtype: str = "float32"
    threads: int = 1  # torch threads of each worker
    redis_url: str | None = None  # None: an embedded one
    redis_port: int | None = None  # of the embedded one, on loopback; None: a Unix socket only
    calibration: Path | None = None
    loras: Sequence[str] = ()  # PATH or PATH@SCALE
    neuron_options: Sequence[str] = ()  # of the worker's command
    image_loras: Sequence[str] = ()
    image_weights: Path | None = None
    edge_endpoint: str = "tcp://127.0.0.1:*"
    worker_endpoint: str = "tcp://127.0.0.1:*"
    worker_options: list[str] = field(default_factory=list)
    broker_options: list[str] = field(default_factory=list)
    keys: Path | None = None  # a directory of common/security/keys.py; made complete if it is not


class LocalPool:
    """Use as a context manager: started on entry, drained and stopped on exit."""

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = settings
        self.directory = Path(tempfile.mkdtemp(prefix="midspan-"))
        self.redis: EmbeddedRedis | None = None
        self.broker: Child | None = None
        self.workers: dict[str, Child] = {}
        self._departures = Departures(LEAVE_LIMIT_S)
        self.edge_endpoint = settings.edge_endpoint
        self.worker_endpoint = settings.worker_endpoint
        self._workers_started = 0
        self._endings = Endings(TOO_MANY_ENDINGS)
        self.client_keys: ClientKeys | None = None  # of an edge on this machine

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def redis_url(self) -> str:
        return self.redis.url if self.redis else (self.settings.redis_url or "")

    @property
    def public_redis_url(self) -> str:
        """How a worker that is started beside the pool reaches its Redis."""
        return self.redis.public_url if self.redis else self.redis_url

    def start(self) -> None:
        """Start everything and wait until all workers are known to the broker."""
        if self.settings.keys is not None:
            self._complete_keys(self.settings.keys)
        if self.settings.redis_url is None:
            self.redis = EmbeddedRedis(self.directory, self.settings.redis_port)
        self.start_broker()
        for _ in range(self.settings.workers):
            self.start_worker()
        self.wait_for_workers(self.settings.workers)

    def _complete_keys(self, directory: Path) -> None:
        if not (directory / f"{BROKER}.key_secret").exists():
            create_key(directory, BROKER)
        self.client_keys = ensure_member(directory, "local-edge", "edge")
        ensure_member(directory, "local-worker", "worker")

    def connect(self, timeout_s: float = 60.0) -> BrokerClient:
        """An edge's connection to the pool's broker."""
        return BrokerClient([self.edge_endpoint], timeout_s, self.client_keys)

    def start_broker(self) -> None:
        """Start the broker; a second time at the addresses of the first."""
        options = ["--edge-endpoint", self.edge_endpoint]
        options += ["--worker-endpoint", self.worker_endpoint]
        options += self.settings.broker_options
        if self.settings.keys is not None:
            options += ["--keys", str(self.settings.keys)]
        self.broker = Child("broker", midspan_command("broker", *options), self.directory)
        line = self.broker.wait_for("broker ready")
        match = re.search(r"edges (\S+) workers (\S+)", line)
        assert match is not None, line
        self.edge_endpoint, self.worker_endpoint = match[1], match[2]

    def start_worker(self, endpoint: str | None = None, span: str | None = None) -> str:
        """Start one more worker and return its name at once; see `wait_for_workers`.

        `endpoint` is another way to the broker than the direct one, `span` another than the pool's.
        """
        self._workers_started += 1
        name = f"w{self._workers_started}"
        settings = self.settings
        options = [
            "--broker", endpoint or self.worker_endpoint, "--id", name,
            "--threads", str(settings.threads), "--dtype", settings.dtype,
            *settings.neuron_options, *settings.worker_options,
        ]  # fmt: skip
        if settings.model is not None or settings.image_model is None:
            options += ["--model", settings.model or DEMO_TEXT_MODEL]
        if settings.image_model is not None:
            options += ["--image-model", settings.image_model]
        if settings.image_weights is not None:
            options += ["--image-weights", str(settings.image_weights)]
        for option, loras in (("--lora", settings.loras), ("--image-lora", settings.image_loras)):
            for lora in loras:
                options += [option, lora]
        span = span or settings.span
        if span is not None:
            options += ["--span", span]
        if settings.calibration is not None:
            options += ["--calibration", str(settings.calibration)]
        if settings.keys is not None:
            options += ["--key", str(settings.keys / "local-worker.key_secret")]
            options += ["--broker-key", str(settings.keys / f"{BROKER}.key")]
        # not as an argument: it may have a password, and every user can list those
        environment = {REDIS_URL: self.redis_url}
        command = midspan_command("worker", *options)
        self.workers[name] = Child(name, command, self.directory, environment)
        return name

    def wait_for_workers(self, count: int) -> None:
        """Wait until the broker knows `count` workers. Raises ProcessFailed if one ends before."""
        client = self.connect()
        give_up_at = time.monotonic() + START_LIMIT_S
        try:
            while len(self._ready_workers(client)) < count:
                for child in self.workers.values():
                    child.check()
                if time.monotonic() > give_up_at:
                    raise ProcessFailed(f"{count} workers were not ready in {START_LIMIT_S:g} s")
                time.sleep(0.05)
        finally:
            client.close()

    def _ready_workers(self, client: BrokerClient) -> list[dict[str, Any]]:
        try:
            workers = client.status(timeout_s=2.0)["workers"]
        except BrokerUnavailable:
            if self.broker is not None:
                self.broker.check()
            raise
        return [w for w in workers if w["state"] == "ready" and w["worker_id"] in self.workers]

    def kill_worker(self, name: str) -> None:
        """kill -9, as a machine that goes away."""
        self.workers.pop(name).kill()

    def drain_worker(self, name: str) -> None:
        """Let a worker finish, commit and leave, and wait for that."""
        self.workers.pop(name).stop()

    def begin_drain(self, name: str) -> None:
        """Tell a worker to finish, commit and leave; `heal` sees to its end."""
        self._departures.begin(self.workers.pop(name), time.monotonic())

    def names(self) -> list[str]:
        """The workers that are here to stay."""
        return list(self.workers)

    def heal(self) -> list[str]:
        """Start again what has ended; returns what happened, a line each.

        Raises ProcessFailed when that does not help: a process ended again and again.
        """
        lines = self._departures.see_off(time.monotonic())
        for name in [name for name, child in self.workers.items() if not child.is_running()]:
            words = self.workers.pop(name).last_words()
            lines.append(f"{words}; starting {self._start_again(words, self.start_worker)}")
        if self.broker is not None and not self.broker.is_running():
            words = self.broker.last_words()
            self._start_again(words, self.start_broker)
            lines.append(f"{words}; started it again")
        if self.redis is not None and not self.redis.child.is_running():
            words = self.redis.child.last_words()
            self._start_again(words, self.redis.restart)
            lines.append(f"{words}; started an empty one")
        return lines

    def _start_again(self, words: str, start: Callable[[], T]) -> T:
        if self._endings.count(time.monotonic()):
            raise ProcessFailed(f"{words}; too much has ended in the last minute, giving up")
        return start()

    def check(self) -> None:
        """Raise ProcessFailed if any process has ended by itself."""
        redis_child = self.redis.child if self.redis else None
        for child in (redis_child, self.broker, *self.workers.values()):
            if child is not None:
                child.check()

    def stop(self) -> None:
        """Drain the workers, then stop broker and Redis, and remove what was written."""
        try:
            stop_all([*self.workers.values(), *self._departures.take_all()])
            if self.broker is not None:
                self.broker.stop()
            if self.redis is not None:
                self.redis.stop()
        finally:  # who is interrupted here ends at once, and then so do those
            shutil.rmtree(self.directory, ignore_errors=True)
