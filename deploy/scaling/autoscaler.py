"""Let a fleet of workers grow and shrink by what its brokers say.

It asks the brokers what their services could use, takes away what workers of others give, and
starts workers or has them drain. A broker that does not answer says nothing: then nothing is
changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from deploy.scaling.policy import ScalingPolicy

Report = dict[str, Any]  # of broker/report.py
Part = tuple[str, str]  # model fingerprint, part


class Fleet(Protocol):
    """Workers that can be started, and told to leave."""

    def names(self) -> list[str]:
        """Those that are here to stay, under the ids that brokers know."""

    def start_worker(self) -> str:
        """Start one more, and return its name at once."""

    def begin_drain(self, name: str) -> None:
        """Tell one to finish what it has and leave, and return at once."""


class Autoscaler:
    """`read` gives the reports of the brokers that answer."""

    def __init__(
        self, fleet: Fleet, policy: ScalingPolicy, read: Callable[[], list[Report]]
    ) -> None:
        self._fleet = fleet
        self._policy = policy
        self._read = read
        self._parts: set[Part] = set()  # that our workers serve, as far as we have seen one

    def step(self, now: float) -> list[str]:
        """Look, and do what is needed; returns what was done, a line each."""
        reports = self._read()
        if not reports:
            return []
        names = self._fleet.names()
        self._learn_parts(reports, names)
        wanted = count_wanted(reports, self._parts) - count_others(reports, self._parts, names)
        target = self._policy.decide(len(names), max(0.0, wanted), now)
        if target == len(names):
            return []
        line = f"{len(names)} -> {target} workers: the pool could use {max(0.0, wanted):.1f}"
        for _ in range(target - len(names)):
            line += f"; starting {self._fleet.start_worker()}"
        for name in choose_leaving(reports, names, len(names) - target):
            self._fleet.begin_drain(name)
            line += f"; draining {name}"
        return [line]

    def _learn_parts(self, reports: list[Report], names: list[str]) -> None:
        for worker in _list_workers(reports):
            if worker["worker_id"] in names:
                self._parts |= _parts_of(worker)


def count_wanted(reports: list[Report], parts: set[Part]) -> float:
    """Workers that these parts could use; before we know ours, the parts that nobody serves."""
    queues = [queue for report in reports for queue in report["queues"]]
    ours = [
        queue
        for queue in queues
        if ((queue["model"], queue["part"]) in parts if parts else not queue["workers"])
    ]
    return float(sum(queue["wanted_workers"] for queue in ours))


def count_others(reports: list[Report], parts: set[Part], names: list[str]) -> int:
    """Ready workers of others that serve what ours do."""
    return len(
        {
            worker["worker_id"]
            for worker in _list_workers(reports)
            if worker["state"] == "ready"
            and worker["worker_id"] not in names
            and _parts_of(worker) & parts
        }
    )


def choose_leaving(reports: list[Report], names: list[str], count: int) -> list[str]:
    """Those that are warm for the fewest sessions; of these the newest."""
    warm = dict.fromkeys(names, 0)
    for worker in _list_workers(reports):
        if worker["worker_id"] in warm:
            warm[worker["worker_id"]] += worker["warm_sessions"]
    newest_first = names[::-1]
    return sorted(newest_first, key=lambda name: warm[name])[: max(0, count)]


def _list_workers(reports: list[Report]) -> list[dict[str, Any]]:
    return [worker for report in reports for worker in report["workers"]]


def _parts_of(worker: dict[str, Any]) -> set[Part]:
    return {(service["model"], service["part"]) for service in worker["services"]}
