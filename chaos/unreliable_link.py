"""A link between workers and their broker that can be made bad: cut, slow, doubling, garbling.

It sits between them at the level of messages: workers connect to it as if it were the broker, and
for each of their connections it has one of its own to the broker. For tests and `midspan chaos`;
it knows nothing of keys.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import threading
import time

import zmq

from common.protocol.sockets import Context, Socket, connect_dealer

SLOW_S = 0.08
REORDER_S = 0.03
GARBLE_SHARE = 0.5
FAULTS = ("cut", "slow", "doubling", "reordering", "garbling")

Message = list[bytes]


class UnreliableLink:
    """Forwards from `endpoint` to the broker in a thread of its own, until `close`.

    Set `fault` to one of FAULTS to harm what passes from then on, and to "" to stop that.
    """

    def __init__(self, broker: str, seed: int) -> None:
        self.fault = ""
        self.harmed = 0  # messages
        self._broker = broker
        self._rng = random.Random(seed)
        self._context: Context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.bind("tcp://127.0.0.1:*")
        self.endpoint = self._front.getsockopt_string(zmq.LAST_ENDPOINT)
        self._backs: dict[bytes, Socket] = {}
        self._late: list[tuple[float, int, bool, bytes, Message]] = []  # due, order, to broker, …
        self._order = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop forwarding; both sides see their connections end."""
        self._closed = True
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            if self.fault == "cut":
                self._cut()
            self._send_what_is_due()
            poller = zmq.Poller()
            for socket in (self._front, *self._backs.values()):
                poller.register(socket, zmq.POLLIN)
            ready = dict(poller.poll(5))
            # what was readable may be gone by now, with its connection
            with contextlib.suppress(zmq.Again):
                if self._front in ready:
                    peer, *message = self._front.recv_multipart(zmq.NOBLOCK)
                    self._pass_on(peer, True, message)
            for peer, back in list(self._backs.items()):
                with contextlib.suppress(zmq.Again):
                    if back in ready:
                        self._pass_on(peer, False, back.recv_multipart(zmq.NOBLOCK))
        self._context.destroy(linger=0)

    def _cut(self) -> None:
        """Close everything, wait for the end of the fault, and listen at the same address again."""
        self.harmed += 1
        self._front.close(linger=0)
        for back in self._backs.values():
            back.close(linger=0)
        self._backs.clear()
        self._late.clear()
        while self.fault == "cut" and not self._closed:
            time.sleep(0.01)
        self._front = self._context.socket(zmq.ROUTER)
        while not self._closed:
            try:
                self._front.bind(self.endpoint)
            except zmq.ZMQError:  # the old one is still being closed
                time.sleep(0.01)
            else:
                return

    def _pass_on(self, peer: bytes, to_broker: bool, message: Message) -> None:
        copies, delay_s = 1, 0.0
        match self.fault:
            case "slow":
                delay_s = SLOW_S
            case "doubling":
                copies = 2
            case "reordering":
                delay_s = self._rng.uniform(0, REORDER_S)
            case "garbling" if to_broker and self._rng.random() < GARBLE_SHARE:
                message = self._garble(message)
        self.harmed += bool(self.fault)
        for _ in range(copies):
            due = time.monotonic() + delay_s
            heapq.heappush(self._late, (due, next(self._order), to_broker, peer, message))
        self._send_what_is_due()

    def _garble(self, message: Message) -> Message:
        """What a broken worker may say: bodies of NaN or cut short, or a ruined header."""
        header, *bodies = message
        if not bodies:
            return message  # heartbeats: a worker that sends none is another fault
        kind = self._rng.randrange(3)
        if kind == 0:
            return [header, *(b"\xff" * len(body) for body in bodies)]  # NaN in every float type
        if kind == 1:
            return [header, *(body[: len(body) // 2] for body in bodies)]
        return [self._rng.randbytes(len(header)), *bodies]

    def _send_what_is_due(self) -> None:
        while self._late and self._late[0][0] <= time.monotonic():
            _, _, to_broker, peer, message = heapq.heappop(self._late)
            if not to_broker:
                self._front.send_multipart([peer, *message])
                continue
            back = self._backs.get(peer)
            if back is None:
                back = self._backs[peer] = connect_dealer(self._context, self._broker)
                back.setsockopt(zmq.SNDTIMEO, 200)
            try:
                back.send_multipart(message)
            except zmq.Again:
                self.harmed += 1  # the broker is away
