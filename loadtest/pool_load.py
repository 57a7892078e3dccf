"""A load on a pool: brokers, edges, and what is seen of the pool and done to it meanwhile."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import SettingsError
from deploy.pool import LocalPool, PoolSettings
from deploy.scaling.keeper import open_scaler
from deploy.scaling.policy import ScalingSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.engine.engine import Engine
from edge_agent.text.session_settings import SessionSettings, count_new_tokens
from loadtest.engines import EngineTarget, Oracle
from loadtest.observed import Observed
from loadtest.observer import SAMPLE_S, TICK_S, Harm, Observer, again_and_again
from loadtest.pacing import Clock
from loadtest.running import Outcome, report_load, run_load
from loadtest.settings import LoadSettings, WorkerCount
from loadtest.slo import Slo
from loadtest.synthetic.model import Shape
from loadtest.synthetic.pool import SyntheticPool

if TYPE_CHECKING:
    from common.codecs.calibration import Calibration
    from common.security.keys import ClientKeys
    from edge_agent.text.ends import ModelEnds
    from loadtest.painters import Pictures

BROKER_LIMIT_S = 5.0
IMAGE_LIMIT_S = 120.0
ANNOUNCED_S = 0.3  # in which workers say what they have counted


@dataclass(frozen=True, slots=True)
class Brokers:
    """A pool that is there already, or just was started."""

    addresses: list[str]
    keys: ClientKeys | None = None
    own: LocalPool | None = None

    def connect(self, timeout_s: float) -> BrokerClient:
        return BrokerClient(self.addresses, timeout_s, self.keys)

    def find_broker_pid(self) -> int | None:
        """Of a broker of ours."""
        broker = self.own.broker if self.own else None
        return broker.pid if broker else None


@dataclass(frozen=True, slots=True)
class Edges:
    """The edges that the sessions are of."""

    ends: ModelEnds
    count: int
    codecs: SessionSettings
    calibration: Calibration | None
    timeout_s: float
    oracle: Oracle | None = None

    def check(self, load: LoadSettings) -> None:
        """Raises SettingsError for lengths that the model's context has no room for."""
        prompt, tokens = load.longest()
        if self.ends.context is not None and prompt + tokens > self.ends.context:
            raise SettingsError(
                f"prompts have up to {prompt} tokens and answers {tokens}; {self.ends.name} has a "
                f"context of {self.ends.context}: give smaller --prompt-tokens or --tokens"
            )
        count_new_tokens(self.ends, [0] * prompt, tokens)

    @contextlib.contextmanager
    def open(self, brokers: Brokers, load: LoadSettings) -> Iterator[EngineTarget]:
        make = functools.partial(
            Engine, self.ends, brokers.addresses, self.codecs, keys=brokers.keys,
            timeout_s=self.timeout_s, calibration=self.calibration, max_sessions=load.concurrency,
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            engines = [stack.enter_context(make()) for _ in range(self.count)]
            yield EngineTarget(self.ends, engines, load.seed, self.oracle)


@dataclass(frozen=True, slots=True)
class HarmSettings:
    """What is done to a pool of ours."""

    kill_every_s: float | None = None
    drain_every_s: float | None = None
    workers: WorkerCount | None = None  # that a pool of ours may have

    @property
    def is_any(self) -> bool:
        return self.kill_every_s is not None or self.drain_every_s is not None


@dataclass(frozen=True, slots=True)
class ImageLoad:
    """Pictures that are painted meanwhile, so many at once."""

    count: int
    directory: Path

    def open(
        self, brokers: Brokers, seed: int
    ) -> contextlib.AbstractContextManager[Callable[[], Pictures]]:
        from loadtest.painters import painting

        connect = functools.partial(brokers.connect, IMAGE_LIMIT_S)
        return painting(self.count, self.directory, connect, seed)


@contextlib.contextmanager
def open_synthetic_pool(
    workers: WorkerCount, processes: int, shape: Shape, directory: Path, batch_ms: float
) -> Iterator[LocalPool]:
    """A pool of so many stand-ins for workers, evenly in some processes.

    One that grows and shrinks has a process for each.
    """
    if not workers.is_fixed:
        processes = workers.least
    if workers.least % processes:
        raise SettingsError(
            f"--workers is not a number that {processes} processes (--processes) share evenly"
        )
    settings = PoolSettings(workers=processes, model=str(directory))
    with SyntheticPool(
        settings, each=workers.least // processes, batch_ms=batch_ms, cut_text=str(shape.cut)
    ) as pool:
        yield pool


def load_pool(
    brokers: Brokers,
    edges: Edges,
    settings: LoadSettings,
    harm: HarmSettings,
    slo: Slo | None,
    images: ImageLoad | None = None,
) -> Outcome:
    """Put a load on a pool; what that was like. Raises BrokerUnavailable if none is there."""
    observed = Observed()
    client = brokers.connect(edges.timeout_s)
    with contextlib.ExitStack() as stack:
        stack.callback(client.close)
        client.status(BROKER_LIMIT_S)
        target = stack.enter_context(edges.open(brokers, settings))
        begin_painting = stack.enter_context(
            images.open(brokers, settings.seed) if images else contextlib.nullcontext()
        )
        clock = Clock()
        observer = Observer(client, clock, observed, brokers.find_broker_pid)
        observer.look()
        stack.enter_context(again_and_again(observer.look, SAMPLE_S, "observer"))
        if brokers.own is not None:
            scaler = None
            if harm.workers is not None:
                scaling = ScalingSettings(harm.workers.least, harm.workers.most)
                scaler = stack.enter_context(open_scaler(brokers.own, scaling))
            doer = Harm(
                brokers.own, clock, observed, kill_every_s=harm.kill_every_s,
                drain_every_s=harm.drain_every_s, seed=settings.seed, scaler=scaler,
            )  # fmt: skip
            stack.enter_context(again_and_again(doer.act, TICK_S, "harm"))
        pictures = begin_painting() if begin_painting else None
        answers = run_load(target, clock, settings, observed)
        time.sleep(ANNOUNCED_S)
        observer.look()
    outcome = report_load(answers, settings, observed, slo)
    outcome.report["images"] = pictures.figures() if pictures else None
    return outcome
