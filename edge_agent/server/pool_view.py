"""What can be said of the pool: the broker's report, and whether a step goes through it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common.errors import MidspanError
from edge_agent.engine.client import BrokerClient
from edge_agent.engine.engine import Engine
from edge_agent.server.errors import RequestFault, unavailable

READY_LIMIT_S = 5.0
ANY_TOKEN = 0


class PoolView:
    """Asks the broker over a connection of its own, from one thread: clients are for one."""

    def __init__(self, connect: Callable[[], BrokerClient]) -> None:
        self._connect = connect
        self._thread = ThreadPoolExecutor(1, "midspan-pool-view")
        self._client: BrokerClient | None = None

    async def report(self) -> dict[str, Any]:
        """As `midspan status --json`. Raises BrokerUnavailable."""
        return await asyncio.wrap_future(self._thread.submit(self._ask))

    def _ask(self) -> dict[str, Any]:
        if self._client is None:
            self._client = self._connect()
        return self._client.status()

    def close(self) -> None:
        self._thread.shutdown()
        if self._client is not None:
            self._client.close()


async def check_ready(engine: Engine) -> dict[str, Any]:
    """Send one token through head, pool and tail. Raises RequestFault, a 503, if it fails."""
    started_at = time.monotonic()
    try:
        stream = engine.submit([ANY_TOKEN], 1)
        try:
            async with asyncio.timeout(READY_LIMIT_S):
                tokens = [token async for token in stream]
        finally:
            stream.cancel()
    except TimeoutError:
        why = f"a step was not answered within {READY_LIMIT_S:g} s"
        raise RequestFault(unavailable(why, "not_ready")) from None
    except MidspanError as error:
        raise RequestFault(unavailable(str(error), "not_ready")) from error
    ms = round((time.monotonic() - started_at) * 1e3, 3)
    return {"status": "ready", "worker": tokens[0].worker_id, "ms": ms}
