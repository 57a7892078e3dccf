"""Which neurons of each layer a part loads, and how many of them it computes for a token.

It is part of what a model is, as a LoRA is: its digest goes into the model's fingerprint, so an
edge and workers that choose alike meet, and nobody else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import SettingsError
from common.neurons.lists import Ids, NeuronLists, read_lists
from common.neurons.settings import COREINFER, DENSE, RANDOM, NeuronSettings


@dataclass(frozen=True, slots=True, eq=False)
class LayerChoice:
    """The loaded neurons of one layer, of `width`: those for every token, then the others.

    Each ascending, so that a file is read forwards. `ranks` has the place of each in the lists.
    `core` of the others are a session's own.
    """

    width: int
    always: Ids
    others: Ids
    ranks: Ids
    core: int

    @property
    def loaded(self) -> Ids:
        return np.concatenate([self.always, self.others])


@dataclass(frozen=True, slots=True, eq=False)
class NeuronChoice:
    """Settings, and the lists of their files: the base's and the others'."""

    settings: NeuronSettings
    lists: Sequence[NeuronLists]

    def digest(self) -> str:
        digest = hashlib.sha256(self.settings.describe().encode())
        for lists in (self.lists[0], self.lists[-1]):
            digest.update(lists.digest().encode())
        return digest.hexdigest()

    def covers(self, layer: int) -> bool:
        """Whether not all of a layer's neurons are computed for all tokens."""
        settings = self.settings
        return settings.start < layer < settings.end and not settings.changes_nothing

    def check_layers(self, count: int) -> None:
        """Raises SettingsError for lists of a model with another number of layers."""
        for lists in self.lists:
            if len(lists.layers) != count:
                raise SettingsError(
                    f"{lists.name} has lists for {len(lists.layers)} layers; the model has {count}"
                )

    def of_layer(self, layer: int, width: int) -> LayerChoice:
        """Of a layer with so many neurons. Raises SettingsError for lists that do not fit."""
        settings = self.settings
        first, last = (each.of_layer(layer, width) for each in (self.lists[0], self.lists[-1]))
        order = _pick_loaded(
            first, last, round(settings.base * width), round(settings.loaded * width)
        )
        if len(order) < round(settings.loaded * width):
            raise SettingsError(
                f"{self.lists[-1].name}: layer {layer} lists too few neurons; {len(order)} of the "
                f"{round(settings.loaded * width)} that are to be loaded are there"
            )
        computed = len(order)
        if settings.method != DENSE:
            computed = max(1, min(computed, round(settings.sparsity * width)))
        always = _pick_always(settings, order, computed, width, layer)
        return _order_for_loading(order, always, computed - len(always), width)


def _pick_loaded(first: Ids, last: Ids, base: int, loaded: int) -> Ids:
    """The first of one list, then of the other without those, the most active ones first."""
    chosen = first[:base]
    others = last[~np.isin(last, chosen)]
    return np.concatenate([chosen, others])[:loaded]


def _pick_always(
    settings: NeuronSettings, order: Ids, computed: int, width: int, layer: int
) -> Ids:
    """Those of the loaded neurons that are computed for every token of an answer."""
    if computed == len(order):
        return order
    if settings.method == COREINFER:
        return order[:0]
    if settings.method == RANDOM:
        drawn = np.random.default_rng([layer, width]).permutation(order)
        return drawn[:computed]
    return order[: min(computed, round(settings.base * width))]


def _order_for_loading(order: Ids, always: Ids, core: int, width: int) -> LayerChoice:
    always = np.sort(always)
    others = np.sort(order[~np.isin(order, always)])
    rank_of = np.empty(width, dtype=np.int64)
    rank_of[order] = np.arange(len(order))
    return LayerChoice(width, always, others, rank_of[np.concatenate([always, others])], core)


def choose_neurons(settings: NeuronSettings) -> NeuronChoice:
    """Read the files. Raises SettingsError."""
    settings.check()
    return NeuronChoice(settings, [read_lists(path) for path in settings.files])
