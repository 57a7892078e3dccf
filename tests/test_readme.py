"""Every midspan command in the README exists, with every option that it is shown with."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from deploy.cli import midspan

ROOT = Path(__file__).resolve().parent.parent


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.S | re.M)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("midspan ")]


@pytest.mark.parametrize("line", readme_commands())
def test_a_command_of_the_readme_exists_with_its_options(line: str) -> None:
    command: click.Command | None = midspan
    for word in line.split()[1:]:
        if isinstance(command, click.Group):
            command = command.get_command(click.Context(command), word)
    assert command is not None
    assert not isinstance(command, click.Group)
    known = {option for parameter in command.params for option in parameter.opts}
    used = set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", line))
    assert used <= known


def test_the_readme_shows_commands() -> None:
    assert len(readme_commands()) >= 6


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M)
