"""Files that a command will write: whether it can is better known before the work than after it."""

from __future__ import annotations

from pathlib import Path

from common.errors import SettingsError


def check_writable(*files: Path | None) -> None:
    """Raises SettingsError if one cannot be written. Makes its directory, and leaves no file."""
    for file in files:
        if file is None:
            continue
        try:
            was_there = file.exists()
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab"):
                pass
            if not was_there:
                file.unlink()
        except OSError as error:
            raise SettingsError(f"{file} cannot be written: {error.strerror or error}") from error


def check_directory(directory: Path) -> None:
    """Raises SettingsError if no file can be written in there. Makes the directory."""
    check_writable(directory / ".midspan")
