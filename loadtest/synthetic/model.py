"""A stand-in for a language model's layers that takes a time that one can choose.

It is a model all the same, of one number for each session: a token at position p makes of state s

    s' = (s + (token + 1) (2 p + 1)) mod 2^20        and the next token is s' mod the vocabulary.

A middle finds s in the KV row of the position before and writes s' into its own, so a row that is
lost, old, or another session's makes every token after it wrong, and what is right anybody can
compute: a load test checks each token. Rows of hidden states hold a number as 20 values of +1 and
-1 (the others are 0), which any codec carries. KV rows are as large as the model's that it stands
for, and go the same ways.

A batch takes the chosen time in the middle, whatever is in it, and sleeps meanwhile: as if each
worker had a device of its own. Head and tail take no time: each device computes its own.

Letters: T tokens (rows), D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import SettingsError
from common.protocol.messages import Service
from common.spans.attention import Segment
from common.spans.cut import Cut, parse_cut
from common.spans.kv_rows import make_layout
from common.spans.span_model import SpanModel
from common.spans.states import StateLayout
from common.weights.checkpoint import Checkpoint
from common.weights.configuration import context_length, read_config
from edge_agent.text.ends import ModelEnds

BITS = 20
MODULUS = 1 << BITS  # exact in float32, which has 24 bits
VOCABULARY = 1024
PRECISION = "float32"
POWERS = 1 << torch.arange(BITS)


def next_state(state: int, token: int, position: int) -> int:
    return (state + (token + 1) * (2 * position + 1)) % MODULUS


def write_on(prompt_ids: Sequence[int], count: int) -> list[int]:
    """The tokens that the model writes after a prompt."""
    state, ids = 0, list(prompt_ids)
    for position, token in enumerate(ids):
        state = next_state(state, token, position)
    for _ in range(count):
        ids.append(state % VOCABULARY)
        state = next_state(state, ids[-1], len(ids) - 1)
    return ids[len(prompt_ids) :]


class SyntheticOracle:
    """Counts the tokens that are others than they must be."""

    def count_wrong(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> int:
        want = write_on(prompt_ids, len(token_ids))
        return sum(got != wanted for got, wanted in zip(token_ids, want, strict=True))


def write_numbers(numbers: Tensor, hidden: int) -> Tensor:
    """Whole numbers (T,) below 2^20 as rows (T, D)."""
    rows = torch.zeros(len(numbers), hidden)
    rows[:, :BITS] = ((numbers[:, None] & POWERS) != 0) * 2.0 - 1.0
    return rows


def read_numbers(rows: Tensor) -> Tensor:
    """The numbers (T,) that rows (T, D) hold; of other rows, some."""
    numbers: Tensor = ((rows[:, :BITS] > 0) * POWERS).sum(dim=1)
    return numbers


@dataclass(frozen=True, slots=True)
class Shape:
    """What a stand-in has of the model that it stands for."""

    name: str
    cut: Cut
    num_layers: int
    hidden: int
    key_heads: int
    head_size: int
    context: int | None

    @property
    def fingerprint(self) -> str:
        """Never that of a real model: their workers and these do not mix."""
        return f"synthetic-{self.name}-{self.hidden}"

    def service(self) -> Service:
        """What workers announce."""
        name = f"synthetic {self.name}"
        return Service(self.fingerprint, name, str(self.cut.middle), self.hidden, PRECISION)


def read_shape(directory: Path, cut_text: str | None) -> Shape:
    """Of a Hugging Face directory; its weights are not read. Raises CheckpointError."""
    checkpoint = Checkpoint(directory)
    config = read_config(checkpoint)
    name = checkpoint.name
    checkpoint.close()
    if config.hidden_size < BITS:
        raise SettingsError(f"{name} is {config.hidden_size} wide; a stand-in needs {BITS}")
    heads = config.num_attention_heads
    return Shape(
        name=name,
        cut=parse_cut(cut_text, config.num_hidden_layers),
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        context=context_length(config),
    )


class SyntheticSpan(SpanModel):
    """Head, middle or tail, with the interface of layers that were loaded."""

    def __init__(self, shape: Shape, layers: int, batch_s: float = 0.0) -> None:
        """`layers` have KV rows; a batch takes `batch_s`."""
        self.hidden, self.dtype, self.device = shape.hidden, torch.float32, torch.device("cpu")
        self.packs_sessions, self.gives_logits = True, False
        self.reply_width = shape.hidden
        size = (shape.key_heads, shape.head_size)
        self.layout = make_layout([(size, size)] * layers, self.dtype)
        self.states_layout = StateLayout()
        self.stream = None  # no weights that could get lost
        self._batch_s = batch_s

    @torch.inference_mode()
    def embed_and_run(self, token_ids: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Head: token ids (sum of T,) to rows (…, D)."""
        for segment in segments:
            segment.kv.length = segment.end
        return write_numbers(token_ids, self.hidden)

    @torch.inference_mode()
    def run(self, rows: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Middle: rows (sum of T, D) of sessions to the states after them."""
        until = time.monotonic() + self._batch_s
        tokens = read_numbers(rows).tolist()
        states: list[int] = []
        for segment in segments:
            states += self._go_on(segment, tokens[len(states) : len(states) + segment.rows])
        result = write_numbers(torch.tensor(states), self.hidden)
        time.sleep(max(0.0, until - time.monotonic()))
        return result

    def _go_on(self, segment: Segment, tokens: Sequence[int]) -> list[int]:
        """The states of one session after each of these tokens, which go into its KV rows."""
        kv, start = segment.kv, segment.start
        kv.reserve(segment.end)
        state = int(kv.buffer[start - 1, 0].item()) if start else 0
        states = []
        for position, token in enumerate(tokens, start=start):
            state = next_state(state, token, position)
            states.append(state)
        kv.buffer[start : segment.end, 0] = torch.tensor(states, dtype=self.dtype)
        kv.length = segment.end
        return states

    @torch.inference_mode()
    def chosen_logits(
        self, rows: Tensor, segments: Sequence[Segment], wanted: Sequence[int]
    ) -> Tensor:
        """Tail: rows of sessions (sum of T, D) to the logits after some of each's last, (n, V)."""
        for segment in segments:
            segment.kv.length = segment.end
        parts = torch.split(rows, [segment.rows for segment in segments])
        chosen = [part[len(part) - n :] for part, n in zip(parts, wanted, strict=True)]
        return self._score(torch.cat(chosen))

    def logits(self, rows: Tensor, segment: Segment, last: int = 1) -> Tensor:
        """Tail: rows (T, D) to the logits after the last ones, (last, V)."""
        return self.chosen_logits(rows, [segment], [last])

    def _score(self, rows: Tensor) -> Tensor:
        tokens = read_numbers(rows) % VOCABULARY
        return torch.zeros(len(rows), VOCABULARY).scatter_(1, tokens[:, None], 1.0)


def make_ends(directory: Path, shape: Shape) -> ModelEnds:
    """Head and tail, which compute nothing and keep no KV."""
    return ModelEnds(
        name=shape.name, directory=directory, fingerprint=shape.fingerprint, cut=shape.cut,
        hidden=shape.hidden, context=shape.context, vocabulary=VOCABULARY, eos_ids=frozenset(),
        head=SyntheticSpan(shape, layers=0), tail=SyntheticSpan(shape, layers=0),
        layers=shape.num_layers,
    )  # fmt: skip
