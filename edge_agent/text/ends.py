"""The two ends of a model on the device: embeddings and head layers, tail layers and LM head."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.adapters.choice import LoraChoice
from common.adapters.peft import adapt_text_model
from common.errors import CheckpointError, SettingsError
from common.neurons.settings import NeuronSettings
from common.spans.attention import Segment
from common.spans.cut import Cut, Span, parse_cut
from common.spans.fixed_groups import ROWS
from common.spans.kv_rows import KvRows, make_layout
from common.spans.parts import name_span
from common.spans.span_model import SpanModel
from common.spans.twin_check import check_twin
from common.weights.checkpoint import Checkpoint
from common.weights.configuration import context_length, read_config
from common.weights.loading import Part, load_span, parse_dtype
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
    marks_prompts: bool = False  # tells the pool which rows are of prompts
    worker_words: Sequence[str] = ()  # options of workers that it meets, beside model and span

    @property
    def reply_width(self) -> int:
        """Values of a row that the pool answers with: of a boundary row, or logits."""
        return self.hidden if self.cut.has_tail else self.vocabulary

    @property
    def keeps_states(self) -> bool:
        """Whether head or tail have layers that keep a state of the whole text."""
        return self.head.keeps_states or self.tail.keeps_states

    def rows_per_pass(self, exact: bool) -> int:
        """How many single rows go through in the time of one."""
        return ROWS if exact and self.head.groups_agree else 1

    def new_caches(self, exact: bool = False) -> EndCaches:
        """Of a session; no bit of an `exact` one depends on others."""
        return EndCaches(self.head.new_kv(), self.tail.new_kv(), exact)

    def run_heads(
        self, batch: Sequence[tuple[Sequence[int], EndCaches]], prompts: Sequence[bool] = ()
    ) -> list[Tensor]:
        """Token ids (T,) of some sessions to their boundary rows (T, D), appended to the KV.

        `prompts` says of each whether it is a prompt's; without it none is.
        """
        segments = mark_prompts(
            [Segment(c.head, c.head.length, len(ids)) for ids, c in batch],
            prompts,
            [caches.exact for _, caches in batch],
        )
        token_ids = torch.tensor([token for ids, _ in batch for token in ids])
        rows = self.head.embed_and_run(token_ids, segments)
        return list(torch.split(rows, [segment.rows for segment in segments]))

    def run_tails(
        self,
        batch: Sequence[tuple[Tensor, EndCaches]],
        prompts: Sequence[bool] = (),
        wanted: Sequence[int] = (),
    ) -> list[list[Scores]]:
        """Boundary rows (T, D) of some sessions to the scores after the last rows of each.

        After so many rows as `wanted` says of each; without it after the very last. Of a model
        that has its tail in the pool what comes are logits (T, V). `prompts` as above.
        """
        segments = mark_prompts(
            [Segment(c.tail, c.tail.length, len(rows)) for rows, c in batch],
            prompts,
            [caches.exact for _, caches in batch],
        )
        wanted = wanted or [1] * len(batch)
        rows = batch[0][0] if len(batch) == 1 else torch.cat([rows for rows, _ in batch])
        logits = self.tail.chosen_logits(rows.to(self.tail.dtype), segments, wanted).float()
        if not self.cut.has_tail:  # rows of which no logits came are there, too
            for _, caches in batch:
                caches.tail.length = caches.head.length
        finite = torch.isfinite(logits.sum(-1)).tolist()  # a fifth of the time of looking at each
        best = logits.argmax(-1).tolist()
        scores = map(Scores, logits, best, finite)
        return [list(itertools.islice(scores, count)) for count in wanted]

    def score_tail(self, rows: Tensor, caches: EndCaches) -> Tensor:
        """Boundary rows (T, D) to the logits after each of them, (T, vocabulary)."""
        count = rows.shape[0]
        units = (count,) if caches.exact else ()
        segment = Segment(caches.tail, caches.tail.length, count, ((count, True),), units)
        return self.tail.logits(rows.to(self.tail.dtype), segment, last=rows.shape[0]).float()


def mark_prompts(
    segments: list[Segment], prompts: Sequence[bool], exact: Sequence[bool]
) -> list[Segment]:
    """Segments whose rows are all of a prompt where `prompts` says so.

    In exact sessions those are one unit, and other rows one each.
    """
    if not any(prompts) and not any(exact):
        return segments
    return [
        _mark(segment, is_prompt, is_exact)
        for segment, is_prompt, is_exact in zip(
            segments, prompts or [False] * len(segments), exact, strict=True
        )
    ]


def _mark(segment: Segment, is_prompt: bool, is_exact: bool) -> Segment:
    if is_prompt:
        units = (segment.rows,) if is_exact else ()
        return replace(segment, marks=((segment.rows, True),), units=units)
    return replace(segment, units=(1,) * segment.rows) if is_exact else segment


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
    keeps_states = False

    def new_kv(self) -> KvRows:
        return KvRows(make_layout([], self.dtype))

    def chosen_logits(
        self, rows: Tensor, segments: Sequence[Segment], wanted: Sequence[int]
    ) -> Tensor:
        ends = itertools.accumulate(segment.rows for segment in segments)
        return torch.cat([rows[end - n : end] for end, n in zip(ends, wanted, strict=True)])

    def logits(self, rows: Tensor, segment: Segment, last: int) -> Tensor:
        segment.kv.length = segment.end
        return rows[-last:]


@dataclass(slots=True)
class EndCaches:
    """The KV of one session in head and tail."""

    head: KvRows
    tail: KvRows
    exact: bool = False

    def cut_back(self, position: int) -> int:
        """Forget the rows from `position` on; returns how many both still have."""
        for kv in (self.head, self.tail):
            kv.cut_back(position)
        return min(self.head.length, self.tail.length)


def load_ends(
    directory: str | Path,
    span: str | None = None,
    dtype: str = "float32",
    report: Mapping[str, Any] | None = None,
    loras: Sequence[LoraChoice] = (),
    neurons: NeuronSettings | None = None,
) -> ModelEnds:
    """Load head and tail from a Hugging Face directory; `span`, as `a-b`, is for the pool.

    Without it those that the pool serves, by a broker's `report`, those that a folder of parts
    leaves out, or the middle half.

    Raises CheckpointError for a directory that cannot be used, SettingsError for a bad span.
    """
    source = _Source(directory, loras, neurons)
    ends = source.load(source.find_cut(span, report), dtype, report)
    source.close()
    return ends


def load_cuts(
    directory: str | Path,
    spans: str | None = None,
    dtype: str = "float32",
    report: Mapping[str, Any] | None = None,
    loras: Sequence[LoraChoice] = (),
    neurons: NeuronSettings | None = None,
) -> list[ModelEnds]:
    """As `load_ends`, for each of some spans, `a-b,c-d`; what two have in common is there once."""
    source = _Source(directory, loras, neurons)
    names = [None] if spans is None else spans.split(",")
    cuts = [source.find_cut(name, report) for name in names]
    for cut in cuts:
        if cuts.count(cut) > 1:
            raise SettingsError(f"--span {spans!r} names {cut.middle} twice")
    ends = [source.load(cut, dtype, report) for cut in cuts]
    source.close()
    return ends


class _Source:
    """A model that one or more pairs of ends are loaded of."""

    def __init__(
        self,
        directory: str | Path,
        loras: Sequence[LoraChoice],
        neurons: NeuronSettings | None = None,
    ) -> None:
        self._checkpoint = Checkpoint(directory)
        adapt_text_model(self._checkpoint, loras)
        self._checkpoint.choose(neurons)
        self._words = [word for lora in loras for word in lora.to_words()]
        self._words += neurons.to_words() if neurons is not None else []
        self._config = read_config(self._checkpoint)
        self._layers: int = self._config.num_hidden_layers
        self._fingerprint = self._checkpoint.fingerprint()
        self._packs: bool | None = None

    def close(self) -> None:
        self._checkpoint.close()

    def find_cut(self, span: str | None, report: Mapping[str, Any] | None) -> Cut:
        """Raises SettingsError."""
        parts, layers = self._checkpoint.parts, self._layers
        missing = parts.around(layers) if parts is not None else None
        if span is None and report is not None:
            span = pick_part(report, self._fingerprint, layers, missing)
        if span is None:
            span = name_span(missing)
        return parse_cut(span, layers)

    def load(self, cut: Cut, dtype: str, report: Mapping[str, Any] | None) -> ModelEnds:
        """Raises CheckpointError, SettingsError."""
        head = self._load_part(cut.head(), dtype, "head")
        tail = self._load_part(cut.tail(self._layers), dtype, "tail") if cut.has_tail else NoTail()
        return ModelEnds(
            name=self._checkpoint.name,
            directory=self._checkpoint.directory,
            fingerprint=self._fingerprint,
            cut=cut,
            hidden=head.hidden,
            context=context_length(self._config),
            vocabulary=self._config.vocab_size,
            eos_ids=_read_eos_ids(self._checkpoint, self._config.eos_token_id),
            head=head,
            tail=tail,
            layers=self._layers,
            route=pick_route(report, self._fingerprint, cut.middle) if report is not None else [],
            marks_prompts=self._checkpoint.neurons is not None,
            worker_words=self._words,
        )

    def _load_part(self, span: Span, dtype: str, part: Part) -> SpanModel:
        parsed = parse_dtype(dtype)
        if self._packs is None:
            self._packs = check_twin(self._config)
        return load_span(self._checkpoint, span, parsed, part=part, packs=self._packs)


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
