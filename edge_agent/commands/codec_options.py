"""How codecs are chosen on the command line: --codec and its relatives.

Each takes a name, or two as UP,DOWN for the two directions, or auto.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.codecs.spec import AUTO, DEFAULT_CODEC, parse_codec
from common.console.options import calibration_option, group_options
from common.errors import SettingsError

if TYPE_CHECKING:
    from common.codecs.calibration import Calibration
    from edge_agent.text.ends import ModelEnds
    from edge_agent.text.session_settings import SessionSettings


@dataclass(frozen=True, slots=True)
class CodecChoice:
    """What the options said."""

    codec: str
    codec_prefill: str | None = None
    codec_decode: str | None = None
    calibration: Path | None = None

    def read_settings(self, **others: Any) -> SessionSettings:
        """Session settings with these codecs. Raises SettingsError for a name that is unknown."""
        from edge_agent.text.session_settings import SessionSettings

        return SessionSettings(*self.split(), **others)

    def split(self) -> tuple[str, str, str, str]:
        """Names for the prompt up and down, and for what comes after. Raises SettingsError."""
        prompt = _split(self.codec_prefill or self.codec)
        return (*prompt, *_split(self.codec_decode or self.codec))

    def find_calibration(self, ends: ModelEnds, *others: ModelEnds) -> Calibration | None:
        """The calibration to use with these ends, if there is one. Raises CheckpointError.

        There is none for several cuts, and SettingsError is raised for a codec that needs one.
        """
        from common.codecs.calibration import open_calibration

        if others:
            for name in self.split():
                if name != AUTO and parse_codec(name).needs_calibration:
                    raise SettingsError(
                        f"codec {name} needs a calibration, which is of one span; --span names "
                        f"{1 + len(others)}"
                    )
            return None
        span = (ends.cut.begin, ends.cut.end)
        return open_calibration(self.calibration, ends.directory, ends.fingerprint, span)


codec_options = group_options(
    "codecs",
    CodecChoice,
    click.option(
        "--codec",
        default=DEFAULT_CODEC,
        show_default=True,
        help="Boundary codec: fp32, fp16, bf16, int8, compact, smallest, the grammar, or auto.",
    ),
    click.option("--codec-prefill", help="Another one for the prompt."),
    click.option("--codec-decode", help="Another one for the tokens after it."),
    calibration_option,
)


def _split(text: str) -> tuple[str, str]:
    if text == AUTO:
        return AUTO, AUTO
    names = text.split(",")
    if AUTO in names:
        raise SettingsError(f"codec {text!r}: auto chooses both directions; expected it alone")
    if len(names) > 2:
        raise SettingsError(f"codec {text!r} names {len(names)} codecs; expected NAME or UP,DOWN")
    for name in names:
        parse_codec(name)
    return names[0], names[-1]
