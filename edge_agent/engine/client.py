"""Have steps computed from one thread, one at a time: a link to brokers around an Exchange."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgpack
import zmq

from common.errors import BrokerUnavailable, MidspanError
from common.link import Link
from common.protocol.messages import (
    AnyOpening,
    AskAgain,
    EndSession,
    StatusQuery,
    StatusReport,
    Step,
    StepKey,
)
from common.protocol.wire import encode_header
from common.security.keys import ClientKeys
from edge_agent.engine.exchange import Answer, Answered, Ask
from edge_agent.engine.exchanges import Exchanges, Outcome
from edge_agent.engine.link import BrokerLink, key_of
from edge_agent.engine.link_meter import LinkMeter

STATUS_POLL_MS = 50
SMALL_PROBES = 2  # of the round trip alone
PROBE_BYTES = (8 << 10, 64 << 10, 256 << 10)
PROBE_S = 5.0  # a link on which one takes longer is as thin as that
PROBE_ENOUGH_S = 0.02  # of its bytes, beyond a few round trips


class BrokerClient:
    """One edge's connection to its brokers. Not thread-safe: one client for each thread."""

    def __init__(
        self,
        brokers: Sequence[str],
        timeout_s: float = 60.0,
        keys: ClientKeys | None = None,
        meter: LinkMeter | None = None,
    ) -> None:
        self._link = BrokerLink(brokers, keys)
        self._exchanges = Exchanges[None](self._link, timeout_s, meter)
        self._probe_s = min(PROBE_S, timeout_s)
        self._outcomes: dict[StepKey, Outcome] = {}  # that nobody has fetched yet
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

    def measure_link(self) -> Link | None:
        """How far and thin the link is: measured once with probes, then from what steps take.

        None as long as nothing answers. Probes grow until the bytes take longer than the way.
        """
        if self._exchanges.meter.link is None and not self._exchanges:
            self._send_probes(self._exchanges.meter)
        return self._exchanges.meter.link

    def _send_probes(self, meter: LinkMeter) -> None:
        if self._probe(0) is None:  # which opens the connection
            return
        round_trip_s = [self._probe(0) or self._probe_s for _ in range(SMALL_PROBES)]
        for seconds in round_trip_s:
            meter.note(0, seconds)
        for size in PROBE_BYTES:
            took_s = self._probe(size)
            if took_s is None:
                meter.note_stall(size, self._probe_s)
                break
            meter.note(size, took_s)
            if took_s > 3 * min(round_trip_s) + PROBE_ENOUGH_S:
                break

    def _probe(self, size: int) -> float | None:
        """Seconds until the broker says that it knows nothing of a step that nobody has sent."""
        probe = AskAgain(secrets.token_bytes(16), 0, 0)
        begun_at = time.monotonic()
        if not self._link.send([encode_header(probe), secrets.token_bytes(size)], self._probe_s):
            return None
        while (left_s := begun_at + self._probe_s - time.monotonic()) > 0:
            received = self._link.receive(left_s)
            if received is not None and key_of(received[0]) == probe.key:
                return time.monotonic() - begun_at
        return None

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
        return self.await_answer(self.send_ahead(asked))

    def send_ahead(self, asked: Ask) -> StepKey:
        """Have a step computed without waiting for it. Raises SettingsError if it is too large."""
        return self._exchanges.begin(None, asked)

    def await_answer(self, key: StepKey) -> Answered:
        """The answer to a step that was sent ahead. Raises as `ask`."""
        try:
            while key not in self._outcomes:
                for _, done, outcome in self._exchanges.receive():
                    self._outcomes[done] = outcome
                for _, done, outcome in self._exchanges.look_after():
                    self._outcomes[done] = outcome
                if key not in self._outcomes:
                    self._wait()
        except BaseException:
            self.drop(key)
            raise
        outcome = self._outcomes.pop(key)
        if isinstance(outcome, MidspanError):
            raise outcome
        self.asked_again += outcome.asked_again
        return outcome

    def drop(self, key: StepKey) -> None:
        """Nobody waits for a step that was sent ahead."""
        self._exchanges.drop(key)
        self._outcomes.pop(key, None)

    def _wait(self) -> None:
        """Until something comes, or is due to be sent again."""
        due_at = self._exchanges.due_at or 0.0
        self._link.socket.poll(max(1, math.ceil(1000 * (due_at - time.monotonic()))))

    def end_session(self, session_id: bytes) -> None:
        """Say that a session is over. Nobody answers; what was not heard expires."""
        self._link.send([encode_header(EndSession(session_id))], timeout_s=0.0)
