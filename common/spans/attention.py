"""Attention over rows of several sessions in one forward pass.

The rows of a batch lie one after another on the token axis of a batch of one; linear layers and
norms see them all at once, attention is computed per session on that session's own KV rows. No
padding, ragged lengths cost nothing, and a session's attention does not depend on its neighbours.

It plugs into transformers' attention interface under the name `midspan`; because no mask function
is registered under that name, the library builds no masks and leaves causality to us. The
arithmetic is the library's own `sdpa_attention_forward`.

Letters: T tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common.spans.capped_attention import capped_attention
from common.spans.kv_rows import KvRows, make_layout
from common.spans.states import CONVOLUTION, RECURRENT, StatePass

ATTENTION_NAME = "midspan"
# what models hand to every attention function; others would be ignored, and results be wrong
KNOWN_ARGUMENTS = {
    "dropout", "scaling", "is_causal", "position_ids", "use_cache", "output_attentions",
    "output_hidden_states", "output_router_logits", "return_dict", "cache_position",
    "logits_to_keep",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows start..start+rows of one session within a batch.

    `marks` say of how many rows after another they are of a prompt, where that makes a difference;
    rows without are of an answer.

    `units` divide the rows of an exact session, by how many go through together: these and no
    others, for how many rows a product has may move its last bits (or in a group of fixed size, see
    common/spans/fixed_groups.py). Marks are of a unit each then.
    """

    kv: KvRows
    start: int
    rows: int
    marks: tuple[tuple[int, bool], ...] = ()
    units: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.rows


@dataclass(frozen=True, slots=True)
class Keeping:
    """How the layers of a span keep and see the rows of a session.

    `expands`: attention makes its keys and values of what is kept (latent attention). `chunks`: by
    layer, how many tokens a text is divided into, of which a row sees its own part only (Llama 4).
    """

    first_layer: int = 0
    expands: bool = False
    chunks: Mapping[int, int] = field(default_factory=dict)


class _StateKeeping:
    """What transformers' Cache offers to layers that keep a state of the whole text."""

    states: StatePass

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.find((layer_idx, CONVOLUTION, state_idx))

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> Tensor:
        return self.states.convolve(
            (layer_idx, CONVOLUTION, state_idx), conv_states, conv_kernel_size
        )

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.find((layer_idx, RECURRENT, state_idx))

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0
    ) -> Tensor:
        return self.states.replace((layer_idx, RECURRENT, state_idx), recurrent_states)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False


class PackedCache(_StateKeeping):
    """Stands in for transformers' Cache while one batch goes through one span."""

    is_compileable = False

    def __init__(self, segments: list[Segment], keeping: Keeping) -> None:
        self.segments = segments
        self.expands = keeping.expands
        self.chunk: int | None = None  # of the current layer
        self.layer = 0  # of the span
        self._keeping = keeping
        self._rows = [segment.rows for segment in segments]
        self._masks: dict[tuple[int, int, int | None, int | None], Tensor] = {}
        # of one session: a span whose layers have states is run by one at a time
        self.states = StatePass(segments[0].kv.states, segments[0].start)
        self.passes: list[StatePass] = []  # of all, where they have any
        if segments[0].kv.states is not None:
            others = [StatePass(s.kv.states, s.start) for s in segments[1:]]
            self.passes = [self.states, *others]
        for segment in segments:
            segment.kv.reserve(segment.end)
        # all views at once: one by one, in each layer, they would take as long as attention
        self._write = [s.kv.write_views(s.start, s.end) for s in segments]
        self._read = [s.kv.read_views(s.end) for s in segments]

    def finish(self) -> None:
        """The batch has gone through: its rows and states are the sessions' own now."""
        for segment in self.segments:
            segment.kv.length = segment.end
        for segment, own in zip(self.segments, self.passes, strict=False):
            if segment.kv.states is not None:
                segment.kv.states.advance(segment.end, own.values)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, shape (1, H, sum of T, D), of one layer.

        Returns what the session has of that layer when there is one segment; with several the
        attention function reads each session's own, or is given what is made of all they have.
        """
        self.layer = layer_idx - self._keeping.first_layer
        self.chunk = self._keeping.chunks.get(layer_idx)
        columns = (part[0].transpose(0, 1).flatten(1) for part in (keys, values))
        new = torch.cat(tuple(columns), dim=1)  # (sum of T, values of the layer)
        for views, part in zip(self._write, new.split_with_sizes(self._rows), strict=True):
            views[self.layer].copy_(part)
        if len(self.segments) == 1:
            return self.read(0)
        if self.expands:
            kept = [self.read(index) for index in range(len(self.segments))]
            return torch.cat([k for k, _ in kept], dim=2), torch.cat([v for _, v in kept], dim=2)
        return keys, values

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, H, T, D) that a segment's session has of the current layer."""
        views = self._read[index]
        return views[2 * self.layer], views[2 * self.layer + 1]

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """Rows (1, H, sum of T, D) by segment."""
        return rows.split_with_sizes(self._rows, dim=2)

    def split_kept(self, keys: Tensor, values: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Keys and values of each segment, those that were made of all that is kept."""
        ends = [segment.end for segment in self.segments]
        parts = (kept.split_with_sizes(ends, dim=2) for kept in (keys, values))
        return list(zip(*parts, strict=True))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.segments[0].start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.segments[0].start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.segments[0].start + query_length, 0

    def first_seen(self, segment: Segment, window: int | None) -> int:
        """The first key that a segment of one row sees."""
        if self.chunk is not None:
            return segment.start // self.chunk * self.chunk
        return 0 if window is None else max(0, segment.end - window)

    def mask(self, segment: Segment, window: int | None, like: Tensor) -> Tensor | None:
        """Which keys each row may see, bool (1, 1, T, end), or None if plain causality says it."""
        widest = min(segment.end if w is None else w for w in (window, self.chunk))
        if segment.rows == 1 or (segment.start == 0 and segment.end <= widest):
            return None
        key = (segment.start, segment.rows, window, self.chunk)
        if key not in self._masks:
            queries = torch.arange(segment.start, segment.end, device=like.device)[:, None]
            keys = torch.arange(segment.end, device=like.device)[None, :]
            seen = keys <= queries
            if window is not None:
                seen &= keys > queries - window
            if self.chunk is not None:
                seen &= keys >= queries // self.chunk * self.chunk
            self._masks[key] = seen[None, None]
        return self._masks[key]


class ProbeCache(_StateKeeping):
    """Stands in for transformers' Cache while one row goes through, to see what a model keeps."""

    is_compileable = False

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}  # (H, D) by layer
        self.attended: set[int] = set()  # layers whose attention came by
        self.expands = False
        self.segments = [Segment(KvRows(make_layout([], torch.float32)), 0, 1)]
        self.states = StatePass(None, 0)
        self._last: tuple[int, Tensor, Tensor] | None = None

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        key_shape, value_shape = ((int(t.shape[1]), int(t.shape[3])) for t in (keys, values))
        if layer_idx in self.shapes or keys.shape[2] != 1:
            raise ValueError(f"layer {layer_idx} keeps something else than one row for each token")
        self.shapes[layer_idx] = key_shape, value_shape
        self._last = layer_idx, keys, values
        return keys, values

    def note(self, keys: Tensor, values: Tensor) -> None:
        """Attention came by with these: what was kept, or what was made of that."""
        if self._last is None or any(part.shape[2] != 1 for part in (keys, values)):
            raise ValueError("its attention takes other rows than it keeps")
        self.expands |= not all(map(torch.equal, self._last[1:], (keys, values)))
        self.attended.add(self._last[0])

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        assert self._last is not None
        return self._last[1:]

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        return [rows]

    def split_kept(self, keys: Tensor, values: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        return [(keys, values)]

    def first_seen(self, segment: Segment, window: int | None) -> int:
        return 0

    def mask(self, segment: Segment, window: int | None, like: Tensor) -> None:
        return None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: PackedCache | ProbeCache | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of a batch's rows, query (1, H, sum of T, D); returns (1, sum of T, H, D).

    `sliding_window` is the number of keys a row sees, itself included (Mistral, Qwen2), `softcap`
    bounds scores (Gemma 2), `s_aux` has a sink for each head (gpt-oss).
    """
    unknown = {name for name, value in kwargs.items() if value is not None} - KNOWN_ARGUMENTS
    if unknown:
        raise ValueError(f"it uses {', '.join(sorted(unknown))}, which midspan does not know")
    if packed is None:
        raise ValueError("it keeps from its attention whose rows are whose")
    if attention_mask is not None:
        raise ValueError("it makes masks of its own")
    if isinstance(packed, ProbeCache):
        packed.note(key, value)
    kept = packed.split_kept(key, value) if packed.expands else None
    outputs = []
    for index, (segment, part) in enumerate(zip(packed.segments, packed.split(query), strict=True)):
        keys, values = packed.read(index) if kept is None else kept[index]
        first = packed.first_seen(segment, sliding_window) if segment.rows == 1 else 0
        if first:
            keys, values = keys[:, :, first:], values[:, :, first:]
        mask = packed.mask(segment, sliding_window, query)
        if softcap is None and s_aux is None:
            output, _ = sdpa_attention_forward(module, part, keys, values, mask, **kwargs)
        else:
            output = capped_attention(
                part, keys, values, mask,
                scaling=kwargs.get("scaling"), softcap=softcap, sinks=s_aux,
            )  # fmt: skip
        outputs.append(output)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def register_attention() -> None:
    """Make `midspan` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
