"""Answers to the predefined prompts over pools of their own: with all neurons, and with a choice.

What is published for models with chosen neurons is measured on batches of 16, five times; so these
are the defaults. Each pool is a broker and one worker on one thread, beside the edge in here.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.console.neuron_options import NeuronOptions
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.engine import Engine
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tasks import TASKS, Example
from edge_agent.text.tokenizer import TextTokenizer

ALL, CHOSEN = "all neurons", "chosen"


@dataclass(frozen=True, slots=True)
class Round:
    """One batch of answers."""

    texts: Sequence[Sequence[int]]  # of new tokens
    first_token_s: float  # until all had one
    tokens_per_s: float  # after that, of all together


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the worker's process, and of the weights in it and at the edge, in MB."""

    resident_mb: float
    peak_mb: float
    edge_weights_mb: float


class Answering:
    """A pool, and an engine that has prompts answered by it."""

    def __init__(self, pool: LocalPool, ends: ModelEnds, engine: Engine) -> None:
        self._pool, self._ends, self._engine = pool, ends, engine

    @property
    def context(self) -> int:
        """The longest text of the model."""
        return self._ends.context or 1 << 20

    def answer(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Round:
        """All prompts at once, by the likeliest tokens."""
        begun_at = time.monotonic()
        streams = [self._engine.submit(list(ids), new_tokens) for ids in prompts]
        answers = [list(stream) for stream in streams]
        took_s = time.monotonic() - begun_at
        first_s = max(tokens[0].at_s for tokens in answers)
        later = sum(len(tokens) - 1 for tokens in answers)
        texts = [[token.token_id for token in tokens] for tokens in answers]
        return Round(texts, first_s, later / max(took_s - first_s, 1e-9))

    def measure_memory(self) -> Memory:
        """Raises OSError where the system has no /proc."""
        (worker,) = self._pool.workers.values()
        status = Path(f"/proc/{worker.pid}/status").read_text()
        resident, peak = (
            int(status.split(f"{name}:")[1].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")
        )
        parts = [self._ends.head, self._ends.tail]
        stored = sum(sum(getattr(part, "bytes_read", {}).values()) for part in parts)
        return Memory(round(resident, 1), round(peak, 1), round(stored / 1e6, 1))


@contextmanager
def open_pool(directory: Path, span: str | None, options: NeuronOptions) -> Iterator[Answering]:
    """Raises CheckpointError, SettingsError."""
    ends = load_ends(directory, span, neurons=options.read())
    settings = PoolSettings(
        workers=1, model=str(directory), span=str(ends.cut.middle),
        neuron_options=options.to_words(),
    )  # fmt: skip
    with (
        LocalPool(settings) as pool,
        Engine(ends, [pool.edge_endpoint], uniform_settings("fp32"), timeout_s=600) as engine,
    ):
        yield Answering(pool, ends, engine)


def kinds_of(options: NeuronOptions) -> dict[str, NeuronOptions]:
    """What is compared: all neurons, and where any are named those."""
    kinds = {ALL: NeuronOptions()}
    return kinds | ({CHOSEN: options} if options.neuron_files else {})


def draw_prompts(tokenizer: TextTokenizer, count: int, most_tokens: int) -> list[list[int]]:
    """So many prompts: the examples of all tasks in turn, each cut to a length."""
    asked = [task.ask(example.given) for task in TASKS.values() for example in task.examples]
    return [
        tokenizer.encode(text)[:most_tokens]
        for text in itertools.islice(itertools.cycle(asked), count)
    ]


def summarize_rounds(rounds: Sequence[Round]) -> tuple[float, float]:
    """Median seconds to the first tokens, and median tokens a second after them."""
    return (
        statistics.median(each.first_token_s for each in rounds),
        statistics.median(each.tokens_per_s for each in rounds),
    )


def overlap_of_words(answer: str, example: Example) -> float:
    """F1 of the words of an answer and of the one that would do, each as often as it is there."""
    said, wanted = (Counter(text.lower().split()) for text in (answer, example.answer))
    common = (said & wanted).total()
    return 2 * common / (said.total() + wanted.total()) if common else 0.0


def share_alike(one: Sequence[int], other: Sequence[int]) -> float:
    """The part of an answer up to the first token in which another one differs."""
    pairs = zip(one, other, strict=False)
    alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return alike / max(len(one), len(other), 1)
