"""A model cut as for a pool, in one process: what its operator sees of a session.

Rows cross the cut through the codecs of a session, encoded and decoded, so what is attacked is
what a worker has in memory. No pool is needed for that, for a pool changes none of these values.

Letters: T tokens, D width of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.codecs.codec import Codec, make_codec
from common.spans.attention import Segment
from common.spans.cut import Span
from common.spans.kv_rows import KvRows
from common.spans.span_model import SpanModel
from common.weights.checkpoint import Checkpoint
from common.weights.loading import load_span
from edge_agent.commands.codec_options import CodecChoice
from edge_agent.text.ends import EndCaches, Scores, load_ends

TOKENS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Codecs:
    """Of both directions, under the name that a user gave them."""

    name: str
    up: Codec
    down: Codec


@dataclass(frozen=True, slots=True)
class Conversation:
    """A session: the tokens whose rows went up, and the rows, as the pool had them."""

    token_ids: list[int]
    prompt_tokens: int
    up: Tensor  # (T, D)
    down: Tensor  # (T, D), or (T, vocabulary) of a model without a tail on the device


class SplitModel:
    """Raises CheckpointError or SettingsError, as `load_ends`."""

    def __init__(self, directory: Path, span_text: str | None = None) -> None:
        self.ends = load_ends(directory, span_text)
        cut = self.ends.cut
        checkpoint = Checkpoint(directory)
        self._middle = load_span(checkpoint, cut.middle, part="middle" if cut.has_tail else "tail")
        self.embeddings = _embed_all(checkpoint, self.ends.vocabulary)  # (V, D)
        checkpoint.close()

    @property
    def name(self) -> str:
        return str(self.ends.cut.middle)

    def make_codecs(self, name: str, calibration: Path | None = None) -> Codecs:
        """`name` is one codec, or UP,DOWN. Raises SettingsError without a needed calibration."""
        choice = CodecChoice(name, calibration=calibration)
        known = choice.find_calibration(self.ends)
        up, down = choice.split()[:2]
        return Codecs(name, make_codec(up, "up", known), make_codec(down, "down", known))

    def send(self, token_ids: Sequence[int], codecs: Codecs) -> Tensor:
        """What arrives of a prompt: rows (T, D)."""
        return cross(codecs.up, self.ends.run_heads([(token_ids, self.ends.new_caches())])[0])

    def converse(self, prompt: Sequence[int], answer_tokens: int, codecs: Codecs) -> Conversation:
        """A prompt and the greedy answer to it, of so many tokens at most.

        Each token of the answer is sent up, too, as it is for the one that follows.
        """
        caches, kv = self.ends.new_caches(), self.new_kv()
        token_ids: list[int] = []
        ups, downs = [], []
        new = list(prompt)
        while new:
            up, down, scores = self.step(new, caches, kv, codecs)
            token_ids += new
            ups.append(up)
            downs.append(down)
            is_over = len(token_ids) - len(prompt) == answer_tokens
            new = [] if is_over or scores.best in self.ends.eos_ids else [scores.best]
        return Conversation(token_ids, len(prompt), torch.cat(ups), torch.cat(downs))

    def read_downlink(self, down: Tensor) -> Tensor:
        """What the model says after each row that came back: logits (T, vocabulary)."""
        return self.ends.score_tail(down, self.ends.new_caches())

    def open_reader(self, codecs: Codecs) -> Reader:
        """The whole model, to ask what comes next."""
        return Reader(self, codecs)

    def score(self, up: Tensor) -> Tensor:
        """Rows (T, D) as the pool got them to the logits after each, (T, vocabulary)."""
        return self.read_downlink(self.run_middle(up, self._middle.new_kv()))

    def step(
        self, token_ids: list[int], caches: EndCaches, kv: KvRows, codecs: Codecs
    ) -> tuple[Tensor, Tensor, Scores]:
        up = cross(codecs.up, self.ends.run_heads([(token_ids, caches)])[0])
        down = cross(codecs.down, self.run_middle(up, kv), up)
        return up, down, self.ends.run_tails([(down, caches)])[0][0]

    def new_kv(self) -> KvRows:
        """Of the middle."""
        return self._middle.new_kv()

    def run_middle(self, rows: Tensor, kv: KvRows) -> Tensor:
        """Rows (T, D) as the pool got them to those that it answers with."""
        segment = Segment(kv, kv.length, len(rows))
        if self._middle.gives_logits:
            return self._middle.logits(rows, segment, last=len(rows))
        return self._middle.run(rows, [segment])


class Reader:
    """A text that is read token by token."""

    def __init__(self, split: SplitModel, codecs: Codecs) -> None:
        self._split, self._codecs = split, codecs
        self._caches, self._kv = split.ends.new_caches(), split.new_kv()

    def read(self, token_ids: list[int]) -> Tensor:
        """What the model says comes after these: logits (vocabulary,)."""
        return self._split.step(token_ids, self._caches, self._kv, self._codecs)[2].logits


def cross(codec: Codec, rows: Tensor, uplink: Tensor | None = None) -> Tensor:
    """Rows (T, D) as they are on the other side."""
    if not codec.needs_uplink:
        uplink = None
    count, width = rows.shape
    return codec.decode(codec.encode(rows, uplink), count, width, uplink=uplink)


def run_each(head: SpanModel, token_ids: Sequence[int], before: Sequence[int] = ()) -> Tensor:
    """The row of each token as if a text were `before` and it alone: (n, D)."""
    rows = []
    length = len(before) + 1
    for at in range(0, len(token_ids), TOKENS_AT_ONCE):
        part = token_ids[at : at + TOKENS_AT_ONCE]
        tokens = torch.tensor([[*before, token] for token in part])
        segments = [Segment(head.new_kv(), 0, length) for _ in part]
        rows.append(head.embed_and_run(tokens.flatten(), segments)[length - 1 :: length])
    return torch.cat(rows)


def _embed_all(checkpoint: Checkpoint, vocabulary: int) -> Tensor:
    """The embedding of every token, (V, D): a head without layers."""
    return run_each(load_span(checkpoint, Span(0, 0), part="head"), range(vocabulary))
