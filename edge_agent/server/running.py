"""Run the application until it is told to end, and then until its last answer is complete."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from common.console.listeners import name_listener
from common.errors import SettingsError
from edge_agent.server.gate import Drain

KEEP_ALIVE_S = 5


class DrainingServer(uvicorn.Server):
    """Still listens while it finishes, so that whoever comes hears why; a second signal ends it."""

    def __init__(
        self,
        app: FastAPI,
        drain: Drain,
        on_ready: Callable[[], None] = lambda: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_end` is called while the port is still ours."""
        super().__init__(
            uvicorn.Config(
                app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False,
                server_header=False, timeout_keep_alive=KEEP_ALIVE_S,
            )
        )  # fmt: skip
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # we say when it is ready
        self.drain = drain
        self._on_ready = on_ready
        self._on_end = on_end

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit = self.drain.is_asked
        self.drain.is_asked = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_end()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        is_drained = self.drain.is_asked and not self.drain.running
        return await super().on_tick(counter) or is_drained


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is any. Raises SettingsError, which names who has the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once (TCP_NODELAY) only on what says that it is TCP; else the first event of
    # a stream would wait for the acknowledgement of the head, 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        holder = name_listener(f"tcp://{host}:{port}")
        by = f" by {holder}" if holder else ""
        raise SettingsError(f"{host}:{port} cannot be bound: {error.strerror}{by}") from error
    return listener
