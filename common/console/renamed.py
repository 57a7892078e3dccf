"""Options that had another name: the old one goes on working, and --help does not show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource


class RenamedOption(click.Option):
    """An option whose former spellings mean the same. Two spellings at once are an error."""

    def __init__(self, names: Sequence[str], *, old: Sequence[str], **attributes: Any) -> None:
        """`old` are spellings as they were typed: --cut."""
        super().__init__(names, **attributes)
        self.old = tuple(old)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        action = "append" if self.multiple else "store"
        for spelling in self.old:
            parser.add_option(
                obj=self, opts=[spelling], dest=spelling, action=action, nargs=self.nargs
            )

    def consume_value(
        self, ctx: click.Context, opts: Mapping[str, Any]
    ) -> tuple[Any, ParameterSource]:
        given = [name for name in (str(self.name), *self.old) if name in opts]
        if len(given) > 1:
            spellings = " and ".join(self.newest if n == self.name else n for n in given)
            raise click.UsageError(
                f"{spellings} are the new and the old name of one option; give {self.newest} only",
                ctx,
            )
        found = {str(self.name): opts[given[0]]} if given else {}
        return super().consume_value(ctx, found)

    @property
    def newest(self) -> str:
        """The long spelling that --help shows."""
        return max(self.opts, key=len)


def old_spellings(option: click.Option) -> tuple[str, ...]:
    """What an option was called before; nothing for most."""
    return option.old if isinstance(option, RenamedOption) else ()
