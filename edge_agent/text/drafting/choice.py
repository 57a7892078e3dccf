"""Which drafter a session gets: as asked for, of the files that lie with the model.

`drafting/ngrams.safetensors` in the model's directory, and `drafting/layer-A-B.safetensors` for the
cut that it was trained for. They are read once for each pair of ends, not for each session.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import CheckpointError, MidspanError, SettingsError
from edge_agent.text.drafting.auto import AutoDrafter
from edge_agent.text.drafting.drafter import Drafter
from edge_agent.text.drafting.layer import LayerDrafter
from edge_agent.text.drafting.layer_file import load_layer
from edge_agent.text.drafting.layer_model import LayerModel
from edge_agent.text.drafting.lookup import LookupDrafter
from edge_agent.text.drafting.ngram import NgramDrafter
from edge_agent.text.drafting.ngram_table import ORDER, NgramTable, load_table
from edge_agent.text.drafting.own_outputs import OwnOutputs
from edge_agent.text.ends import EndCaches, ModelEnds

log = logging.getLogger("midspan.drafting")

Kind = Literal["auto", "off", "lookup", "ngram", "model"]
KINDS: tuple[Kind, ...] = ("auto", "off", "lookup", "ngram", "model")
FOLDER = "drafting"


def table_path(folder: Path) -> Path:
    return folder / "ngrams.safetensors"


def layer_path(folder: Path, span: str) -> Path:
    """`span` is what the pool computes, as `a-b`."""
    return folder / f"layer-{span}.safetensors"


@dataclass(frozen=True, slots=True)
class DraftFiles:
    """What the sessions of one pair of ends draft with."""

    kind: Kind
    table: NgramTable | None = None
    layer: LayerModel | None = None
    outputs: OwnOutputs | None = None

    def open(self, ends: ModelEnds, caches: EndCaches) -> Drafter | None:
        """A session's drafter, which guesses on its caches; None where it has none."""
        if self.kind == "off":
            return None
        if self.kind == "lookup":
            return LookupDrafter()
        layer = LayerDrafter(self.layer, ends, caches) if self.layer is not None else None
        if self.kind == "model":
            return layer
        tables = self._tables()
        if self.kind == "ngram":
            return NgramDrafter(tables)
        return AutoDrafter(NgramDrafter(tables) if tables else None, layer)

    def _tables(self) -> list[NgramTable]:
        own = self.outputs.table if self.outputs is not None else None
        return [table for table in (own, self.table) if table is not None]


class Drafters:
    """Makes the drafters of sessions; `outputs` is where what the model writes may be kept.

    Without it nothing is kept.
    """

    def __init__(self, kind: Kind = "auto", outputs: Path | None = None) -> None:
        self._kind = kind
        self._directory = outputs
        self._outputs: dict[str, OwnOutputs] = {}
        self._loaded: dict[tuple[Path, str, str], DraftFiles] = {}

    @property
    def is_demanded(self) -> bool:
        """Whether a session that cannot draft is an error: auto does what it can."""
        return self._kind not in ("auto", "off")

    def __call__(self, ends: ModelEnds, caches: EndCaches) -> Drafter | None:
        """Raises as `load`."""
        return self.load(ends).open(ends, caches)

    def load(self, ends: ModelEnds) -> DraftFiles:
        """Read what is needed for these ends, if it has not been.

        Raises CheckpointError or SettingsError where the kind that was asked for cannot be had;
        auto goes on without what cannot.
        """
        key = ends.directory, ends.fingerprint, str(ends.cut.middle)
        if key not in self._loaded:
            self._loaded[key] = self._load(ends)
        return self._loaded[key]

    def keep(self, ends: ModelEnds, prompt_ids: Sequence[int], answer: Sequence[int]) -> None:
        """Remember an answer for later sessions, if that is wanted; a full disk keeps nothing."""
        outputs = self.load(ends).outputs
        try:
            if outputs is not None and answer:
                outputs.add(prompt_ids[-ORDER:], answer)
        except OSError as error:
            log.warning("an answer was not kept in %s: %s", outputs.path if outputs else "", error)

    def _load(self, ends: ModelEnds) -> DraftFiles:
        kind = self._kind
        if kind in ("off", "lookup"):
            return DraftFiles(kind)
        if kind == "model":
            return DraftFiles(kind, layer=find_layer(ends))
        outputs = self._open_outputs(ends)
        if kind == "ngram":
            missing_is_fine = outputs is not None
            return DraftFiles(kind, find_table(ends, missing_is_fine), outputs=outputs)
        return DraftFiles(kind, _try_table(ends), _try_layer(ends), outputs)

    def _open_outputs(self, ends: ModelEnds) -> OwnOutputs | None:
        """Those of a model are one file, whatever its cut."""
        if self._directory is None:
            return None
        if ends.fingerprint not in self._outputs:
            opened = OwnOutputs(self._directory, ends.fingerprint, ends.vocabulary)
            self._outputs[ends.fingerprint] = opened
        return self._outputs[ends.fingerprint]


def find_table(ends: ModelEnds, missing_is_fine: bool = False) -> NgramTable | None:
    """Raises CheckpointError for a table that is missing or of no use."""
    path = table_path(ends.directory / FOLDER)
    if path.exists():
        return load_table(path, ends.vocabulary)
    if missing_is_fine:
        return None
    raise CheckpointError(
        f"{ends.directory} has no table of n-grams ({path.relative_to(ends.directory)}); "
        "midspan train-drafter makes one"
    )


def find_layer(ends: ModelEnds) -> LayerModel:
    """Raises SettingsError for ends that cannot draft, CheckpointError for a layer of no use."""
    reason = why_no_layer(ends)
    if reason is not None:
        raise SettingsError(f"{ends.name} cannot draft by itself: {reason}")
    span, folder = str(ends.cut.middle), ends.directory / FOLDER
    path = layer_path(folder, span)
    if path.exists():
        return load_layer(path, ends)
    others = sorted(other.stem.removeprefix("layer-") for other in folder.glob("layer-*"))
    raise CheckpointError(
        f"{ends.directory} has no trained drafter for span {span} "
        f"(it has {'those for ' + ', '.join(others) if others else 'none'}); "
        "midspan train-drafter makes one"
    )


def why_no_layer(ends: ModelEnds) -> str | None:
    """What keeps a pair of ends from being run for guesses."""
    if not ends.cut.has_tail:
        return "the tail is in the pool"
    if ends.keeps_states:
        return "its layers keep a state of the text, which cannot be cut back token by token"
    return None


def _try_table(ends: ModelEnds) -> NgramTable | None:
    try:
        return find_table(ends, missing_is_fine=True)
    except MidspanError as error:
        log.warning("drafting goes on without n-grams: %s", error)
        return None


def _try_layer(ends: ModelEnds) -> LayerModel | None:
    has_any = why_no_layer(ends) is None and (ends.directory / FOLDER).is_dir()
    try:
        return find_layer(ends) if has_any else None
    except MidspanError as error:
        log.info("drafting goes on without a trained layer: %s", error)
        return None
