"""Files that a command reads: whatever option names one, what is wrong with it is said alike."""

from __future__ import annotations

from pathlib import Path

from common.errors import SettingsError, why_unreadable


def read_text(path: Path, named: str) -> str:
    """The text of a file; `named` is the option that names it. Raises SettingsError."""
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SettingsError(f"{named} {path} cannot be read: {why_unreadable(error)}") from error


def check_file(path: Path, named: str) -> None:
    """Raises SettingsError for a path that is no file which this user may read."""
    path = path.expanduser()
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("it is no file")  # opening a pipe would wait for whoever writes to it
        path.open("rb").close()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{named} {path} cannot be read: {why_unreadable(error)}") from error
