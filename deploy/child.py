"""A process that midspan starts, watches and stops."""

from __future__ import annotations

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
            return f"{self.name} was killed by signal {-code} ({signal.Signals(-code).name})"
        lines = [line for line in self.log_text().splitlines() if line.strip()]
        words = lines[-1].removeprefix("Error: ") if lines else "it said nothing"
        return f"{self.name} ended with exit code {code}: {words}"

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


def midspan_command(*arguments: str) -> list[str]:
    """The command line of a midspan subcommand in this same Python.

    With -P, or the current directory would come first: any `common` in it would be imported.
    """
    return [sys.executable, "-P", "-m", "midspan", *arguments]


def guarded_command(*command: str) -> list[str]:
    """The command line of something that is not ours, which is to end when we do."""
    return [sys.executable, "-P", "-m", "deploy.guard", *command]
