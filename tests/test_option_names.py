"""One word for one thing over all commands; what options were called before goes on working."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from common.console.renamed import RenamedOption, old_spellings
from deploy.cli import COMMANDS, midspan

# option: its old names, where it has any
OLD = {
    "--edge-endpoint": {"--edges"},
    "--image-model": {"--model"},
    "--image-part": {"--image-cut"},
    "--keys": {"--dir"},
    "--max-new-tokens": {"--tokens"},
    "--output": {"--image"},
    "--span": {"--cut"},
    "--worker-endpoint": {"--workers"},
}
SEVERAL = set("codec image-part prompt reuse seed span".split())  # by some commands only
# a number, or by some commands two, from which to which, or 0 for all
RANGES = {"--workers", "--tokens", "--max-new-tokens"}


def walk(command: click.Command, name: str) -> Iterator[tuple[str, click.Option]]:
    if isinstance(command, click.Group):
        for inner_name, inner in command.commands.items():
            yield from walk(inner, f"{name} {inner_name}")
    for option in command.params:
        if isinstance(option, click.Option):
            yield name, option


def all_options() -> list[tuple[str, click.Option]]:
    found = []
    for name in COMMANDS:
        command = midspan.get_command(click.Context(midspan), name)
        assert command is not None
        found += walk(command, name)
    return found


def by_name() -> dict[str, list[tuple[str, click.Option]]]:
    named = defaultdict(list)
    for command, option in all_options():
        named[max(option.opts, key=len)].append((command, option))
    return named


def meaning(option: click.Option) -> str:
    """What an option's help begins with; what one command adds stands behind a mark."""
    assert option.help, option.name
    return re.split(r"[.;:,(]|  ", option.help)[0].strip()


def describe_type(option: click.Option) -> str:
    bounds = [getattr(option.type, name, None) for name in ("min", "max", "choices")]
    return f"{type(option.type).__name__} {bounds}"


@pytest.mark.parametrize("name", sorted(by_name()))
def test_an_option_means_the_same_in_every_command_that_has_it(name: str) -> None:
    places = by_name()[name]
    assert len({meaning(option) for _, option in places}) == 1, places
    assert name in RANGES or len({describe_type(option) for _, option in places}) == 1, places
    if name.lstrip("-") not in SEVERAL:
        assert len({option.multiple for _, option in places}) == 1, places


def test_what_means_the_same_has_one_name() -> None:
    names, meanings = defaultdict(set), defaultdict(set)
    for name, places in by_name().items():
        for _, option in places:
            names[option.name].add(name)
            meanings[meaning(option)].add(name)
    assert {key: found for key, found in names.items() if len(found) > 1} == {}
    assert {key: found for key, found in meanings.items() if len(found) > 1} == {}


def test_old_names_are_those_of_the_table_and_in_no_help() -> None:
    found = defaultdict(set)
    for command, option in all_options():
        if old_spellings(option):
            found[max(option.opts, key=len)].update(old_spellings(option))
            context = click.Context(click.Command(command))
            record = option.get_help_record(context)
            assert record is not None
            shown = set(re.findall(r"--[a-z-]+", record[0]))
            assert not shown & set(old_spellings(option))
    assert found == OLD


@click.command()
@click.option("--span", cls=RenamedOption, old=["--cut"], default="none")
@click.option("--many", cls=RenamedOption, old=["--several"], multiple=True)
def command(span: str, many: tuple[str, ...]) -> None:
    """For its options."""
    click.echo(f"{span} {many}")


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(midspan, list(arguments), env=environment)


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        ([], "none ()"),
        (["--cut", "1:7"], "1:7 ()"),
        (["--cut=1:7"], "1:7 ()"),
        (["--span", "1-7", "--several", "a", "--several", "b"], "1-7 ('a', 'b')"),
    ],
)
def test_an_old_name_is_read_as_the_new_one(arguments: list[str], output: str) -> None:
    done = CliRunner().invoke(command, arguments)
    assert (done.output, done.stderr) == (f"{output}\n", "")


def test_an_old_name_without_a_value_is_named_as_it_was_typed() -> None:
    assert "'--cut' requires an argument" in CliRunner().invoke(command, ["--cut"]).output


def test_two_names_of_one_option_at_once_are_both_named() -> None:
    done = CliRunner().invoke(command, ["--cut", "1:7", "--span", "1-7"])
    assert done.exit_code == 2
    assert "--span and --cut are the new and the old name of one option" in done.output


def test_commands_know_their_old_names() -> None:
    for arguments in (
        ["ask", "hi", "--cut", "1:7"], ["chat", "--cut", "1:7"], ["status"],
    ):  # fmt: skip
        line = run(*arguments, "--broker", "no address").output
        assert "--broker has value 'no address'" in line
    assert "--edge-endpoint has value '7'" in run("up", "--edges", "7").output
    assert "--worker-endpoint has value '7'" in run("broker", "--workers", "7").output
    assert "--size is 'x'" in run("image", "a", "--image-cut", "inner", "--size", "x").output


def test_old_names_are_read_from_variables_and_from_the_file(tmp_path: Path) -> None:
    assert "has value '7'" in run("up", MIDSPAN_UP_EDGES="7").output
    file = tmp_path / "config.toml"
    file.write_text('[up]\nedges = "7"\n')
    assert "has value '7'" in run("up", MIDSPAN_CONFIG=str(file)).output
    file.write_text('[up]\nedges = "7"\nedge-endpoint = "8"\n')
    line = run("up", MIDSPAN_CONFIG=str(file)).output
    assert "config.toml: up has edge-endpoint and edges, the new and the old name" in line
