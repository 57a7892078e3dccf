"""An engine that computes for seconds at a time takes nobody for silent whom it did not hear."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import pytest
from torch import Tensor

from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.engine import Engine
from edge_agent.engine.exchange import ASKED_S, SILENCE_S
from edge_agent.engine.link import BrokerLink
from edge_agent.text.ends import EndCaches, ModelEnds
from edge_agent.text.session_settings import uniform_settings

PROMPT = [3, 4, 5, 6]  # few bytes: what travels long may be silent for long
HEAD_S = max(SILENCE_S, ASKED_S) + 0.2


@dataclass(frozen=True)
class SlowEnds(ModelEnds):
    """Each batch of heads takes longer than silence may last."""

    def run_heads(
        self, batch: Sequence[tuple[Sequence[int], EndCaches]], prompts: Sequence[bool] = ()
    ) -> list[Tensor]:
        time.sleep(HEAD_S)
        return ModelEnds.run_heads(self, batch, prompts)


@pytest.mark.long
def test_a_broker_that_spoke_while_the_engine_was_busy_is_not_given_up(
    demo_ends: ModelEnds, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up: list[str] = []
    use_next = BrokerLink.use_next

    def note_and_use_next(link: BrokerLink) -> None:
        given_up.append(link.broker)
        use_next(link)

    monkeypatch.setattr(BrokerLink, "use_next", note_and_use_next)
    ends = SlowEnds(**{field.name: getattr(demo_ends, field.name) for field in fields(demo_ends)})
    settings = uniform_settings("int8")
    with LocalPool(PoolSettings(workers=1, model="stories-llama")) as pool:
        (worker,) = pool.workers.values()
        watcher = pool.connect()
        with Engine(ends, [pool.edge_endpoint], settings) as engine:
            first = engine.submit(PROMPT, 1)
            time.sleep(HEAD_S / 2)
            worker.signal(signal.SIGSTOP)
            while not watcher.status()["sessions"]:  # until its step is under way
                time.sleep(0.01)
            others = []
            for _ in range(3):  # each has its head computed alone, one after another
                others.append(engine.submit(PROMPT, 1))
                time.sleep(HEAD_S / 2)
            time.sleep(2 * HEAD_S)
            worker.signal(signal.SIGCONT)
            tokens = [len(list(stream)) for stream in (first, *others)]
        watcher.close()
    assert tokens == [1] * 4
    assert given_up == []
