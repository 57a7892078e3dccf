"""Which neurons of a model are loaded and computed: what a command line says, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from common.errors import SettingsError

DENSE, PARTINFER, COREINFER, RANDOM = "dense", "partinfer", "coreinfer", "random"
METHODS = (PARTINFER, COREINFER, DENSE, RANDOM)
MOST_FILES = 2


@dataclass(frozen=True, slots=True)
class NeuronSettings:
    """Shares are of all neurons of a layer, but `token_sparsity`.

    Layers between `start` and `end`, both excluded, have `loaded` of their neurons: first `base`
    by the first file, the others by the last. A token of a prompt is computed by all of these, a
    later one by `sparsity`: by those of the base and the prompt's core (partinfer), by the core
    alone (coreinfer), by some that are drawn once (random), or by all (dense). A token of a prompt
    votes for the core by `token_sparsity` of the neurons that are positive for it.
    """

    files: tuple[Path, ...]
    loaded: float = 0.7
    base: float = 0.3
    sparsity: float = 0.4
    token_sparsity: float = 0.2
    method: str = PARTINFER
    start: int = 3
    end: int = 25

    def check(self) -> None:
        """Raises SettingsError for what cannot be meant."""
        if not 1 <= len(self.files) <= MOST_FILES:
            raise SettingsError(
                f"--neurons names {len(self.files)} files; expected one, or two: that of the base "
                "and that of the others"
            )
        if self.method not in METHODS:
            raise SettingsError(f"--method is {self.method!r}; expected {', '.join(METHODS)}")
        for name in ("loaded", "base", "sparsity", "token_sparsity"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 < value <= 1):
                option = name.replace("_", "-")
                raise SettingsError(f"--{option} is {value}; expected more than 0, 1 at most")
        if self.method != DENSE and self.sparsity > self.loaded:
            raise SettingsError(
                f"--sparsity {self.sparsity} is more than --loaded {self.loaded}; expected no more "
                "to be computed than is loaded"
            )
        if self.base > self.loaded:
            raise SettingsError(f"--base {self.base} is more than --loaded {self.loaded}")
        if not -1 <= self.start < self.end - 1:
            raise SettingsError(
                f"--neuron-layers is {self.start}:{self.end}; expected START:END with a layer "
                "between them"
            )

    @property
    def changes_nothing(self) -> bool:
        """Whether all neurons are loaded, and computed for each token."""
        return self.loaded == 1 and (self.method == DENSE or self.sparsity == 1)

    def to_words(self) -> list[str]:
        """The options that say this, and nothing that is the default."""
        words = [word for path in self.files for word in ("--neurons", str(path))]
        plain = NeuronSettings(self.files)
        for name in ("loaded", "base", "sparsity", "token_sparsity", "method"):
            if getattr(self, name) != getattr(plain, name):
                words += [f"--{name.replace('_', '-')}", str(getattr(self, name))]
        if (self.start, self.end) != (plain.start, plain.end):
            words += ["--neuron-layers", f"{self.start}:{self.end}"]
        return words

    def describe(self) -> str:
        """What two sides must have in common, beside the lists."""
        return (
            f"{self.method} {self.loaded} {self.base} {self.sparsity} {self.token_sparsity} "
            f"{self.start}:{self.end}"
        )
