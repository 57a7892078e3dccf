"""A process that midspan starts, watches and stops."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.console.processes import LIFELINE
from common.errors import ProcessFailed


@functools.cache
def lifeline() -> tuple[int, int]:
    """A pipe on which nothing is ever written: every child reads it, and we alone can write.

    However this process ends, kill -9 included, its children then see the pipe end.
    """
    return os.pipe()


END_BYTES = 64 << 10  # of an output, that are read for the last words


class Child:
    """A running command whose output goes to a file, for its last words if it fails.

    A midspan command or one under deploy/guard.py ends when we do, however that comes about.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log_dir: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        log_dir.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=f"{name}-", suffix=".log", dir=log_dir)
        self.log_path = Path(path)
        read_end, _ = lifeline()
        with open(handle, "wb") as log_file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us; we stop our children in order
                pass_fds=[read_end],
                env={**os.environ, **(environment or {}), LIFELINE: str(read_end)},
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace")

    def check(self) -> None:
        """Raise ProcessFailed with the process's last words if it has ended."""
        if self.is_running():
            return
        raise ProcessFailed(self.last_words())

    def last_words(self) -> str:
        """How a process that has ended did so."""
        code = self._process.returncode
        if code < 0:
            return f"{self.name} was killed by signal {-code} ({_name_signal(-code)})"
        lines = [line for line in self._read_end().splitlines() if line.strip()]
        words = lines[-1].removeprefix("Error: ") if lines else "it said nothing"
        return f"{self.name} ended with exit code {code}: {words}"

    def _read_end(self) -> str:
        """Of the output, which may be more than fits into memory."""
        with open(self.log_path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - END_BYTES))
            return file.read().decode(errors="replace")

    def wait_for(self, text: str, timeout_s: float = 60.0) -> str:
        """The first line of output that holds `text`. Raises ProcessFailed if it does not come."""
        give_up_at = time.monotonic() + timeout_s
        while True:
            for line in self.log_text().splitlines():
                if text in line:
                    return line
            self.check()
            if time.monotonic() > give_up_at:
                raise ProcessFailed(f"{self.name} did not say {text!r} within {timeout_s:g} s")
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        if self.is_running():
            self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        self.signal(signal.SIGKILL)
        self._process.wait()

    def stop(self, timeout_s: float = 15.0) -> None:
        """SIGTERM, and SIGKILL if that is not heard."""
        self.signal(signal.SIGTERM)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()


class ChildGroup(Child):
    """A command that may have started others, as a shell does: they are told to end with it.

    When it ends by itself they have lost who looked after them; when it was told to, they may take
    as long as it may.
    """

    _is_ending = False

    def is_running(self) -> bool:
        return super().is_running() or (self._is_ending and self._has_others())

    def _has_others(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def signal(self, number: signal.Signals) -> None:
        self._is_ending = True
        if self.is_running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._is_ending = False  # where nobody waits for them, they are there as zombies for ever
        self._process.wait()


def stop_all(children: Sequence[Child], timeout_s: float = 15.0) -> None:
    """SIGTERM to all, and SIGKILL to those that have not heard it when this time is over."""
    for child in children:
        child.signal(signal.SIGTERM)
    give_up_at = time.monotonic() + timeout_s
    while time.monotonic() < give_up_at and any(child.is_running() for child in children):
        time.sleep(0.02)
    for child in children:
        if child.is_running():
            child.kill()


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # those for real time have names for their first and last only
        return signal.strsignal(number) or "unknown"


def midspan_command(*arguments: str) -> list[str]:
    """The command line of a midspan subcommand in this same Python.

    With -P, or the current directory would come first: any `common` in it would be imported.
    """
    return [sys.executable, "-P", "-m", "midspan", *arguments]


def guarded_command(*command: str) -> list[str]:
    """The command line of something that is not ours, which is to end when we do."""
    return [sys.executable, "-P", "-m", "deploy.guard", *command]
