"""How drafting is chosen on the command line: --draft and its relatives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from common.console.option_types import COUNT
from common.console.options import group_options
from common.errors import MidspanError, SettingsError
from common.settings import DRAFT_TOKENS

if TYPE_CHECKING:
    from edge_agent.text.drafting.choice import Drafters, Kind
    from edge_agent.text.ends import ModelEnds

KINDS = ("auto", "off", "lookup", "ngram", "model")


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """What the options said."""

    draft: str = "auto"
    draft_tokens: int = DRAFT_TOKENS
    keep_outputs: Path | None = None

    def open(self, *cuts: ModelEnds) -> Drafters | None:
        """What gives sessions of these cuts their drafters, if any is wanted.

        Raises SettingsError where the kind that was asked for cannot be had.
        """
        if self.draft == "off":
            return None
        from edge_agent.text.drafting.choice import Drafters

        drafters = Drafters(cast("Kind", self.draft), self.keep_outputs)
        for ends in cuts if drafters.is_demanded else ():
            try:
                drafters.load(ends)
            except MidspanError as error:
                raise SettingsError(
                    f"--draft {self.draft}: {error}; --draft auto goes on without"
                ) from error
        return drafters


draft_options = group_options(
    "drafts",
    DraftChoice,
    click.option(
        "--draft",
        type=click.Choice(KINDS),
        default="auto",
        show_default=True,
        help="Who guesses the next tokens, several of which are checked in one round trip; the "
        "text stays the same.",
    ),
    click.option(
        "--draft-tokens",
        type=COUNT,
        default=DRAFT_TOKENS,
        show_default=True,
        help="Guesses in one step, at most; fewer where they do not pay.",
    ),
    click.option(
        "--keep-outputs",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for what the model writes, as token ids, so that later guesses are better.",
    ),
)
