"""An engine of a command's own: the broker is asked first, then the model's ends are loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.console.processes import set_up_torch
from common.console.waiting import waiting
from edge_agent.commands.question import Means

if TYPE_CHECKING:
    from edge_agent.engine.engine import Engine
    from edge_agent.text.cuts import CutChoice
    from edge_agent.text.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class OwnEngine:
    """What answers prompts, and how texts become tokens for it."""

    engine: Engine
    tokenizer: TextTokenizer
    name: str  # of the model
    choice: CutChoice


@contextmanager
def open_engine(means: Means) -> Iterator[OwnEngine]:
    """Raises what loading raises, and BrokerUnavailable before that."""
    client = means.connection.connect(means.timeout_s)
    report = client.status()
    client.close()
    with waiting(f"loading {means.directory.resolve().name}"):
        set_up_torch(means.threads or os.cpu_count())
        from edge_agent.engine.engine import Engine
        from edge_agent.text.cuts import CutChoice
        from edge_agent.text.ends import load_cuts
        from edge_agent.text.tokenizer import TextTokenizer

        cuts = load_cuts(
            means.directory, means.span_text, means.dtype, report, means.loras, means.neurons
        )
    choice = CutChoice(cuts, means.span_seed)
    with Engine(
        cuts[0],
        means.connection.endpoints(),
        means.codecs.read_settings(
            step_deadline_s=means.timeout_s,
            draft_tokens=means.drafts.draft_tokens,
            exact=means.exact,
        ),
        keys=means.connection.keys(),
        timeout_s=means.timeout_s,
        calibration=means.codecs.find_calibration(*cuts),
        pool_key=means.pool_key,
        choose_cut=choice,
        drafters=means.drafts.open(*cuts),
    ) as engine:
        tokenizer = TextTokenizer(means.directory, means.tokenizer)
        yield OwnEngine(engine, tokenizer, cuts[0].name, choice)
