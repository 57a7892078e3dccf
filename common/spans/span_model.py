"""Some consecutive layers of a model, loaded and ready to run rows of several sessions.

See common/weights/loading.py for how they are cut out of a Hugging Face model.

Letters: T tokens (rows), D width of a row.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import CheckpointError, in_one_line
from common.neurons.span_neurons import SpanNeurons
from common.spans.attention import (
    ATTENTION_NAME,
    Keeping,
    PackedCache,
    ProbeCache,
    Segment,
    register_attention,
)
from common.spans.cut import Span
from common.spans.fixed_groups import ROWS, Pass, agree, draw_caches, draw_rows, fill_up
from common.spans.kv_pool import SlotPool
from common.spans.kv_rows import KvRows, make_layout, slot_bytes
from common.spans.layer_stream import LayerStream
from common.spans.passage import Gate, name_cache, takes
from common.spans.states import RECURRENT, State, StateLayout, States, layout_of

log = logging.getLogger("midspan.model")

RESERVE_ROWS = 4096  # of KV for which a pool has memory ready
FORGETFUL_LAYERS = {"moe", "mlp"}  # without attention, keep nothing
STATE_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}  # keep one state of a text


class SpanModel:
    """Some layers of a model, with their weights, ready to run."""

    def __init__(
        self,
        decoder: nn.Module,
        causal_lm: Any,
        gate: Gate,
        span: Span,
        part: str,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        packs: bool,
        bytes_read: dict[str, int],
        stream: LayerStream | None = None,
        neurons: SpanNeurons | None = None,
    ) -> None:
        self.span = span
        self.stream = stream  # of layers that take turns in memory
        self.hidden = gate.boundary.width
        self.gives_logits = part == "tail"
        self.reply_width = causal_lm.config.vocab_size if self.gives_logits else self.hidden
        self.dtype = dtype
        self.device = torch.device(device)
        self.bytes_read = bytes_read  # of what stays, by the tensor's name in the checkpoint
        self.neurons = neurons  # of layers that have some of theirs only
        self._gate = gate
        self._part = part
        self._decoder = decoder
        self._causal_lm = causal_lm
        self._positions_are_given = takes(decoder, "position_ids")
        self._rows_are_chosen = takes(causal_lm, "logits_to_keep")
        self._cache_name = name_cache(decoder)
        self._keeping = Keeping(span.first, chunks=_chunks(causal_lm.config))
        self.states_layout = StateLayout()
        self.goes_by_row = False  # from a state on
        self.layout = make_layout([], dtype)
        self.packs_sessions = self._probe(packs)

    def new_kv(self, pool: SlotPool | None = None) -> KvRows:
        """An empty KV cache for one session, in a pool's slots if there is one."""
        states = States(self.states_layout, self.device) if self.keeps_states else None
        return KvRows(self.layout, self.device, pool, states)

    @property
    def keeps_states(self) -> bool:
        """Whether some layers keep a state of the whole text, and no rows."""
        return bool(self.states_layout.names)

    def new_pool(self, limit_bytes: int) -> SlotPool | None:
        """Memory for the KV of many sessions; None if they are elsewhere than in the CPU's."""
        if self.device.type != "cpu" or not self.layout.row_bytes:
            return None
        reserve_bytes = min(RESERVE_ROWS * self.layout.row_bytes, limit_bytes // 2)
        return SlotPool(slot_bytes(self.layout), limit_bytes, reserve_bytes)

    @torch.inference_mode()
    def embed_and_run(self, token_ids: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Head only: token ids (sum of T,) of sessions, one after another, to rows (…, D)."""
        assert self._part == "head", "only the head holds the embeddings"
        return self.run(token_ids.to(self.device), segments)

    @torch.inference_mode()
    def run(self, rows: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Boundary rows of one or more sessions, one after another: (sum of T, D) to the same.

        The KV of the new rows is written into the segments' caches; their `length` is set.
        """
        outputs = []
        for each in self._by_pass(rows, segments):
            outputs.append(self._pass(each)[: len(each.rows) - each.pads])
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _pass(self, each: Pass) -> Tensor:
        """Of head or middle."""
        cache = self._open_cache(each.segments)
        ids = each.rows[None] if self._part == "head" else self._enter(each.rows)
        self._decoder(input_ids=ids, **self._arguments(cache))
        return self._finish(cache)

    @torch.inference_mode()
    def chosen_logits(
        self, rows: Tensor, segments: Sequence[Segment], wanted: Sequence[int]
    ) -> Tensor:
        """Tail only: rows of sessions (sum of T, D) to the logits after some of each, (sum, V).

        `wanted` says of each session after how many of its last rows.
        """
        counts = self._count_by_pass(segments, wanted)
        outputs = []
        for each in self._by_pass(rows, segments):
            chosen = self._choose(each.own, counts)
            if each.is_group:
                logits = self._pass_group(each)[: len(each.own)]
                outputs.append(logits[-chosen:] if isinstance(chosen, int) else logits[chosen])
            else:
                outputs.append(self._run_tail(each.rows, each.segments, chosen))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _choose(self, group: Sequence[Segment], counts: Iterator[int]) -> int | Tensor:
        """Which rows of a pass are wanted: so many of its last, or the indices of all."""
        wanted = list(itertools.islice(counts, len(group)))
        if len(group) == 1 and wanted[0]:
            return wanted[0]
        ends = itertools.accumulate(segment.rows for segment in group)
        indices = [
            row for end, count in zip(ends, wanted, strict=True) for row in range(end - count, end)
        ]
        return torch.tensor(indices, dtype=torch.long, device=self.device)

    @torch.inference_mode()
    def logits(self, rows: Tensor, segment: Segment, last: int = 1) -> Tensor:
        """Tail only: boundary rows (T, D) to the logits after the last ones, (last, vocabulary)."""
        return self.chosen_logits(rows, [segment], [last])

    def _by_pass(self, rows: Tensor, segments: Sequence[Segment]) -> list[Pass]:
        """What goes through in one pass: all sessions, or one at a time where they cannot.

        Of exact sessions it is a unit, in memory of its own, for where rows lie may matter as well;
        single rows share a group of fixed size where that changes no bit.
        """
        if self.keeps_states:
            for segment in segments:
                assert segment.kv.states is not None
                segment.kv.states.begin(segment.rows)
        groups: list[list[Segment]] = []
        for part in itertools.chain.from_iterable(map(self._split, segments)):
            if groups and self._may_join(groups[-1], part):
                groups[-1].append(part)
            else:
                groups.append([part])
        counts = [sum(segment.rows for segment in group) for group in groups]
        parts = [rows] if len(groups) == 1 else torch.split(rows, counts)
        return [self._make_pass(part, group) for part, group in zip(parts, groups, strict=True)]

    def _may_join(self, group: list[Segment], part: Segment) -> bool:
        if not part.units:
            return self.packs_sessions and not group[-1].units
        is_single = part.units == group[-1].units == (1,)
        return is_single and len(group) < ROWS and self.groups_agree

    def _make_pass(self, rows: Tensor, group: list[Segment]) -> Pass:
        if group[0].units == (1,) and self.groups_agree:
            return fill_up(rows, group, self._nowhere)
        return Pass(rows.clone() if group[0].units else rows, group)

    @functools.cached_property
    def _nowhere(self) -> KvRows:
        return self.new_kv()

    @functools.cached_property
    @torch.inference_mode()
    def groups_agree(self) -> bool:
        """Whether single rows of exact sessions may share a group; tried when the first come."""
        packs = self.packs_sessions and not self.keeps_states and not self._keeping.expands
        if not packs or self.neurons is not None or self.stream is not None:
            return False
        vocabulary = self._causal_lm.config.vocab_size if self._part == "head" else 0
        values = draw_rows(self.hidden, self.dtype, vocabulary).to(self.device)
        most = getattr(self._causal_lm.config, "max_position_embeddings", None) or 2 * ROWS
        caches = draw_caches(self.new_kv, most)
        return agree(self._causal_lm, values, caches, self._pass_group)

    def _pass_group(self, each: Pass) -> Tensor:
        """What comes of all rows of a group: of the LM head, too, for that is a product as well."""
        if self._part == "tail":
            return self._run_tail(each.rows, each.segments, ROWS)
        return self._pass(each)

    def _split(self, segment: Segment) -> list[Segment]:
        """A session's rows by pass: by unit where it is exact.

        And one by one where the library can go on from a state so only.
        """
        parts, at = [segment], segment.start
        if segment.units:
            parts = []
            for index, rows in enumerate(segment.units):
                parts.append(
                    Segment(segment.kv, at, rows, segment.marks[index : index + 1], (rows,))
                )
                at += rows
        if not self.goes_by_row:
            return parts
        return [each for part in parts for each in self._by_row(part)]

    def _by_row(self, segment: Segment) -> list[Segment]:
        if segment.start == 0:
            return [segment]
        units, rows = (1,) if segment.units else (), range(segment.start, segment.end)
        return [Segment(segment.kv, row, 1, units=units) for row in rows]

    def _count_by_pass(self, segments: Sequence[Segment], wanted: Sequence[int]) -> Iterator[int]:
        """Of how many last rows of each part of `_split` logits are wanted."""
        for segment, count in zip(segments, wanted, strict=True):
            left = segment.rows
            for part in self._split(segment):
                left -= part.rows
                yield min(max(0, count - left), part.rows)

    def _open_cache(self, segments: list[Segment]) -> PackedCache:
        cache = PackedCache(segments, self._keeping)
        if self.neurons is not None:
            self.neurons.begin(segments, [s.kv.states for s in segments], cache.passes)
        return cache

    def _enter(self, rows: Tensor) -> Tensor:
        """Let rows enter at the first layer; returns what stands for their tokens, (1, T)."""
        self._gate.enter(rows.to(self.device))
        return torch.zeros(1, rows.shape[0], dtype=torch.long, device=self.device)

    def _close(self, cache: PackedCache) -> None:
        cache.finish()
        if self.neurons is not None:
            self.neurons.end()

    def _finish(self, cache: PackedCache) -> Tensor:
        self._close(cache)
        return self._gate.take()

    def _run_tail(self, rows: Tensor, segments: list[Segment], wanted: int | Tensor) -> Tensor:
        assert self._part == "tail", "only the tail holds the LM head"
        chosen = {"logits_to_keep": wanted} if self._rows_are_chosen else {}
        cache = self._open_cache(segments)
        output = self._causal_lm(input_ids=self._enter(rows), **chosen, **self._arguments(cache))
        self._close(cache)
        logits: Tensor = output.logits[0]
        if self._rows_are_chosen:
            return logits
        return logits[-wanted:] if isinstance(wanted, int) else logits[wanted]

    def _arguments(self, cache: PackedCache) -> dict[str, Any]:
        positions = [position for s in cache.segments for position in range(s.start, s.end)]
        return self._arguments_with(cache, positions, self.packs_sessions)

    def _arguments_with(
        self, cache: PackedCache | ProbeCache, positions: list[int], packs: bool
    ) -> dict[str, Any]:
        arguments: dict[str, Any] = {self._cache_name: cache, "use_cache": True}
        if self._positions_are_given:
            arguments["position_ids"] = torch.tensor([positions], device=self.device)
        if packs:
            arguments["packed"] = cache
        return arguments

    def _probe(self, packs: bool) -> bool:
        """Whether sessions share a pass; finds out what each layer keeps of a text.

        Raises CheckpointError if the layers run in none of the ways that we know: with our
        attention, with the one that the library takes by itself, and with its plainest.
        """
        config = self._causal_lm.config
        by_itself = config._attn_implementation
        packs &= bool(getattr(self._causal_lm, "_supports_attention_backend", False))
        reasons = []
        for name in [ATTENTION_NAME] * packs + list(dict.fromkeys([by_itself, "eager"])):
            if name == ATTENTION_NAME:
                register_attention()
            config._attn_implementation = name
            try:
                self._probe_layout(packs=name == ATTENTION_NAME)
                return bool(name == ATTENTION_NAME)
            except Exception as error:  # whatever a foreign model's code raises
                log.debug("%s attention: %s", name, error)
                reasons.append(in_one_line(error))
        raise CheckpointError(
            f"{config.model_type} models have layers that cannot be run here: {reasons[-1]}"
        )

    @torch.inference_mode()
    def _probe_layout(self, packs: bool) -> None:
        """Run one row through, to see what each layer puts into its cache."""
        cache = ProbeCache()
        if len(self.span):
            self._decoder(input_ids=self._enter_any(1), **self._arguments_with(cache, [0], packs))
            types = _types_of(self._causal_lm.config, self.span)
            if not cache.shapes and not cache.states.values and not types <= FORGETFUL_LAYERS:
                raise ValueError("they keep nothing of a text in the library's cache")
        if packs and cache.attended != cache.shapes.keys():
            raise ValueError("not all of its attention goes through the library's interface")
        self._keeping = replace(self._keeping, expands=packs and cache.expands)
        nothing = ((0, 0), (0, 0))
        layers = range(self.span.first, self.span.last)
        stateful = {layer for layer, _, _ in cache.states.values}
        self._check_states(stateful, packs)
        votes = self.neurons.no_votes() if self.neurons is not None else {}
        if stateful and votes:
            raise ValueError("its layers keep a state of the whole text, which no core goes with")
        self.states_layout = layout_of(cache.states.values | votes)
        foreign = (cache.shapes.keys() | stateful) - set(layers)
        if foreign:
            raise ValueError(f"its layers keep what belongs to layer {min(foreign)}")
        self.layout = make_layout([cache.shapes.get(n, nothing) for n in layers], self.dtype)
        self.goes_by_row = bool(stateful) and not self._goes_on()

    def _enter_any(self, rows: int) -> Tensor:
        """Let some rows enter, or be embedded; returns their tokens, (1, T)."""
        if self._part == "head":
            return torch.zeros(1, rows, dtype=torch.long, device=self.device)
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(rows, self.hidden, generator=generator)  # zeros would look alike
        return self._enter(states.to(self.dtype))

    def _goes_on(self) -> bool:
        """Whether rows that go through together take up the states before them.

        The library's older state spaces do so for single rows only. It is seen by giving them
        other states: where what they leave is the same, these have not been looked at.
        """
        kv = self.new_kv()
        states = kv.states
        assert states is not None
        self._pass_any(kv, 0, 1)
        first = states.current
        self._pass_any(kv, 1, 2)
        one = states.current.values
        kv.cut_back(1)
        others = {n: v + (n[1] == RECURRENT) for n, v in first.values.items()}
        states.adopt(State(1, others))
        self._pass_any(kv, 1, 2)
        other = states.current.values
        return not any(torch.equal(one[name], other[name]) for name in one if name[1] == RECURRENT)

    def _pass_any(self, kv: KvRows, start: int, rows: int) -> None:
        cache = PackedCache([Segment(kv, start, rows)], self._keeping)
        positions = list(range(start, start + rows))
        arguments = self._arguments_with(cache, positions, packs=False)
        self._decoder(input_ids=self._enter_any(rows), **arguments)
        cache.finish()

    def _check_states(self, stateful: Set[int], packs: bool) -> None:
        """Raise ValueError for layers that keep their state in a way that we do not know."""
        if stateful and packs:
            raise ValueError("its layers keep a state of the whole text")
        types = getattr(self._causal_lm.config, "layer_types", None) or ()
        for layer, kind in enumerate(types[: self.span.last]):
            if layer >= self.span.first and kind in STATE_LAYERS and layer not in stateful:
                raise ValueError(
                    f"layer {layer} keeps its state elsewhere than in the library's cache"
                )


def _types_of(config: Any, span: Span) -> set[str]:
    """What the configuration calls the layers of a span; empty names where it does not say."""
    types = getattr(config, "layer_types", None)
    return set(types[span.first : span.last]) if types else {""}


def _chunks(config: Any) -> dict[int, int]:
    """The chunk size of each layer that sees its own chunk of a text only."""
    types = getattr(config, "layer_types", None) or ()
    chunked = [index for index, type_ in enumerate(types) if type_ == "chunked_attention"]
    return dict.fromkeys(chunked, config.attention_chunk_size) if chunked else {}
