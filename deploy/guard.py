"""Run a command that is not ours, such as Redis, so that it ends with the process that started it.

`python -m deploy.guard COMMAND …` becomes COMMAND, under the same process id, and leaves a guardian
beside it that kills it when the lifeline (common/console/processes.py) ends. Each learns of the
other's end from a pipe, so nothing waits for a process id that may have another owner by then.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Sequence

from common.console.processes import take_lifeline


def run_guarded(command: Sequence[str]) -> None:
    """Become `command`; does not return."""
    lifeline_fd = take_lifeline()
    if lifeline_fd is not None:
        alive_fd, held_fd = os.pipe()
        guarded_pid = os.getpid()
        if os.fork() == 0:
            os.close(held_fd)
            guard(guarded_pid, alive_fd, lifeline_fd)
        os.set_inheritable(held_fd, True)  # the command holds it for as long as it lives
    os.execvp(command[0], [*command])  # noqa: S606  (of our own parts, as elsewhere)


def guard(guarded_pid: int, alive_fd: int, lifeline_fd: int) -> None:
    """Wait for the first of both to end; does not return. SIGKILL also ends what is paused."""
    ended, _, _ = select.select([alive_fd, lifeline_fd], [], [])
    if alive_fd not in ended and os.getppid() == guarded_pid:
        os.kill(guarded_pid, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    run_guarded(sys.argv[1:])
