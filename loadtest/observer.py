"""Look at a pool while it is under load, and do it harm if that is wanted: two threads."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import BrokerUnavailable, ProcessFailed
from deploy.pool import LocalPool
from deploy.scaling.autoscaler import Autoscaler
from edge_agent.engine.client import BrokerClient
from loadtest.observed import SCALED, Event, Observed, read_sample
from loadtest.pacing import Clock

SAMPLE_S = 0.5
ANSWER_LIMIT_S = 2.0
TICK_S = 0.05
SCALE_S = 0.5
NOTICED_S = 0.5  # in which a broker knows that a worker is gone


def read_cpu_s(pid: int) -> float | None:
    """User and system time of a process and all of its threads, where the system says that."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Observer:
    """Asks a broker for its report again and again. `find_pid` is of the broker, if it is ours."""

    def __init__(
        self,
        client: BrokerClient,
        clock: Clock,
        observed: Observed,
        find_pid: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._client = client
        self._clock = clock
        self._observed = observed
        self._find_pid = find_pid

    def look(self) -> None:
        """Take one sample, unless the broker does not answer just now."""
        pid = self._find_pid()
        with contextlib.suppress(BrokerUnavailable):
            report = self._client.status(ANSWER_LIMIT_S)
            cpu_s = None if pid is None else read_cpu_s(pid)
            self._observed.samples.append(read_sample(report, self._clock.now(), cpu_s))


@dataclass(slots=True)
class Plan:
    """A kind of harm that is done every so often."""

    every_s: float
    due_s: float
    what: str
    do: Callable[[str], None]  # to the worker of that name


class Harm:
    """Kills and drains workers of a pool of ours, and starts others in their place.

    One at a time: what is due waits until there are as many workers again as at first, or the load
    would be on none. Who ends without that is started again as well, and that is an event, too.
    """

    def __init__(
        self,
        pool: LocalPool,
        clock: Clock,
        observed: Observed,
        *,
        kill_every_s: float | None,
        drain_every_s: float | None,
        seed: int,
        scaler: Autoscaler | None = None,
    ) -> None:
        self._pool, self._clock, self._observed = pool, clock, observed
        self._rng = random.Random(seed)
        self._scaler, self._scale_at = scaler, 0.0
        self._done_s = 0.0  # when something was last done
        self._plans = [
            Plan(every_s, clock.now() + every_s, what, do)
            for every_s, what, do in (
                (kill_every_s, "killed", pool.kill_worker),
                (drain_every_s, "drained", pool.drain_worker),
            )
            if every_s is not None
        ]

    def act(self) -> None:
        """Do what is due. Raises ProcessFailed when what ends cannot be kept running."""
        for plan in self._plans:
            if self._clock.now() >= plan.due_s and self._is_whole():
                plan.due_s = self._clock.now() + plan.every_s
                name = self._rng.choice(sorted(self._pool.workers))
                self._note(f"{plan.what} {name}")
                plan.do(name)
                if self._scaler is None:  # which would see to it
                    self._pool.start_worker()
                self._done_s = self._clock.now()
        lines = self._pool.heal()
        now = self._clock.now()
        if self._scaler is not None and now >= self._scale_at:
            self._scale_at = now + SCALE_S
            lines += [f"{SCALED} {line}" for line in self._scaler.step(now)]
        for line in lines:
            self._note(line)

    def _is_whole(self) -> bool:
        """Whether all workers have been seen that there were at first, since somebody went."""
        samples = self._observed.samples
        has_looked = samples and samples[-1].at_s > self._done_s + NOTICED_S
        return bool(has_looked) and samples[-1].workers >= samples[0].workers

    def _note(self, what: str) -> None:
        self._observed.events.append(Event(round(self._clock.now(), 3), what))


@contextlib.contextmanager
def again_and_again(work: Callable[[], None], every_s: float, name: str) -> Iterator[None]:
    """Do something in a thread, from now until the end of the block."""
    is_over = threading.Event()
    failures: list[ProcessFailed] = []

    def run() -> None:
        try:
            while not is_over.wait(every_s):
                work()
        except ProcessFailed as error:
            failures.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    if failures:
        raise failures[0]
