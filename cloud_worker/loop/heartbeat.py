"""Say that a worker is alive from a thread of its own: computing is not death."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

import zmq

from common.protocol.messages import Alive
from common.protocol.sockets import Context, connect_dealer
from common.protocol.wire import encode_header
from common.security.keys import ClientKeys

UNSENT_LIMIT = 10  # after which a broker is connected to anew


class Heartbeat:
    """Sends `Alive` to every broker each `interval_s`, until `stop`."""

    def __init__(
        self,
        context: Context,
        brokers: Sequence[str],
        beat: Alive,
        interval_s: float,
        keys: ClientKeys | None,
    ) -> None:
        self._context = context
        self._brokers = brokers
        self._header = encode_header(beat)
        self._interval_s = interval_s
        self._keys = keys
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No heartbeat is sent after this returns."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        sockets = [connect_dealer(self._context, broker, self._keys) for broker in self._brokers]
        unsent = [0] * len(sockets)
        while not self._stopped.wait(self._interval_s):
            for index, socket in enumerate(sockets):
                try:
                    socket.send(self._header, zmq.NOBLOCK)
                    unsent[index] = 0
                except zmq.Again:  # no broker there, or it has refused our key
                    unsent[index] += 1
                    if unsent[index] % UNSENT_LIMIT == 0:
                        with contextlib.suppress(zmq.ZMQError):
                            socket.disconnect(self._brokers[index])
                        socket.connect(self._brokers[index])
        for socket in sockets:
            socket.close(linger=0)
