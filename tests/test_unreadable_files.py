"""Files that cannot be read: every command says which, what named it, and why, alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import error_line

from common.errors import SettingsError, why_unreadable
from deploy.pool import LocalPool, PoolSettings
from edge_agent.commands.draft_options import DraftChoice
from edge_agent.text.ends import load_ends

MODEL = "stories-llama"
COMMANDS = {
    "calibrate": (["calibrate", MODEL, "--text"], "--text"),
    "codec": (["eval", "codec", MODEL, "--text"], "--text"),
    "layers": (["eval", "layers", MODEL, "--text"], "--text"),
    "split": (["eval", "split", MODEL, "--text"], "--text"),
    "rows": (["eval", "split", MODEL, "--from-rows"], "--from-rows"),
    "importance": (["eval", "importance", "-o", "unused"], "the experiment"),
    "profile": (["neurons", "profile", MODEL, "-o", "unused.json", "--text"], "--text"),
    "show": (["neurons", "show"], "the list"),
    "template": (["chat", "--chat-template"], "--chat-template"),
    "keys": (["serve", "--api-key-file"], "--api-key-file"),
    "trace": (["loadtest", "--trace"], "--trace"),
    "neurons": (["ask", "x", "--neurons"], "--neurons"),
    "tokenizer": (["ask", "x", "--tokenizer"], "--tokenizer"),
    "picture": (["image", "x", "--init-image"], "--init-image"),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1)) as running:
        yield running


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_not_there_or_is_a_directory_is_named(command: str, tmp_path: Path) -> None:
    arguments, named = COMMANDS[command]
    nowhere = str(tmp_path / "nowhere")
    missing = error_line(*arguments, nowhere)
    assert missing == f"Error: {named} {nowhere} cannot be read: there is no such file"
    folder = error_line(*arguments, str(tmp_path))
    assert folder == f"Error: {named} {tmp_path} cannot be read: it is a directory"


@pytest.mark.parametrize("command", ["codec", "importance", "profile", "keys", "trace"])
def test_a_file_that_is_no_text_is_named_with_the_byte(command: str, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"ab\xff")
    arguments, named = COMMANDS[command]
    why = "it is no text in UTF-8, byte 2 is 0xff"
    assert error_line(*arguments, str(binary)) == f"Error: {named} {binary} cannot be read: {why}"


def test_why_a_file_cannot_be_read_has_no_number_of_an_error(tmp_path: Path) -> None:
    assert why_unreadable(PermissionError(13, "Permission denied")) == "this user may not read it"
    assert why_unreadable(OSError(5, "Input/output error", "x")) == "Input/output error"
    with pytest.raises(NotADirectoryError) as told:
        (Path(__file__) / "x").read_text()
    assert why_unreadable(told.value) == "its path leads through a file"


def test_a_calibration_that_is_none_is_named(pool: LocalPool, tmp_path: Path) -> None:
    command = ["ask", "x", "--broker", pool.edge_endpoint, "--codec", "compact", "--calibration"]
    assert "nowhere holds no usable calibration: it is no directory" in error_line(
        *command, str(tmp_path / "nowhere")
    )
    assert (
        f"--calibration {tmp_path} holds no usable calibration: calibration.json: there is no "
        "such file"
    ) in error_line(*command, str(tmp_path))


def test_a_drafter_that_cannot_be_had_is_named_with_its_option(
    pool: LocalPool, demo_directory: Path
) -> None:
    command = ["ask", "x", "--broker", pool.edge_endpoint, "--draft", "model"]
    line = error_line(*command, "--span", "4:")
    assert line.startswith("Error: --draft model: stories-llama cannot draft by itself: the tail")
    assert line.endswith("--draft auto goes on without")
    ends = load_ends(demo_directory, "3-5")
    with pytest.raises(SettingsError, match=r"--draft model: .* no trained drafter for span 3-5"):
        DraftChoice("model").open(ends)
    assert DraftChoice("auto").open(ends) is not None
