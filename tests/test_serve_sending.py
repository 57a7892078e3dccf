"""What the endpoint has to say is sent at once."""

from __future__ import annotations

import asyncio
import socket

import pytest

from edge_agent.server.running import bind


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connections_do_not_hold_small_events_back(host: str) -> None:
    async def ask() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def look(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            own = writer.get_extra_info("socket")
            found.set_result(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(look, sock=bind(host, 0)) as server:
            port = server.sockets[0].getsockname()[1]
            _, writer = await asyncio.open_connection(host, port)
            nodelay = await found
            writer.close()
            return nodelay

    assert asyncio.run(ask()) != 0
