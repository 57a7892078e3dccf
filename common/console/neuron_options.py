"""Options that choose neurons, the same for workers and edges: they meet if these are alike."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import click

from common.console.inputs import check_file
from common.console.option_types import FiniteRange
from common.console.options import group_options
from common.errors import SettingsError
from common.neurons.settings import METHODS, NeuronSettings

SHARE = FiniteRange(0, 1, min_open=True)
DEFAULTS = NeuronSettings(())
LAYERS = f"{DEFAULTS.start}:{DEFAULTS.end}"


@dataclass(frozen=True, slots=True)
class NeuronOptions:
    """As they were given."""

    neuron_files: tuple[Path, ...] = ()
    loaded: float = DEFAULTS.loaded
    base: float = DEFAULTS.base
    sparsity: float = DEFAULTS.sparsity
    token_sparsity: float = DEFAULTS.token_sparsity
    method: str = DEFAULTS.method
    neuron_layers: str = LAYERS

    def read(self) -> NeuronSettings | None:
        """None without --neurons. Raises SettingsError."""
        settings = self._parse()
        if not self.neuron_files:
            if settings != DEFAULTS:
                raise SettingsError(
                    f"{' '.join(settings.to_words())} would do nothing: name lists with --neurons"
                )
            return None
        settings.check()
        return settings

    def _parse(self) -> NeuronSettings:
        match = re.fullmatch(r"(-?\d{1,4}):(\d{1,4})", self.neuron_layers)
        if match is None:
            raise SettingsError(f"--neuron-layers is {self.neuron_layers!r}; expected START:END")
        return NeuronSettings(
            tuple(path.expanduser() for path in self.neuron_files), self.loaded, self.base,
            self.sparsity, self.token_sparsity, self.method, int(match[1]), int(match[2]),
        )  # fmt: skip

    def check_files(self) -> None:
        """Raises SettingsError for lists that are not there."""
        for path in self.neuron_files:
            check_file(path, "--neurons")

    def check_used(self, model: object) -> None:
        """Raises SettingsError for neurons of a model that is not there."""
        if self.neuron_files and model is None:
            raise SettingsError("--neurons is for a language model; name it: --model")

    def to_words(self) -> list[str]:
        """The options that say this, and nothing that is the default. Raises SettingsError."""
        return self._parse().to_words()


loaded_option = click.option(
    "--loaded",
    type=SHARE,
    default=DEFAULTS.loaded,
    show_default=True,
    help="Share of a layer's neurons that is loaded.",
)
base_option = click.option(
    "--base",
    type=SHARE,
    default=DEFAULTS.base,
    show_default=True,
    help="Share that every token is computed with.",
)
token_sparsity_option = click.option(
    "--token-sparsity",
    type=SHARE,
    default=DEFAULTS.token_sparsity,
    show_default=True,
    help="Share of its positive neurons for which a token of a prompt votes.",
)
neuron_layers_option = click.option(
    "--neuron-layers",
    default=LAYERS,
    show_default=True,
    metavar="START:END",
    help="Layers between these two, both excluded; all others are whole.",
)
neuron_options = group_options(
    "neurons",
    NeuronOptions,
    click.option(
        "--neurons",
        "neuron_files",
        multiple=True,
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Load only some neurons of the language model: lists of midspan neurons profile, on "
        "both sides. Of two files the first is for the base.",
    ),
    loaded_option,
    base_option,
    click.option(
        "--sparsity",
        type=SHARE,
        default=DEFAULTS.sparsity,
        show_default=True,
        help="Share that a token of an answer is computed with.",
    ),
    token_sparsity_option,
    click.option(
        "--method",
        type=click.Choice(METHODS),
        default=DEFAULTS.method,
        show_default=True,
        help="Neurons of an answer: the base and the prompt's core, the core alone, all that are "
        "loaded, or random ones.",
    ),
    neuron_layers_option,
)
