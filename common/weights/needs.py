"""What the parts of a cut model need, from the configuration and the tensors' headers alone.

The model is built on the meta device; one row goes through its layers there, so that each says
what it keeps of a token. What follows a layer's attention may look at values, which a tensor on the
meta device has none of, and fails; by then the layer has said it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from common.spans.attention import ProbeCache
from common.spans.cut import Cut, Span
from common.spans.passage import name_cache, weighted_modules
from common.spans.span_model import FORGETFUL_LAYERS
from common.weights.checkpoint import Checkpoint
from common.weights.whole_model import build_whole_model


@dataclass(frozen=True, slots=True)
class PartNeeds:
    """Bytes that a part of a model takes: of weights, and of KV for each token of each session."""

    span: Span
    weight_bytes: int
    kv_bytes: int | None  # None if a layer has not said what it keeps
    state_bytes: int = 0  # that each session takes, however long its text is


@dataclass(frozen=True, slots=True)
class Needs:
    """What the two ends, on one device, and the middle of a model need."""

    head: PartNeeds
    middle: PartNeeds
    tail: PartNeeds
    boundary: int  # values of a row between them


@dataclass(frozen=True, slots=True)
class ModelNeeds:
    """What each layer of a model needs, and what lies before and behind all of them."""

    weight_bytes: list[int]
    kv_bytes: list[int | None]
    before: int
    behind: int
    boundary: int
    state_bytes: Sequence[int] = ()  # by layer, where any has a state

    def of(self, span: Span) -> PartNeeds:
        """Of some layers alone, and what lies behind them if that belongs to the span."""
        kept = self.kv_bytes[span.first : span.last]
        kv = None if None in kept else sum(size or 0 for size in kept)
        stored = sum(self.weight_bytes[span.first : span.last])
        states = sum(self.state_bytes[span.first : span.last])
        return PartNeeds(span, stored + self.behind * span.with_end, kv, states)

    def cut(self, cut: Cut) -> Needs:
        """Of the three parts."""
        head, tail = self.of(cut.head()), self.of(cut.tail(len(self.weight_bytes)))
        return Needs(
            replace(head, weight_bytes=head.weight_bytes + self.before),
            self.of(cut.middle),
            replace(tail, weight_bytes=tail.weight_bytes + self.behind * cut.has_tail),
            self.boundary,
        )


def measure_needs(checkpoint: Checkpoint, dtype: torch.dtype) -> ModelNeeds:
    """Raises CheckpointError for a model that cannot be cut, or lacks a tensor."""
    whole = build_whole_model(checkpoint, dtype, checks_tensors=True)
    causal_lm, layers, rehearsal = whole.causal_lm, whole.layers, whole.rehearsal
    before, behind = (
        _bytes_within(causal_lm, layers, names) for names in (rehearsal.before, rehearsal.after)
    )
    stored = [
        sum(tensor.numel() * tensor.itemsize for tensor in layer.state_dict().values())
        for layer in layers
    ]
    kept, states = _kept_by_layer(causal_lm, layers, dtype)
    return ModelNeeds(
        stored, [kept.get(i) for i in range(len(layers))], before, behind, rehearsal.boundary.width,
        [states[i] for i in range(len(layers))],
    )  # fmt: skip


def _bytes_within(root: nn.Module, layers: nn.ModuleList, names: frozenset[str]) -> int:
    """Of the parameters of these modules outside the layers; those that are shared count once."""
    modules = [module for name, module in weighted_modules(root, layers) if name in names]
    parameters = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() * p.itemsize for p in parameters.values())


@torch.inference_mode()
def _kept_by_layer(
    causal_lm: Any, layers: nn.ModuleList, dtype: torch.dtype
) -> tuple[dict[int, int], Counter[int]]:
    """Bytes that each layer puts into the cache for a token, and for a text however long."""
    cache = ProbeCache()
    for layer in layers:
        layer.forward = _goes_on(layer.forward)
    causal_lm.to("meta")
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device="meta")
        causal_lm(input_ids=ids, use_cache=True, **{name_cache(causal_lm): cache})
    except Exception:  # noqa: S110 - behind the last layer there is nothing to learn
        pass
    states: Counter[int] = Counter()
    for (index, _, _), value in cache.states.values.items():
        states[index] += value.numel() * value.itemsize
    types = enumerate(getattr(causal_lm.config, "layer_types", None) or ())
    forgetful = {index: 0 for index, kind in types if kind in FORGETFUL_LAYERS}
    rows = {
        index: sum(heads * size for heads, size in shapes) * dtype.itemsize
        for index, shapes in cache.shapes.items()
    }
    return forgetful | dict.fromkeys(states, 0) | rows, states


def _goes_on(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer that hands on what it was given when its own forward fails."""

    def shielded(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        try:
            return forward(*args, **kwargs)
        except Exception:  # whatever its code raises without values
            return states

    return shielded
