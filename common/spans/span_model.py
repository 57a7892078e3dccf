"""Some consecutive layers of a model, loaded and ready to run rows of several sessions.

See common/weights/loading.py for how they are cut out of a Hugging Face model.

Letters: T tokens (rows), D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from common.errors import CheckpointError
from common.spans.attention import PackedCache, Segment
from common.spans.cut import Span
from common.spans.kv_pool import SlotPool
from common.spans.kv_rows import KvLayout, KvRows, make_layout, slot_bytes

RESERVE_ROWS = 4096  # of KV for which a pool has memory ready


class SpanModel:
    """Some layers of a model, with their weights, ready to run."""

    def __init__(
        self,
        decoder: nn.Module,
        causal_lm: nn.Module | None,
        embedding: nn.Module | None,
        span: Span,
        hidden: int,
        dtype: torch.dtype,
        packs: bool,
        bytes_read: dict[str, int],
    ) -> None:
        self.span = span
        self.hidden = hidden
        self.dtype = dtype
        self.packs_sessions = packs  # several sessions in one pass; else one at a time
        self.bytes_read = bytes_read  # by the tensor's name in the checkpoint
        self._decoder = decoder
        self._causal_lm = causal_lm
        self._embedding = embedding
        self.device = next(decoder.parameters(), torch.empty(0)).device
        self.layout = self._probe_layout()

    def new_kv(self, pool: SlotPool | None = None) -> KvRows:
        """An empty KV cache for one session, in a pool's slots if there is one."""
        return KvRows(self.layout, self.device, pool)

    def new_pool(self, limit_bytes: int) -> SlotPool | None:
        """Memory for the KV of many sessions; None if they are elsewhere than in the CPU's."""
        if self.device.type != "cpu" or not self.layout.row_bytes:
            return None
        reserve_bytes = min(RESERVE_ROWS * self.layout.row_bytes, limit_bytes // 2)
        return SlotPool(slot_bytes(self.layout), limit_bytes, reserve_bytes)

    @torch.inference_mode()
    def embed_and_run(self, token_ids: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Head only: token ids (sum of T,) of sessions, one after another, to rows (…, D)."""
        assert self._embedding is not None, "only the head holds the embeddings"
        token_ids = token_ids.to(self.device)
        if self.packs_sessions or len(segments) == 1:
            return self._run({"input_ids": token_ids[None]}, list(segments))
        parts = torch.split(token_ids, [segment.rows for segment in segments])
        outputs = [
            self._run({"input_ids": part[None]}, [segment])
            for part, segment in zip(parts, segments, strict=True)
        ]
        return torch.cat(outputs)

    @torch.inference_mode()
    def run(self, rows: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Boundary rows of one or more sessions, one after another: (sum of T, D) to the same.

        The KV of the new rows is written into the segments' caches; their `length` is set.
        """
        if self.packs_sessions or len(segments) == 1:
            return self._run({"inputs_embeds": rows[None]}, list(segments))
        parts = torch.split(rows, [segment.rows for segment in segments])
        outputs = [
            self._run({"inputs_embeds": part[None]}, [segment])
            for part, segment in zip(parts, segments, strict=True)
        ]
        return torch.cat(outputs)

    @torch.inference_mode()
    def last_logits(self, rows: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Tail only: rows of sessions (sum of T, D) to the logits after each one's last, (n, V)."""
        if len(segments) == 1:
            return self.logits(rows, segments[0])
        if not self.packs_sessions:
            parts = torch.split(rows, [segment.rows for segment in segments])
            pairs = zip(parts, segments, strict=True)
            return torch.cat([self.logits(part, segment) for part, segment in pairs])
        assert self._causal_lm is not None, "only the tail holds the LM head"
        counts = torch.tensor([segment.rows for segment in segments], device=self.device)
        output = self._causal_lm(
            inputs_embeds=rows[None].to(self.device),
            logits_to_keep=counts.cumsum(0) - 1,
            **self._arguments(list(segments)),
        )
        for segment in segments:
            segment.kv.length = segment.end
        logits: Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def logits(self, rows: Tensor, segment: Segment, last: int = 1) -> Tensor:
        """Tail only: boundary rows (T, D) to the logits after the last ones, (last, vocabulary)."""
        assert self._causal_lm is not None, "only the tail holds the LM head"
        arguments = self._arguments([segment])
        output = self._causal_lm(inputs_embeds=rows[None], logits_to_keep=last, **arguments)
        segment.kv.length = segment.end
        logits: Tensor = output.logits[0]
        return logits

    def _run(self, inputs: dict[str, Tensor], segments: list[Segment]) -> Tensor:
        output = self._decoder(**inputs, **self._arguments(segments))
        for segment in segments:
            segment.kv.length = segment.end
        rows: Tensor = output.last_hidden_state[0]
        return rows

    def _arguments(self, segments: list[Segment]) -> dict[str, Any]:
        cache = PackedCache(segments)
        positions = [position for s in segments for position in range(s.start, s.end)]
        arguments: dict[str, Any] = {
            "past_key_values": cache,
            "position_ids": torch.tensor([positions], device=self.device),
            "use_cache": True,
        }
        if self.packs_sessions:
            arguments["packed"] = cache
        return arguments

    @torch.inference_mode()
    def _probe_layout(self) -> KvLayout:
        """Run one row of zeros through, to see what each layer puts into its cache."""
        if not len(self.span):
            return make_layout([], self.dtype)
        cache = DynamicCache()
        position = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        if self._embedding is not None:
            inputs = {"input_ids": position}
        else:
            rows = torch.zeros(1, 1, self.hidden, dtype=self.dtype, device=self.device)
            inputs = {"inputs_embeds": rows}
        try:
            self._decoder(**inputs, past_key_values=cache, position_ids=position, use_cache=True)
        except ValueError as error:
            raise CheckpointError(f"the model's attention cannot be run here: {error}") from error
        shapes = []
        for layer in cache.layers:
            _, key_heads, _, key_size = layer.keys.shape
            _, value_heads, _, value_size = layer.values.shape
            shapes.append(((key_heads, key_size), (value_heads, value_size)))
        return make_layout(shapes, self.dtype)
