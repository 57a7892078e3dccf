"""A pool of synthetic workers, several to a process: broker and Redis are as ever."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from common.settings import REDIS_URL
from deploy.child import Child
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient

MODULE = "loadtest.synthetic.workers"


class SyntheticPool(LocalPool):
    """What `LocalPool` calls a worker is a process here, with `each` workers in it.

    So `settings.workers` are processes, and one that is killed takes its workers along.
    """

    def __init__(
        self, settings: PoolSettings, *, each: int, batch_ms: float, cut_text: str
    ) -> None:
        super().__init__(settings)
        self._each, self._batch_ms, self._cut_text = each, batch_ms, cut_text

    def start_worker(self, endpoint: str | None = None, span: str | None = None) -> str:
        self._workers_started += 1
        name = f"p{self._workers_started}"
        assert self.settings.model is not None
        options = [
            "--broker", endpoint or self.worker_endpoint, "--model", self.settings.model,
            "--cut", self._cut_text, "--ms", str(self._batch_ms), "--count", str(self._each),
            "--name", name,
        ]  # fmt: skip
        command = [sys.executable, "-P", "-m", MODULE, *options]
        self.workers[name] = Child(name, command, self.directory, {REDIS_URL: self.redis_url})
        return name

    def _ready_workers(self, client: BrokerClient) -> list[dict[str, Any]]:
        """A worker of each process all of whose workers are ready."""
        ready = [
            worker
            for worker in client.status(timeout_s=2.0)["workers"]
            if worker["state"] == "ready" and _process_of(worker) in self.workers
        ]
        counts = Counter(map(_process_of, ready))
        first = {_process_of(worker): worker for worker in ready}
        return [worker for name, worker in first.items() if counts[name] == self._each]


def _process_of(worker: dict[str, Any]) -> str:
    return str(worker["worker_id"]).partition(".")[0]
