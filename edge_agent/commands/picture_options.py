"""What picture to make, and how, on the command line: the options of `midspan image`."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from common.console.inputs import check_file
from common.console.option_types import COUNT, SEED
from common.console.options import group_options, image_part_option
from common.diffusion.schedulers import KARRAS, NAMES, OWN, SCHEDULERS
from common.errors import SettingsError
from edge_agent.commands.prompts import check_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from edge_agent.image.maker import ImageSettings

MAX_SIDE = 8192  # of a picture in pixels; workers take no larger latents


@dataclass(frozen=True, slots=True)
class Picture:
    """What the options said."""

    negative: str
    steps: int
    guidance: float
    seed: int | None
    size: str | None
    count: int
    scheduler: str
    cut: str
    sync: str
    codec: str
    reuse: int
    init_image: Path | None
    strength: float

    def read_settings(self, prompt: str) -> ImageSettings:
        """For a picture of `prompt`. Raises SettingsError, which names what is out of range."""
        from edge_agent.image.maker import ImageSettings

        check_text("--negative", self.negative)
        width, height = parse_size(self.size)
        seed = random.getrandbits(32) if self.seed is None else self.seed
        settings = ImageSettings(
            prompt, self.negative, self.steps, self.guidance, seed, height, width,
            self.count, self.scheduler, self.cut, self.sync, self.codec, self.codec, self.reuse,
            self._read_init_image(), self.strength,
        )  # fmt: skip
        settings.check()
        return settings

    def _read_init_image(self) -> Image | None:
        from edge_agent.image.init_picture import read_picture

        if self.init_image is None:
            context = click.get_current_context()
            if context.get_parameter_source("strength") is ParameterSource.COMMANDLINE:
                raise SettingsError("--strength is how much of --init-image is done anew; give one")
            return None
        check_file(self.init_image, "--init-image")
        return read_picture(self.init_image, f"--init-image {self.init_image}")

    def warn_of_negative(self) -> None:
        """Say that --negative does nothing, if it does."""
        if self.negative and self.guidance <= 1:
            click.echo(
                f"warning: --negative does nothing with --guidance {self.guidance:g}; "
                "it guides above 1",
                err=True,
            )


picture_options = group_options(
    "picture",
    Picture,
    click.option("--negative", default="", help="What the picture shall not show."),
    click.option("--steps", default=20, show_default=True, type=COUNT, help="Of denoising."),
    click.option("--guidance", default=2.5, show_default=True, help="Scale; 1 is none."),
    click.option(
        "--seed",
        type=SEED,
        help="Makes it repeatable: picture k of --count is that of SEED + k alone.  "
        "[default: any, which is printed]",
    ),
    click.option("--size", help="As WIDTHxHEIGHT or one number.  [default: the model's own]"),
    click.option("--count", default=1, show_default=True, type=COUNT, help="Images made at once."),
    click.option(
        "--scheduler",
        default=OWN,
        type=click.Choice(NAMES),
        metavar="NAME",
        help=f"How a step follows from the noise: {', '.join(SCHEDULERS)}; many also with "
        f"{KARRAS}.  [default: the model's own]",
    ),
    image_part_option("cut", default="unet", more="."),
    click.option(
        "--image-sync",
        "sync",
        default="edge",
        show_default=True,
        type=click.Choice(["edge", "cloud"]),
        help="Who keeps the latents; cloud sends nothing up after the first step.",
    ),
    click.option("--codec", default="int8", show_default=True, help="Boundary codec."),
    click.option(
        "--reuse",
        default=1,
        show_default=True,
        type=COUNT,
        help="Ask the pool every so many steps only, with --image-part inner.",
    ),
    click.option(
        "--init-image",
        type=click.Path(path_type=Path),
        help="A picture to begin with; --size is what it is made to fit.",
    ),
    click.option(
        "--strength",
        default=0.3,
        show_default=True,
        type=click.FloatRange(0, 1, min_open=True),
        help="How much of the steps is done on --init-image: 1 leaves nothing of it.",
    ),
)


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """`512x768` or `512` to width and height. Raises SettingsError."""
    if text is None:
        return None, None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(re.fullmatch("[0-9]{1,9}", side) for side in sides):
        raise SettingsError(f"--size is {text!r}; expected WIDTHxHEIGHT, as 1024x768, or a number")
    if max(map(int, sides)) > MAX_SIDE:
        raise SettingsError(f"--size is {text!r}; expected at most {MAX_SIDE} pixels")
    return int(sides[0]), int(sides[-1])
