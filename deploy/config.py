"""Options from the environment and from ~/.midspan/config.toml, so that they are said once.

An option --some-thing of a command is also MIDSPAN_COMMAND_SOME_THING, and `some-thing` in the
file's table [command]. How to reach a broker is the same for all commands of an edge: those options
are also MIDSPAN_SOME_THING, and may stand above the tables. The command line wins, then the
environment, then the file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from common.console.renamed import old_spellings
from common.errors import SettingsError, why_unreadable

CONFIG = "MIDSPAN_CONFIG"  # names another file
DEFAULT = Path("~/.midspan/config.toml")
SHARED = ("broker", "key", "broker-key", "encrypt-kv", "timeout")  # of the commands of an edge
NOT_OF_AN_EDGE = ("broker", "worker", "up", "keys", "demo", "chaos", "loadtest")


def name_options(command: click.Command, path: tuple[str, ...]) -> None:
    """Give a command's options their variables; those that have one of their own keep it, too.

    `path` is the command's name, or the names of its groups and its own.
    """
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            name_options(inner, (*path, name))
    prefix = "_".join(("MIDSPAN", *path))
    for flag, option in _options(command):
        flags = [flag, *_old_flags(option)]
        names = [f"{prefix}_{each}" for each in flags]
        names += ["MIDSPAN_" + flag] if is_shared(path, flag) else []
        own = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
        option.envvar = list(dict.fromkeys([*own, *map(_as_variable, names)]))


def read_config() -> dict[str, Any]:
    """The file's content; empty if there is none. Raises SettingsError for one that is no TOML."""
    named = os.environ.get(CONFIG)
    path = Path(named or DEFAULT).expanduser()
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError as error:
        if named:
            raise SettingsError(f"{CONFIG} names {path}, which is not there") from error
        return {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {why_unreadable(error)}") from error


def check_names(config: Mapping[str, Any], commands: Iterable[str]) -> None:
    """Raise SettingsError for what is neither a command's table nor an option that edges share."""
    unknown = sorted(set(config) - {*commands, *SHARED})
    if unknown:
        raise SettingsError(f"config.toml: {unknown[0]} is no command, nor an option of them all")


def make_defaults(
    command: click.Command, path: tuple[str, ...], config: Mapping[str, Any]
) -> dict[str, Any]:
    """What the file says about a command, as click's default_map.

    Raises SettingsError for an option that the command does not have.
    """
    table: Any = config
    for name in path:
        table = table.get(name, {}) if isinstance(table, Mapping) else {}
    if not isinstance(table, Mapping):
        raise SettingsError(f"config.toml: {'.'.join(path)} is no table")
    if isinstance(command, click.Group):
        return {
            name: make_defaults(inner, (*path, name), config)
            for name, inner in command.commands.items()
        }
    options = dict(_options(command))
    table = _rename(table, options.values(), " ".join(path))
    unknown = sorted(set(table) - set(options))
    if unknown:
        raise SettingsError(f"config.toml: {' '.join(path)} has no option --{unknown[0]}")
    shared = {flag: config[flag] for flag in options if flag in config and is_shared(path, flag)}
    return {
        str(options[flag].name): _read_value(options[flag], f"{' '.join(path)} --{flag}", value)
        for flag, value in {**shared, **table}.items()
    }


def is_shared(path: tuple[str, ...], flag: str) -> bool:
    """Whether an option means the same for all commands of an edge, and this is one of them."""
    return flag in SHARED and path[0] not in NOT_OF_AN_EDGE


def _options(command: click.Command) -> Iterator[tuple[str, click.Option]]:
    for option in command.params:
        if isinstance(option, click.Option) and option.name != "help":
            longest = max(option.opts, key=len)
            yield longest.lstrip("-"), option


def _old_flags(option: click.Option) -> list[str]:
    return [spelling.lstrip("-") for spelling in old_spellings(option)]


def _rename(
    table: Mapping[str, Any], options: Iterable[click.Option], command: str
) -> dict[str, Any]:
    """A table with today's names. Raises SettingsError for one option under two of its names."""
    renamed = dict(table)
    for flag, option in ((max(o.opts, key=len).lstrip("-"), o) for o in options):
        for old in _old_flags(option):
            if old in renamed and flag in renamed:
                raise SettingsError(
                    f"config.toml: {command} has {flag} and {old}, the new and the old name of "
                    f"one option; keep {flag} only"
                )
            if old in renamed:
                renamed[flag] = renamed.pop(old)
    return renamed


def _as_variable(name: str) -> str:
    return name.replace("-", "_").upper()


def _read_value(option: click.Option, name: str, value: Any) -> Any:
    """What click would have read on the command line. Raises SettingsError for what it cannot."""
    if option.multiple or option.nargs != 1:
        values = value if isinstance(value, list) else [value]
        return [_as_text(name, each) for each in values]
    if isinstance(value, bool) and option.is_flag:
        return value
    return _as_text(name, value)


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, bool | list | dict):
        raise SettingsError(f"config.toml: {name} has value {value!r}; expected text or a number")
    return str(value)
