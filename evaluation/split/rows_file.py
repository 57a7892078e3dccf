"""A prompt's boundary rows in a file, from which an answer can be written on another day.

What the pool had of it, and the KV of the head, which the tokens that follow look back on; so
neither the prompt nor a pass through the head is needed again. It is as good as the prompt itself
to whoever has the head's weights: docs/privacy.md.

Letters: T tokens, D hidden, W values of a row of KV.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import CheckpointError, SettingsError, why_unreadable
from common.spans.kv_rows import KvRows
from edge_agent.text.ends import ModelEnds


@dataclass(frozen=True, slots=True)
class CapturedRows:
    """Of one model at one cut, as one codec left them."""

    model: str  # fingerprint
    span: str
    codec: str
    up: Tensor  # (T, D), as the pool had them
    head_kv: Tensor  # (T, W)

    def check(self, ends: ModelEnds) -> None:
        """Raises SettingsError for those of another model or cut."""
        here = (ends.fingerprint, str(ends.cut.middle))
        if (self.model, self.span) != here:
            raise SettingsError(
                f"these rows are of span {self.span} of the model with fingerprint {self.model}, "
                f"not of {here[1]} of {here[0]}"
            )


def take_head_kv(kv: KvRows) -> Tensor:
    """Raises SettingsError for a head whose layers keep states."""
    if kv.states is not None:
        raise SettingsError("rows of a head whose layers keep states are not captured")
    return kv.buffer[: kv.length].contiguous()


def restore_head_kv(kv: KvRows, rows: Tensor) -> None:
    """Into an empty one."""
    kv.reserve(len(rows))
    kv.buffer[: len(rows)] = rows
    kv.length = len(rows)


def save_rows(rows: CapturedRows, path: Path) -> None:
    about = {"model": rows.model, "span": rows.span, "codec": rows.codec}
    save_file({"up": rows.up.contiguous(), "head_kv": rows.head_kv}, path, about)


def load_rows(path: Path) -> CapturedRows:
    """Raises CheckpointError for a file that is none of these."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            words = [about[name] for name in ("model", "span", "codec")]
            up, head_kv = file.get_tensor("up"), file.get_tensor("head_kv")
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} holds no captured rows: {why_unreadable(error)}") from error
    if up.dim() != 2 or head_kv.dim() != 2 or len(up) != len(head_kv) or not len(up):
        raise CheckpointError(
            f"{path} has rows {tuple(up.shape)} and KV {tuple(head_kv.shape)}; "
            "expected as many of both"
        )
    return CapturedRows(words[0], words[1], words[2], up, head_kv)
