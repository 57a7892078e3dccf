"""How tokens are drawn, on the command line: --temperature and its relatives."""

from __future__ import annotations

from dataclasses import dataclass

import click

from common.console.option_types import SEED
from common.console.options import group_options
from edge_agent.text.sampling import SamplingDefaults, SamplingSettings, either

CHECKPOINTS = "[default: generation_config.json's, else {}]"


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the options said; None where they said nothing."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    seed: int | None

    def read_settings(self, defaults: SamplingDefaults) -> SamplingSettings:
        """For the sampler. Raises SettingsError, which names what is out of range."""
        return SamplingSettings(
            either(self.temperature, defaults.command_temperature),
            either(self.top_k, defaults.top_k),
            either(self.top_p, defaults.top_p),
            either(self.min_p, defaults.min_p),
            either(self.typical_p, defaults.typical_p),
            either(self.repetition_penalty, defaults.repetition_penalty),
            self.presence_penalty,
            self.frequency_penalty,
            seed=self.seed,
        )

    def warn_of_greedy(self, settings: SamplingSettings) -> None:
        """Say which options do nothing, because no token is drawn."""
        drawing = {
            "--top-k": self.top_k not in (None, 0),
            "--top-p": self.top_p not in (None, 1),
            "--min-p": self.min_p not in (None, 0),
            "--typical-p": self.typical_p not in (None, 1),
            "--seed": self.seed is not None,
        }
        idle = [option for option, is_given in drawing.items() if is_given]
        if settings.temperature == 0 and idle:
            click.echo(
                f"warning: {_join(idle)} {'does' if len(idle) == 1 else 'do'} nothing at "
                "temperature 0, which always takes the likeliest token; give -t 0.7, say",
                err=True,
            )


def _join(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


sampling_options = group_options(
    "sampling",
    Sampling,
    click.option(
        "-t",
        "--temperature",
        type=float,
        help="0 is greedy.  [default: generation_config.json's if that has do_sample, else 0]",
    ),
    click.option("--top-k", type=int, help=f"0 is all.  {CHECKPOINTS.format('0')}"),
    click.option(
        "-p",
        "--top-p",
        type=float,
        help=f"Of the likeliest tokens; 1 is all.  {CHECKPOINTS.format('1')}",
    ),
    click.option(
        "--min-p",
        type=float,
        help=f"Of the likeliest token's probability; 0 is all.  {CHECKPOINTS.format('0')}",
    ),
    click.option(
        "--typical-p",
        type=float,
        help="Of the tokens that surprise as much as is usual here; 1 is all.  "
        f"{CHECKPOINTS.format('1')}",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        help=f"For tokens that the text has; 1 is none.  {CHECKPOINTS.format('1')}",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="Taken from the logits of tokens that the answer has.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="Likewise, as often as it has them.",
    ),
    click.option("--seed", type=SEED, help="Makes it repeatable."),
)
