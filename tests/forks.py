"""Midspan commands as forks of a process that has imported torch: what takes 5 s takes 0.1.

A forked command is a process like any other: arguments, environment, directory, standard streams,
signals and exit code are its own, and it runs `midspan` as its main module. Only the imports of
libraries were done before. Two things differ: its parent is the fork server, and its command
line in /proc is the server's. Tests that are about either ask for `unforked` (tests/conftest.py).

The server has one thread and computes nothing, so forking it is safe. It ends with the tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from common.console.libraries import import_diffusers, import_libraries
from deploy import child
from deploy.child import midspan_command

ROOT = Path(__file__).resolve().parent.parent
FORKED = {
    "ask", "calibrate", "chaos", "demo", "eval", "image", "loadtest", "model", "serve", "status",
    "up", "worker",
}  # fmt: skip
PRELOADED = (
    "torch", "diffusers", "constriction", "cryptography.hazmat.primitives.ciphers.aead",
    "cloud_worker.loop.worker", "cloud_worker.image.service", "cloud_worker.text.service",
    "edge_agent.image.maker", "edge_agent.text.generation", "edge_agent.text.perplexity",
    "edge_agent.server.app", "edge_agent.server.running", "edge_agent.server.opening",
    "transformers.models.llama.modeling_llama", "transformers.models.clip.modeling_clip",
)  # fmt: skip
HIGH_FD = 500  # above every number that a command asks for


class ForkedProcess:
    """As much of subprocess.Popen as deploy/child.py uses."""

    def __init__(
        self,
        server: Path,
        arguments: Sequence[str],
        *,
        fds: Mapping[int, int],
        env: Mapping[str, str],
        cwd: str,
        start_new_session: bool,
    ) -> None:
        """`fds` are ours by the number that they shall have in the command."""
        self.args = [*midspan_command(*arguments)]
        self.returncode: int | None = None
        self._lock = threading.Lock()
        self._link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._link.connect(str(server))
        request = json.dumps(
            {"argv": [*arguments], "env": dict(env), "cwd": cwd, "fds": [*fds],
             "new_session": start_new_session}
        ).encode()  # fmt: skip
        socket.send_fds(self._link, [struct.pack("!I", len(request))], [*fds.values()])
        self._link.sendall(request)
        self.pid = self._receive_number()

    def _receive_number(self) -> int:
        data = self._link.recv(8, socket.MSG_WAITALL)
        if len(data) < 8:
            raise RuntimeError("the fork server has ended")
        return int(struct.unpack("!q", data)[0])

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None and select.select([self._link], [], [], 0)[0]:
                self.returncode = self._receive_number()
                self._link.close()
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        give_up_at = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if give_up_at is not None and time.monotonic() > give_up_at:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            with contextlib.suppress(OSError, ValueError):  # closed by another thread's poll
                select.select([self._link], [], [], 0.1)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkingSubprocess:
    """Stands in for the module `subprocess` in deploy/child.py: forks the commands that can be."""

    DEVNULL, STDOUT, TimeoutExpired = (
        subprocess.DEVNULL, subprocess.STDOUT, subprocess.TimeoutExpired,
    )  # fmt: skip

    def __init__(self, server: Path) -> None:
        self.server = server
        self.enabled = True

    def can_fork(self, command: Sequence[str]) -> bool:
        prefix = midspan_command()
        return (
            self.enabled
            and list(command[: len(prefix)]) == prefix
            and len(command) > len(prefix)
            and command[len(prefix)] in FORKED
        )

    def Popen(
        self, command: Sequence[str], *, stdin: int, stdout: IO[bytes], stderr: int, **others: Any
    ) -> ForkedProcess | subprocess.Popen[bytes]:
        if not self.can_fork(command):
            return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, **others)
        assert (stdin, stderr) == (subprocess.DEVNULL, subprocess.STDOUT)
        with open(os.devnull, "rb") as nothing:
            return ForkedProcess(
                self.server, command[len(midspan_command()) :],
                fds={
                    0: nothing.fileno(), 1: stdout.fileno(), 2: stdout.fileno(),
                    **{fd: fd for fd in others["pass_fds"]},
                },
                env=others["env"], cwd=os.getcwd(), start_new_session=others["start_new_session"],
            )  # fmt: skip


def run_midspan(
    *arguments: str, stdin: str | bytes = b"", timeout_s: float = 120, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a fork where that is possible."""
    typed = stdin.encode() if isinstance(stdin, str) else stdin
    command = midspan_command(*arguments)
    forking = child.subprocess
    if not (isinstance(forking, ForkingSubprocess) and forking.can_fork(command)):
        done = subprocess.run(
            command, cwd=cwd, input=typed, capture_output=True, timeout=timeout_s, check=False
        )
        return subprocess.CompletedProcess(
            command, done.returncode, done.stdout.decode(), done.stderr.decode()
        )
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write(typed)
        given.seek(0)
        process = ForkedProcess(
            forking.server, arguments, fds={0: given.fileno(), 1: out.fileno(), 2: err.fileno()},
            env=os.environ, cwd=str(cwd), start_new_session=False,
        )  # fmt: skip
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(command, process.wait(), *texts)


def error_line(*arguments: str, stdin: str | bytes = b"") -> str:
    """The one line that a command says when it cannot do what it was asked."""
    done = run_midspan(*arguments, stdin=stdin)
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def start_server(directory: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A fork server that listens in `directory` and ends when its stdin does."""
    path = directory / "forks"
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process, path


def serve(path: Path) -> list[str]:
    """Fork for each who asks. Returns in the forked processes only: the arguments of each."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(64)
    os.write(1, b"ready\n")
    poller = select.poll()
    poller.register(0, select.POLLIN)
    poller.register(listener, select.POLLIN)
    running: dict[int, tuple[int, socket.socket]] = {}  # by pidfd
    while True:
        for fd, _ in poller.poll():
            if fd == 0:
                os._exit(0)
            elif fd == listener.fileno():
                link, _ = listener.accept()
                head, fds, _, _ = socket.recv_fds(link, 4, 16)
                request = json.loads(link.recv(struct.unpack("!I", head)[0], socket.MSG_WAITALL))
                pid = os.fork()
                if pid == 0:
                    for each in (listener, link, *(other for _, other in running.values())):
                        each.detach()  # or they would close numbers that are others' by then
                    become(request, fds)
                    return ["midspan", *request["argv"]]
                for received in fds:
                    os.close(received)
                link.sendall(struct.pack("!q", pid))
                pidfd = os.pidfd_open(pid)
                running[pidfd] = (pid, link)
                poller.register(pidfd, select.POLLIN)
            else:
                pid, link = running.pop(fd)
                poller.unregister(fd)
                os.close(fd)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError), link:  # whoever asked may have ended before
                    link.sendall(struct.pack("!q", os.waitstatus_to_exitcode(status)))


def become(request: dict[str, Any], fds: Sequence[int]) -> None:
    """Take on what was asked for: session, descriptors, directory and environment."""
    if request["new_session"]:
        os.setsid()
    kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, HIGH_FD) for fd in fds]
    os.closerange(3, HIGH_FD)
    for fd, target in zip(kept, request["fds"], strict=True):
        os.dup2(fd, target)
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])


if __name__ == "__main__":
    import_libraries()  # as commands do
    import_diffusers()
    for name in PRELOADED:
        __import__(name)
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()  # or each fork would copy every page on which an object is counted
    child.subprocess = ForkingSubprocess(Path(sys.argv[1]))  # type: ignore[assignment]
    sys.argv[:] = serve(Path(sys.argv[1]))
    runpy.run_module("midspan", run_name="__main__", alter_sys=True)
