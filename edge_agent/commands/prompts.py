"""Texts from the command line and stdin: they must be UTF-8, or no tokenizer takes them."""

from __future__ import annotations

import sys
from pathlib import Path

from common.console.inputs import read_text
from common.errors import SettingsError


def read_prompt(argument: str) -> str:
    """The prompt: the argument, or stdin if that is -. Raises SettingsError if it is no text."""
    if argument != "-":
        return check_text("the prompt", argument)
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"the prompt on stdin is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}"
        ) from error


def check_text(name: str, text: str) -> str:
    """The text. Raises SettingsError if the bytes it was typed as were not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SettingsError(f"{name} is not UTF-8 at character {error.start}") from error
    return text


def read_template(path: Path) -> str:
    """What --chat-template names. Raises SettingsError if it is no text."""
    return read_text(path, "--chat-template")
