"""How codecs are chosen on the command line: --codec and its relatives.

Each takes a name, or two as UP,DOWN for the two directions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.codecs.spec import DEFAULT_CODEC, parse_codec
from common.errors import SettingsError

if TYPE_CHECKING:
    from common.codecs.calibration import Calibration
    from edge_agent.text.ends import ModelEnds
    from edge_agent.text.text_session import SessionSettings


def codec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a click command; their values go to `read_codec_options`."""
    options = (
        click.option(
            "--codec", default=DEFAULT_CODEC, show_default=True,
            help="What rows are sent as: fp32, fp16, bf16, int8, compact, smallest or the grammar.",
        ),
        click.option("--codec-prefill", help="Another one for the prompt."),
        click.option("--codec-decode", help="Another one for the tokens after it."),
        click.option(
            "--calibration", type=click.Path(path_type=Path),
            help="For calibrated codecs.  [default: the one in the model directory]",
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def read_codec_options(
    codec: str, codec_prefill: str | None, codec_decode: str | None, **others: Any
) -> SessionSettings:
    """Session settings with these codecs. Raises SettingsError for a name that is not known."""
    from edge_agent.text.text_session import SessionSettings

    prompt_up, prompt_down = _split(codec_prefill or codec)
    decode_up, decode_down = _split(codec_decode or codec)
    return SessionSettings(prompt_up, prompt_down, decode_up, decode_down, **others)


def _split(text: str) -> tuple[str, str]:
    names = text.split(",")
    if len(names) > 2:
        raise SettingsError(f"codec {text!r} names {len(names)} codecs; expected NAME or UP,DOWN")
    for name in names:
        parse_codec(name)
    return names[0], names[-1]


def find_calibration(ends: ModelEnds, directory: Path | None) -> Calibration | None:
    """The calibration to use with these ends, if there is one. Raises CheckpointError."""
    from common.codecs.calibration import open_calibration

    span = (ends.cut.begin, ends.cut.end)
    return open_calibration(directory, ends.directory, ends.fingerprint, span)
