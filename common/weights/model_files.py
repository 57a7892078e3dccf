"""Files of a model's directory, which someone else made: plain, of bounded size, sound JSON.

Everything here is judged before a library reads it, for opening a pipe waits for ever.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from common.errors import CheckpointError, why_unreadable

MAX_JSON_BYTES = 64 << 20  # an index of a hundred thousand tensors has 10 MB


def check_plain_files(directory: Path) -> None:
    """Raise CheckpointError for a pipe, device or socket among the directory's own entries."""
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {why_unreadable(error)}") from error
    for path in entries:
        check_plain_file(path)


def check_plain_file(path: Path) -> None:
    """Links are followed: a cache of blobs is made of them. What is not there is not refused."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path} is no plain file")


def check_place(index: Path, name: object) -> None:
    """Raise CheckpointError unless an index names a file inside its directory.

    The text is judged and not where links lead: the files of a cache are links to its blobs.
    """
    place = PurePath(name) if isinstance(name, str) else PurePath()
    if not place.parts or place.is_absolute() or ".." in place.parts or "\0" in str(place):
        raise CheckpointError(f"{index} names {name!r}, which is no file name inside its directory")


def read_model_config(directory: Path, key: str = "model_type") -> dict[str, Any]:
    """The config.json of a model's directory, which has `key` if it is of the kind expected.

    Raises CheckpointError for what is no such directory.
    """
    if not directory.is_dir():
        raise CheckpointError(f"model {str(directory)!r} is not a directory")
    check_plain_files(directory)
    path = directory / "config.json"
    config = read_json(path, "a Hugging Face model directory has one")
    if key not in config:
        raise CheckpointError(f"{path} names no {key}, so it describes no model of this kind")
    return config


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """A JSON object. Raises CheckpointError, with the hint where there is no such file."""
    check_plain_file(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; {hint}".removesuffix("; ")) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {why_unreadable(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return content
