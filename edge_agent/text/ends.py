"""The two ends of a model on the device: embeddings and head layers, tail layers and LM head."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.adapters.choice import LoraChoice
from common.adapters.peft import adapt_text_model
from common.errors import CheckpointError
from common.spans.attention import Segment
from common.spans.cut import Cut, Span, parse_cut
from common.spans.kv_rows import KvRows, make_layout
from common.spans.parts import name_span
from common.spans.span_model import SpanModel
from common.spans.twin_check import check_twin
from common.weights.checkpoint import Checkpoint
from common.weights.loading import context_length, load_span, parse_dtype, read_config
from edge_agent.text.served_parts import pick_part, pick_route


@dataclass(frozen=True, slots=True)
class ModelEnds:
    """Head and tail of one model, and what is known about the whole."""

    name: str
    directory: Path
    fingerprint: str
    cut: Cut
    hidden: int
    context: int | None
    vocabulary: int  # token ids are below this
    eos_ids: frozenset[int]
    head: SpanModel
    tail: SpanModel | NoTail
    layers: int
    route: Sequence[Span] = ()  # that served the middle when the ends were loaded

    @property
    def reply_width(self) -> int:
        """Values of a row that the pool answers with: of a boundary row, or logits."""
        return self.hidden if self.cut.has_tail else self.vocabulary

    def new_caches(self) -> EndCaches:
        return EndCaches(self.head.new_kv(), self.tail.new_kv())

    def run_heads(self, batch: Sequence[tuple[Sequence[int], EndCaches]]) -> list[Tensor]:
        """Token ids (T,) of some sessions to their boundary rows (T, D), appended to the KV."""
        segments = [Segment(c.head, c.head.length, len(ids)) for ids, c in batch]
        token_ids = torch.tensor([token for ids, _ in batch for token in ids])
        rows = self.head.embed_and_run(token_ids, segments)
        return list(torch.split(rows, [segment.rows for segment in segments]))

    def run_tails(self, batch: Sequence[tuple[Tensor, EndCaches]]) -> list[Scores]:
        """Boundary rows (T, D) of some sessions to the scores after the last row of each.

        Of a model that has its tail in the pool what comes are logits (T, V).
        """
        segments = [Segment(c.tail, c.tail.length, len(rows)) for rows, c in batch]
        rows = batch[0][0] if len(batch) == 1 else torch.cat([rows for rows, _ in batch])
        logits = self.tail.last_logits(rows.to(self.tail.dtype), segments).float()
        if not self.cut.has_tail:  # rows of which no logits came are there, too
            for _, caches in batch:
                caches.tail.length = caches.head.length
        finite = torch.isfinite(logits.sum(-1)).tolist()  # a fifth of the time of looking at each
        best = logits.argmax(-1).tolist()
        return [Scores(*scores) for scores in zip(logits, best, finite, strict=True)]

    def score_tail(self, rows: Tensor, caches: EndCaches) -> Tensor:
        """Boundary rows (T, D) to the logits after each of them, (T, vocabulary)."""
        segment = Segment(caches.tail, caches.tail.length, rows.shape[0])
        return self.tail.logits(rows.to(self.tail.dtype), segment, last=rows.shape[0]).float()


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What the model says about the next token."""

    logits: Tensor  # (vocabulary,), float32
    best: int
    are_finite: bool  # for certain; a sum may leave float32 where no value does


def scores_of(logits: Tensor) -> Scores:
    """Of logits (vocabulary,), float32."""
    return Scores(logits, int(logits.argmax()), bool(torch.isfinite(logits).all()))


class NoTail:
    """Where the last worker has the LM head: what it answers are logits already."""

    dtype = torch.float32

    def new_kv(self) -> KvRows:
        return KvRows(make_layout([], self.dtype))

    def last_logits(self, rows: Tensor, segments: Sequence[Segment]) -> Tensor:
        ends = list(itertools.accumulate(segment.rows for segment in segments))
        return rows[[end - 1 for end in ends]]

    def logits(self, rows: Tensor, segment: Segment, last: int) -> Tensor:
        segment.kv.length = segment.end
        return rows[-last:]


@dataclass(slots=True)
class EndCaches:
    """The KV of one session in head and tail."""

    head: KvRows
    tail: KvRows


def load_ends(
    directory: str | Path,
    span: str | None = None,
    dtype: str = "float32",
    report: Mapping[str, Any] | None = None,
    loras: Sequence[LoraChoice] = (),
) -> ModelEnds:
    """Load head and tail from a Hugging Face directory; `span`, as `a-b`, is for the pool.

    Without it those that the pool serves, by a broker's `report`, those that a folder of parts
    leaves out, or the middle half.

    Raises CheckpointError for a directory that cannot be used, SettingsError for a bad span.
    """
    checkpoint = Checkpoint(directory)
    adapt_text_model(checkpoint, loras)
    config = read_config(checkpoint)
    num_layers = config.num_hidden_layers
    fingerprint = checkpoint.fingerprint()
    missing = checkpoint.parts.around(num_layers) if checkpoint.parts is not None else None
    if span is None and report is not None:
        span = pick_part(report, fingerprint, num_layers, missing)
    if span is None:
        span = name_span(missing)
    parsed = parse_cut(span, num_layers)
    route = pick_route(report, fingerprint, parsed.middle) if report is not None else []
    torch_dtype = parse_dtype(dtype)
    packs = check_twin(config)
    head = load_span(checkpoint, parsed.head(), torch_dtype, part="head", packs=packs)
    ends = ModelEnds(
        name=checkpoint.name,
        directory=checkpoint.directory,
        fingerprint=fingerprint,
        cut=parsed,
        hidden=head.hidden,
        context=context_length(config),
        vocabulary=config.vocab_size,
        eos_ids=_read_eos_ids(checkpoint, config.eos_token_id),
        head=head,
        tail=_load_tail(checkpoint, parsed, num_layers, torch_dtype, packs),
        layers=num_layers,
        route=route,
    )
    checkpoint.close()
    return ends


def _load_tail(
    checkpoint: Checkpoint, cut: Cut, num_layers: int, dtype: torch.dtype, packs: bool
) -> SpanModel | NoTail:
    if not cut.has_tail:
        return NoTail()
    return load_span(checkpoint, cut.tail(num_layers), dtype, part="tail", packs=packs)


def _read_eos_ids(checkpoint: Checkpoint, from_config: int | list[int] | None) -> frozenset[int]:
    """End-of-sequence tokens: the generation configuration's where there is one."""
    eos = from_config
    generation = checkpoint.read_optional_json("generation_config.json")
    if generation.get("eos_token_id") is not None:
        eos = generation["eos_token_id"]
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(item, int) for item in ids):
        raise CheckpointError(
            f"{checkpoint.directory}: eos_token_id is {str(eos)[:40]}; expected numbers of tokens"
        )
    return frozenset(ids)
