"""Compute a batch of steps: decode the boundary rows, run the span, encode the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cloud_worker.batcher import Task
from cloud_worker.warm_cache import WarmSession
from common.attention import Segment
from common.codecs import find_codec
from common.errors import MidspanError, ProtocolError
from common.messages import Step
from common.span_model import SpanModel


@dataclass(frozen=True, slots=True)
class Computed:
    """What became of a step: the body of its reply, or why it failed."""

    body: bytes = b""
    failure: str = ""


class TextExecutor:
    """Runs the middle layers of one model for steps of several sessions at once."""

    def __init__(self, model: SpanModel, context: int | None) -> None:
        self.model = model
        self._context = context

    def check(self, step: Step, body: bytes) -> None:
        """Raise ProtocolError or SettingsError if a step cannot be computed, whoever tries."""
        if step.hidden != self.model.hidden:
            raise ProtocolError(f"step has hidden {step.hidden}; the model has {self.model.hidden}")
        if not step.rows >= 1 or step.reply_rows > step.rows:
            raise ProtocolError(f"step wants {step.reply_rows} of its {step.rows} rows back")
        if self._context is not None and step.end > self._context:
            raise ProtocolError(f"step ends at row {step.end}; the context has {self._context}")
        want = step.rows * find_codec(step.codec).row_bytes(step.hidden)
        if len(body) != want:
            raise ProtocolError(
                f"body has {len(body)} bytes; "
                f"{step.codec} ({step.rows}, {step.hidden}) needs {want}"
            )
        find_codec(step.reply_codec)

    def run(self, batch: Sequence[tuple[Task, WarmSession]]) -> list[Computed]:
        """Compute all steps in one pass. If that fails, each on its own, to find the culprit."""
        try:
            return self._run_together(batch)
        except (MidspanError, RuntimeError) as error:
            for task, session in batch:
                session.cut_back(task.step.position)
            if len(batch) == 1:
                return [Computed(failure=f"{type(error).__name__}: {str(error)[:500]}")]
            return [computed for pair in batch for computed in self.run([pair])]

    def _run_together(self, batch: Sequence[tuple[Task, WarmSession]]) -> list[Computed]:
        parts = [self._decode(task) for task, _ in batch]
        segments = [
            Segment(session.kv, task.step.position, task.step.rows) for task, session in batch
        ]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        results = self.model.run(rows.to(self.model.device), segments)
        computed = []
        at = 0
        for task, _ in batch:
            at += task.step.rows
            wanted = results[at - task.step.reply_rows : at]
            computed.append(Computed(find_codec(task.step.reply_codec).encode(wanted)))
        return computed

    def _decode(self, task: Task) -> torch.Tensor:
        step = task.step
        codec = find_codec(step.codec)
        return codec.decode(task.body, step.rows, step.hidden, self.model.dtype)
