"""How tokens are drawn, on the command line: --temperature and its relatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from common.console.option_types import SEED
from common.console.options import group_options

if TYPE_CHECKING:
    from edge_agent.text.sampler import SamplingSettings


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the options said."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int | None

    def read_settings(self) -> SamplingSettings:
        """For the sampler. Raises SettingsError, which names what is out of range."""
        from edge_agent.text.sampler import SamplingSettings

        return SamplingSettings(
            self.temperature, self.top_k, self.top_p, self.repetition_penalty, seed=self.seed
        )

    def warn_of_greedy(self) -> None:
        """Say which options do nothing, because no token is drawn."""
        drawing = {
            "--top-k": self.top_k != 0,
            "--top-p": self.top_p != 1,
            "--seed": self.seed is not None,
        }
        idle = [option for option, is_given in drawing.items() if is_given]
        if self.temperature == 0 and idle:
            click.echo(
                f"warning: {' and '.join(idle)} {'does' if len(idle) == 1 else 'do'} nothing at "
                "temperature 0, which always takes the likeliest token; give -t 0.7, say",
                err=True,
            )


sampling_options = group_options(
    "sampling",
    Sampling,
    click.option("-t", "--temperature", default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-k", default=0, show_default=True, help="0 is all."),
    click.option(
        "--top-p", default=1.0, show_default=True, help="Of the likeliest tokens; 1 is all."
    ),
    click.option(
        "--repetition-penalty",
        default=1.0,
        show_default=True,
        help="For tokens that the text has; 1 is none.",
    ),
    click.option("--seed", type=SEED, help="Makes it repeatable."),
)
