"""Options from variables and from a file: which one wins, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from common.errors import SettingsError
from deploy.cli import COMMANDS, midspan
from deploy.config import make_defaults, name_options

NOWHERE = "tcp://127.0.0.1:9"


def run(*arguments: str, **environment: str) -> Result:
    own = {"MIDSPAN_ASK_THREADS": "1"}  # of this process, whose other tests count on one
    return CliRunner().invoke(midspan, list(arguments), env={**own, **environment})


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


@pytest.mark.parametrize(
    "environment",
    [{"MIDSPAN_BROKER": NOWHERE}, {"MIDSPAN_ASK_BROKER": NOWHERE}],
)
def test_a_broker_from_the_environment(environment: dict[str, str]) -> None:
    assert f"no broker answers at {NOWHERE}" in run("ask", "hi", **environment).output


def test_a_broker_from_the_file_and_what_wins_over_it(config: Path) -> None:
    config.write_text(f'broker = ["{NOWHERE}"]\n[ask]\ntimeout = 7\n')
    environment = {"MIDSPAN_CONFIG": str(config)}
    assert f"at {NOWHERE}" in run("ask", "hi", **environment).output
    other = "tcp://127.0.0.1:11"
    assert f"at {other}" in run("ask", "hi", MIDSPAN_BROKER=other, **environment).output
    assert f"at {other}" in run("ask", "hi", "--broker", other, **environment).output


def test_one_broker_needs_no_list(config: Path) -> None:
    config.write_text(f'broker = "{NOWHERE}"\n')
    assert f"at {NOWHERE} " in run("ask", "hi", MIDSPAN_CONFIG=str(config)).output


def test_an_edges_broker_is_not_a_workers(config: Path) -> None:
    config.write_text('broker = "nonsense"\n[worker]\nredis-url = "redis://127.0.0.1:9"\n')
    options = ("worker", "--help")
    assert run(*options, MIDSPAN_CONFIG=str(config), MIDSPAN_BROKER="nonsense").exit_code == 0
    worker = midspan.get_command(click.Context(midspan), "worker")
    assert worker is not None
    defaults = make_defaults(worker, ("worker",), {"broker": "nonsense"})
    assert defaults == {}


def test_flags_and_numbers_are_read_as_on_the_command_line(config: Path) -> None:
    config.write_text("[status]\njson = true\n[ask]\ntemperature = 1e9\n")
    assert "temperature is 1000000000.0" in run("ask", "hi", MIDSPAN_CONFIG=str(config)).output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[ask]\ncodecs = 'int8'\n", "config.toml: ask has no option --codecs"),
        ("ask = 3\n", "config.toml: ask is no table"),
        ("[ask\n", "cannot be read: "),
        ("[ask]\nmax-new-tokens = 'many'\n", "'many' is not a valid int"),
        ("[ask]\ntimeout = [1, 2]\n", "ask --timeout has value [1, 2]; expected text or a number"),
        ("timeout = true\n", "ask --timeout has value True; expected text or a number"),
        ("[ask]\nmodel = {a = 1}\n", "ask --model has value {'a': 1}; expected text or a number"),
        ("[ask]\nbroker = [['a']]\n", "ask --broker has value ['a']; expected text or a number"),
        ("brokr = 'x'\n", "config.toml: brokr is no command, nor an option of them all"),
        ("[aks]\ntimeout = 1\n", "config.toml: aks is no command, nor an option of them all"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(config: Path, text: str, words: str) -> None:
    config.write_text(text)
    answer = run("ask", "hi", MIDSPAN_CONFIG=str(config))
    assert answer.exit_code != 0
    assert words in answer.output
    assert "Traceback" not in answer.output


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    answer = run("ask", "hi", MIDSPAN_CONFIG=str(tmp_path / "none.toml"))
    assert "MIDSPAN_CONFIG names" in answer.output
    assert answer.exit_code == 1


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_option_of_every_command_has_a_variable_of_its_own(name: str) -> None:
    command = midspan.get_command(click.Context(midspan), name)
    assert command is not None
    seen: list[str] = []

    def walk(each: click.Command) -> None:
        if isinstance(each, click.Group):
            for inner in each.commands.values():
                walk(inner)
        for option in each.params:
            if isinstance(option, click.Option) and option.name != "help":
                assert isinstance(option.envvar, list)
                seen.extend(v for v in option.envvar if v.startswith(f"MIDSPAN_{name.upper()}_"))

    walk(command)
    assert len(seen) == len(set(seen))


def test_an_option_that_has_a_variable_keeps_it() -> None:
    @click.command()
    @click.option("--redis-url", envvar="MIDSPAN_REDIS_URL")
    def worker(redis_url: str) -> None:
        """For its option."""

    name_options(worker, ("worker",))
    assert worker.params[0].envvar == ["MIDSPAN_REDIS_URL", "MIDSPAN_WORKER_REDIS_URL"]


def test_a_nested_command_reads_its_own_table() -> None:
    keys = midspan.get_command(click.Context(midspan), "keys")
    assert keys is not None
    with pytest.raises(SettingsError, match="keys new has no option --nonsense"):
        make_defaults(keys, ("keys",), {"keys": {"new": {"nonsense": 1}}})


def test_a_shell_completes_commands_and_options() -> None:
    script = run("completion", "bash").output
    assert "_MIDSPAN_COMPLETE=bash_complete" in script
    words = {"COMP_WORDS": "midspan ask --max", "COMP_CWORD": "2"}
    done = run(_MIDSPAN_COMPLETE="bash_complete", **words)
    assert "--max-new-tokens" in done.output
