"""Where this user's `midspan serve` run: a small file for each, which `midspan ask` reads.

A file says all that the text of an answer depends on, so that whoever reads it can tell whether its
own engine would write the same. It may hold an API key, so only its owner can read it. A process
that was killed leaves its file; whoever finds that removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from common.errors import MidspanError

log = logging.getLogger("midspan.serve")
SERVES = Path("~/.midspan/serves")
MAX_BYTES = 64 << 10
MOST_PID = (1 << 22) - 1  # as Linux has it; what is beyond fits into no pid_t
LATER = 19  # of the fields behind a process's name in /proc/PID/stat: when it started


@dataclass(frozen=True, slots=True)
class TextSource:
    """What the text of an answer depends on, besides the question. Paths are resolved."""

    model: str
    files: str  # of the model and its calibration, by `digest_files`
    dtype: str
    codecs: tuple[str, str, str, str]  # prompt up and down, decode up and down
    calibration: str | None
    loras: tuple[str, ...] = ()
    neurons: str = ""  # digest of what is chosen of them
    exact: bool = False  # no bit depends on other sessions or drafts


@dataclass(frozen=True, slots=True)
class Route:
    """How the pool is reached. Keys are the public ones."""

    brokers: tuple[str, ...]
    key: str | None
    broker_key: str | None
    pool_key: str | None  # of --encrypt-kv
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Process:
    """Which one says it: numbers come again, and machines may share a home."""

    pid: Annotated[int, msgspec.Meta(ge=1, le=MOST_PID)]
    started: str  # by `read_start`
    host: str


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a running serve says of itself."""

    url: str  # with /v1
    name: str  # of the model
    span: str
    source: TextSource
    route: Route
    api_key: str | None
    process: Process


def digest_files(directory: Path, calibration: Path | None) -> str:
    """Changes when a file of a model's directory or of a calibration does; nothing for a directory
    that cannot be read. Without a calibration it is of those that belong to the model."""
    try:
        paths = list(directory.iterdir())
        paths += directory.glob("calibration/*/*") if calibration is None else calibration.iterdir()
        said = sorted(
            (str(path), status.st_size, status.st_mtime_ns)
            for path in paths
            if stat.S_ISREG((status := path.stat()).st_mode)
        )
    except OSError:
        return ""
    return hashlib.sha256(repr(said).encode()).hexdigest()


def read_start(pid: int) -> str:
    """When a process started, as Linux counts it; nothing where it does not say.

    Raises ProcessLookupError for one that has ended.
    """
    os.kill(pid, 0)
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[LATER]


def describe_process() -> Process:
    """This one."""
    return Process(os.getpid(), read_start(os.getpid()), os.uname().nodename)


@contextlib.contextmanager
def announced(announcement: Announcement) -> Iterator[None]:
    """Say it until the end of the block. A home that cannot be written is no reason to stop."""
    directory = SERVES.expanduser()
    path = directory / f"{announcement.process.pid}.json"
    try:
        for each in (directory.parent, directory):
            each.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(path, msgspec.json.encode(announcement))
    except OSError as error:
        log.warning("%s cannot be written, so `midspan ask` will not find this: %s", path, error)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, and never for others to read."""
    draft = path.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    draft.replace(path)


def list_running() -> list[Announcement]:
    """Those of this user's that still run, the newest first."""
    found = []
    for path in SERVES.expanduser().glob("*.json"):
        with contextlib.suppress(OSError, MidspanError):
            announcement = _read(path)
            if _runs(announcement.process):
                found.append((path.stat().st_mtime, announcement))
            elif announcement.process.host == os.uname().nodename:
                path.unlink()
    return [each for _, each in sorted(found, key=lambda pair: pair[0], reverse=True)]


def _read(path: Path) -> Announcement:
    """Raises MidspanError for a file that is not ours alone, or that says nothing."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        is_ours = status.st_uid == os.getuid() and not status.st_mode & 0o077
        if not (is_ours and stat.S_ISREG(status.st_mode)):
            raise MidspanError(f"{path} is not this user's alone")
        try:
            return msgspec.json.decode(file.read(MAX_BYTES), type=Announcement)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise MidspanError(f"{path} says nothing: {error}") from error


def _runs(process: Process) -> bool:
    if process.host != os.uname().nodename:
        return False
    try:
        return read_start(process.pid) == process.started
    except OSError:
        return False
