"""Have steps computed from one thread, one at a time: a link to brokers around an Exchange."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgpack
import zmq

from common.errors import BrokerUnavailable
from common.protocol.messages import AnyOpening, EndSession, StatusQuery, StatusReport, Step
from common.protocol.wire import encode_header
from common.security.keys import ClientKeys
from edge_agent.engine.exchange import (
    ASK_AGAIN_S,
    Answer,
    Answered,
    Ask,
    BrokerGone,
    Exchange,
    LinkRate,
)
from edge_agent.engine.link import BrokerLink, key_of

STATUS_POLL_MS = 50


class BrokerClient:
    """One edge's connection to its brokers. Not thread-safe: one client for each thread."""

    def __init__(
        self, brokers: Sequence[str], timeout_s: float = 60.0, keys: ClientKeys | None = None
    ) -> None:
        self._link = BrokerLink(brokers, keys)
        self._timeout_s = timeout_s
        self._rate = LinkRate()
        self.asked_again = 0

    @property
    def broker(self) -> str:
        """The address in use."""
        return self._link.broker

    @property
    def bytes_up(self) -> int:
        return self._link.bytes_up

    @property
    def bytes_down(self) -> int:
        return self._link.bytes_down

    def close(self) -> None:
        self._link.close()

    def status(self, timeout_s: float = 2.0) -> dict[str, Any]:
        """The report of the first broker that answers, which is used from then on.

        All are asked side by side. Raises BrokerUnavailable.
        """
        link = self._link
        asked_at = time.monotonic()
        in_use = link.socket
        waiting = {
            index: in_use if index == link.current else link.connect_to(index)
            for index in range(len(link.brokers))
        }
        asked: set[int] = set()
        poller = zmq.Poller()
        for socket in waiting.values():
            poller.register(socket, zmq.POLLIN)
        try:
            while time.monotonic() - asked_at < timeout_s:
                for index in waiting.keys() - asked:
                    if link.send([encode_header(StatusQuery())], 0.0, waiting[index]):
                        asked.add(index)
                ready = {socket for socket, _ in poller.poll(STATUS_POLL_MS)}
                for index, socket in waiting.items():
                    received = link.receive(0.0, socket) if socket in ready else None
                    if received is not None and isinstance(received[0], StatusReport):
                        if index != link.current:
                            link.use(index)
                        report: dict[str, Any] = msgpack.unpackb(received[1])
                        return report
        finally:
            for socket in waiting.values():
                if socket is not in_use:
                    socket.close(linger=0)
        raise BrokerUnavailable(link.why_unavailable(timeout_s))

    def ask(
        self,
        step: Step,
        body: bytes,
        opening: AnyOpening,
        *,
        is_known: bool,
        wait_for_worker: bool,
        reply_bytes: int = 0,
    ) -> tuple[Answer, bytes]:
        """Have a step computed: its StepReply with the body, or what a worker lacks for it.

        The opening goes along unless the broker `is_known` to have it, and when it asks for it.
        `reply_bytes` says about how much comes back: what is on its way up or down over a thin link
        adds to the patience and to the client's timeout. Raises NoWorker (unless told to wait for
        one), StepRefused when the pool gave up or did not answer within the client's timeout,
        BrokerUnavailable when no broker did.
        """
        asked = Ask(step, body, opening, is_known, wait_for_worker, reply_bytes)
        answered = self.exchange(asked)
        return answered.answer, answered.body

    def exchange(self, asked: Ask) -> Answered:
        """The same, with what it cost."""
        exchange = Exchange(asked, self._timeout_s, self._rate, time.monotonic())
        try:
            while True:
                answered = self._go_on(exchange)
                if answered is not None:
                    return answered
        except BrokerGone:
            raise BrokerUnavailable(self._link.why_unavailable(self._timeout_s)) from None
        finally:
            self.asked_again += exchange.asked_again

    def _go_on(self, exchange: Exchange) -> Answered | None:
        """Send what is due, and wait for what comes until the next is."""
        link, now = self._link, time.monotonic()
        if link.has_lost_link():
            exchange.on_link_lost()
        if exchange.check(now, link.broker):
            link.use_next()
            exchange.on_other_broker(now)
        frames = exchange.due(now)
        if frames is not None:
            if not link.send(frames, ASK_AGAIN_S):
                exchange.on_not_handed_over(time.monotonic(), 0.0)
                return None
            exchange.on_handed_over(frames, time.monotonic())
        received = link.receive(max(0.001, exchange.due_at - time.monotonic()))
        if received is None:
            return None
        message, body, size = received
        if key_of(message) != exchange.key:
            return None  # the answer to something asked before
        return exchange.hear(message, body, size, time.monotonic())

    def end_session(self, session_id: bytes) -> None:
        """Say that a session is over. Nobody answers; what was not heard expires."""
        self._link.send([encode_header(EndSession(session_id))], timeout_s=0.0)
