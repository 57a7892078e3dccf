"""Compute a batch of steps: decode the boundary rows, run the span, encode the answers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from cloud_worker.loop.batcher import Task
from cloud_worker.loop.together import run_together
from cloud_worker.text.stage import TextStage
from common.codecs.calibration import Calibration
from common.codecs.codec import Codec, make_codec
from common.codecs.spec import parse_codec
from common.errors import ProtocolError
from common.protocol.messages import BOUNDARY, PROMPT, Step
from common.spans.attention import Segment
from common.spans.fixed_groups import count_as_rows
from common.spans.span_model import SpanModel

MOST_LOGIT_BYTES = 64 << 20  # in float32, of one answer


class TextExecutor:
    """Runs the middle layers of one model for steps of several sessions at once."""

    def __init__(
        self, model: SpanModel, context: int | None, calibration: Calibration | None = None
    ) -> None:
        self.model = model
        self._context = context
        self._calibration = calibration
        self._codec = functools.lru_cache(maxsize=64)(self._make_codec)

    def _make_codec(self, name: str, direction: str) -> Codec:
        return make_codec(name, direction, self._calibration)

    def check(self, task: Task) -> None:
        """Raise a MidspanError if a step cannot be computed, whoever tries."""
        step, opening = task.step, task.text_opening
        if opening.hidden != self.model.hidden:
            raise ProtocolError(
                f"session has hidden {opening.hidden}; the model has {self.model.hidden}"
            )
        if step.rows < 1 or step.reply_rows > step.rows:
            raise ProtocolError(f"step wants {step.reply_rows} of its {step.rows} rows back")
        if step.tentative > step.rows:
            raise ProtocolError(f"step calls {step.tentative} of its {step.rows} rows tentative")
        if self._context is not None and step.end > self._context:
            raise ProtocolError(f"step ends at row {step.end}; the context has {self._context}")
        self._check_calibration(task)
        if max(step.reply_codec, *(part.codec for part in step.parts)) >= len(opening.codecs):
            raise ProtocolError(f"step names a codec beyond the {len(opening.codecs)} it opened")
        self._check_reply(task)
        for part in step.parts:
            is_rows = part.name in (BOUNDARY, PROMPT)
            if not is_rows or len(part.shape) != 1 or not part.shape[0]:
                raise ProtocolError(f"step has a part {part.name!r} {part.shape}; expected rows")
            codec = self._codec(opening.codecs[part.codec], "up")
            codec.check_body(part.body_bytes, part.shape[0], opening.hidden)
        if task.units and (sum(task.units) != step.rows or not all(task.units)):
            raise ProtocolError(f"step has {step.rows} rows, in units of {sum(task.units)}")
        announced = sum(part.body_bytes for part in step.parts)
        if len(task.body) != announced:
            raise ProtocolError(f"body has {len(task.body)} bytes; its parts need {announced}")

    def _check_reply(self, task: Task) -> None:
        """Raise ProtocolError for an answer that this part of a model cannot give."""
        codec = self._codec(task.reply_codec, "down")
        if codec.needs_uplink and len(task.opening.route) > 1:
            raise ProtocolError(
                f"codec {task.reply_codec} builds on what the edge sent, which the last of several "
                "parts does not see"
            )
        if not self.model.gives_logits:
            if codec.spec.kind == "top":
                raise ProtocolError(f"codec {task.reply_codec} is for logits; this part has none")
            return
        if not task.is_last:
            raise ProtocolError(f"part {task.part} gives logits, so none can come after it")
        if codec.spec.needs_calibration:
            raise ProtocolError(f"codec {task.reply_codec} is for boundary rows, not for logits")
        if task.reply_rows * self.model.reply_width * 4 > MOST_LOGIT_BYTES:
            raise ProtocolError(
                f"step wants the logits of {task.reply_rows} rows; at most "
                f"{MOST_LOGIT_BYTES // (4 * self.model.reply_width)} come at once"
            )

    def _check_calibration(self, task: Task) -> None:
        ours = self._calibration.fingerprint if self._calibration else "none"
        theirs = task.text_opening.calibration
        if theirs and theirs != ours:
            raise ProtocolError(
                f"the edge has calibration {theirs} and this worker {ours}; "
                "give both the same --calibration"
            )
        if not theirs and any(parse_codec(n).needs_calibration for n in task.text_opening.codecs):
            raise ProtocolError("the session names a calibrated codec but no calibration")

    def count_rows(self, task: Task) -> int:
        """What a step adds to a batch, in rows; of an exact session those that take as long."""
        units = _units(task)
        return count_as_rows(units, self.model.groups_agree) if units else task.step.rows

    def run(self, batch: Sequence[tuple[Task, TextStage]]) -> list[bytes | str]:
        """The body of each step's reply, or why there is none."""
        return run_together(batch, self._run_together, _cut_back)

    def _run_together(self, batch: Sequence[tuple[Task, TextStage]]) -> list[bytes]:
        uplinks = self._decode_all([task for task, _ in batch])
        segments = [
            Segment(stage.kv, task.step.position, task.step.rows, _marks(task.step), _units(task))
            for task, stage in batch
        ]
        rows = uplinks[0] if len(uplinks) == 1 else torch.cat(uplinks)
        tasks = [task for task, _ in batch]
        rows = rows.to(self.model.device, self.model.dtype)
        wanted = [task.reply_rows for task in tasks]
        if self.model.gives_logits:
            downs = torch.split(self.model.chosen_logits(rows, segments, wanted).float(), wanted)
        else:
            results = torch.split(self.model.run(rows, segments), [s.rows for s in segments])
            downs = tuple(r[len(r) - n :] for r, n in zip(results, wanted, strict=True))
        return self._encode_all(tasks, uplinks, downs)

    def _decode_all(self, tasks: Sequence[Task]) -> list[Tensor]:
        """The boundary rows of each step; those of single rows in one go for each codec."""
        decoded: list[Tensor | None] = [None] * len(tasks)
        singles: dict[Codec, list[int]] = {}
        for index, task in enumerate(tasks):
            if task.step.rows == 1:
                name = task.text_opening.codecs[task.step.parts[0].codec]
                singles.setdefault(self._codec(name, "up"), []).append(index)
            else:
                decoded[index] = self._decode(task)
        for codec, indices in singles.items():
            rows = codec.decode_each([tasks[i].body for i in indices], self.model.hidden)
            for index, row in zip(indices, torch.split(rows, 1), strict=True):
                decoded[index] = row
        return [rows for rows in decoded if rows is not None]

    def _encode_all(
        self, tasks: Sequence[Task], uplinks: Sequence[Tensor], downs: Sequence[Tensor]
    ) -> list[bytes]:
        """The body of each reply, of its rows; those of single rows in one go for each codec."""
        bodies: list[bytes] = [b""] * len(tasks)
        singles: dict[Codec, list[int]] = {}
        ups = [uplink[len(uplink) - len(d) :] for uplink, d in zip(uplinks, downs, strict=True)]
        for index, task in enumerate(tasks):
            codec = self._codec(task.reply_codec, "down")
            if len(downs[index]) == 1:
                singles.setdefault(codec, []).append(index)
            else:
                bodies[index] = codec.encode(downs[index], ups[index])
        for codec, indices in singles.items():
            rows, own = (torch.cat([parts[i] for i in indices]) for parts in (downs, ups))
            for index, body in zip(indices, codec.encode_each(rows, own), strict=True):
                bodies[index] = body
        return bodies

    def _decode(self, task: Task) -> Tensor:
        """The boundary rows of a step, float32 (T, D); single ones after another in one go."""
        hidden, decoded, at = task.text_opening.hidden, list[Tensor](), 0
        for (name, is_row), parts in itertools.groupby(
            task.step.parts, lambda part: (part.codec, part.shape[0] == 1)
        ):
            codec = self._codec(task.text_opening.codecs[name], "up")
            bodies, rows = list[bytes](), list[int]()
            for part in parts:
                bodies.append(task.body[at : at + part.body_bytes])
                rows.append(part.shape[0])
                at += part.body_bytes
            if is_row:
                decoded.append(codec.decode_each(bodies, hidden))
            else:
                pairs = zip(bodies, rows, strict=True)
                decoded += [codec.decode(body, count, hidden) for body, count in pairs]
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded)


def _marks(step: Step) -> tuple[tuple[int, bool], ...]:
    """Which rows are of a prompt, where the edge says so."""
    if all(part.name == BOUNDARY for part in step.parts):
        return ()
    return tuple((part.shape[0], part.name == PROMPT) for part in step.parts)


def _units(task: Task) -> tuple[int, ...]:
    """How many rows of an exact session go through at a time: those that were encoded together."""
    if not task.text_opening.exact:
        return ()
    return tuple(task.units or (part.shape[0] for part in task.step.parts))


def _cut_back(batch: Sequence[tuple[Task, TextStage]]) -> None:
    """Forget the rows that a run which failed has written."""
    for task, stage in batch:
        stage.cut_back(task.step.position)
