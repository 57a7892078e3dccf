"""Talk to the broker: send a step until it is answered, over a list of brokers.

Nothing is lost by asking again, because every message is idempotent. A broker that has a step says
so at once when it is asked again (StepPending), so silence means that the broker is gone, and the
next one on the list is tried. Silence is measured by the link: what is on its way at 5 KB/s takes
half a minute for a prompt, and a second copy behind the first would take another one. So a step is
asked for again by its name only (AskAgain), unless its connection ended or the broker says that it
does not have it.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import zmq

from common.errors import (
    BrokerUnavailable,
    NoWorker,
    ProtocolError,
    SettingsError,
    StepRefused,
)
from common.protocol.messages import (
    AnyOpening,
    AnyStep,
    AskAgain,
    Busy,
    EndSession,
    Message,
    NeedOpening,
    NeedRows,
    NeedTensors,
    StatusQuery,
    StatusReport,
    StepPending,
    StepReply,
)
from common.protocol.messages import StepRefused as StepRefusedMessage
from common.protocol.sockets import (
    Context,
    Socket,
    connect_dealer,
    has_message,
    read_link_event,
    receive_frames,
    wire_bytes,
)
from common.protocol.wire import check_frames, decode_header, encode_header, is_of_other_protocol
from common.security.keys import ClientKeys
from common.settings import MAX_BODY_BYTES

ASK_AGAIN_S = 0.5  # a step that is not answered is sent again after this
SILENCE_S = 1.5  # a broker that says nothing for this long is given up for the next
NO_WORKER_RETRY_S = 0.25
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


LINK_EVENTS = HANDSHAKE_FAILED | zmq.EVENT_DISCONNECTED
SLOWEST_LINK = 4000.0  # bytes per second that a link must carry
RATE_FROM_BYTES = 4096  # smaller messages say nothing about the rate
STATUS_POLL_MS = 50


@dataclass(slots=True)
class _Patience:
    """How long nothing may be heard of a step, and when to ask next. Seconds, monotonic."""

    since: float  # when something was last heard, or a broker came into use
    travel_s: float  # what is on its way may take so long
    pause_s: float = ASK_AGAIN_S
    was_heard: bool = False

    def is_over(self, now: float, is_sent: bool) -> bool:
        return now - self.since > SILENCE_S + (self.travel_s if is_sent else 0.0)

    def begin(self, now: float) -> None:
        self.since, self.pause_s = now, ASK_AGAIN_S

    def hear(self, now: float) -> None:
        self.begin(now)
        self.was_heard = True

    def next_pause(self) -> float:
        """Twice as long each time: what is asked goes through the same thin link."""
        pause_s, self.pause_s = self.pause_s, self.pause_s * 2
        return pause_s


class BrokerClient:
    """One edge's connection to its brokers. Not thread-safe: one client for each thread."""

    def __init__(
        self, brokers: Sequence[str], timeout_s: float = 60.0, keys: ClientKeys | None = None
    ) -> None:
        self._brokers = list(brokers)
        self._timeout_s = timeout_s
        self._keys = keys
        self._refused_by = ""
        self._current = 0
        self._context: Context = zmq.Context()
        self._bytes_per_s: float | None = None  # of the link, as last seen
        self._sent_at: float | None = None
        self._connect()
        self.bytes_up = 0
        self.bytes_down = 0
        self.asked_again = 0

    @property
    def broker(self) -> str:
        """The address in use."""
        return self._brokers[self._current]

    def close(self) -> None:
        self._context.destroy(linger=200)

    def status(self, timeout_s: float = 2.0) -> dict[str, Any]:
        """The report of the first broker that answers, which is used from then on.

        All are asked side by side. Raises BrokerUnavailable.
        """
        asked_at = time.monotonic()
        waiting = {
            index: self._socket if index == self._current else self._socket_to(index)
            for index in range(len(self._brokers))
        }
        in_use = self._socket
        asked: set[int] = set()
        poller = zmq.Poller()
        for socket in waiting.values():
            poller.register(socket, zmq.POLLIN)
        try:
            while time.monotonic() - asked_at < timeout_s:
                for index in waiting.keys() - asked:
                    if self._send([encode_header(StatusQuery())], 0.0, waiting[index]):
                        asked.add(index)
                ready = {socket for socket, _ in poller.poll(STATUS_POLL_MS)}
                for index, socket in waiting.items():
                    received = self._receive(0.0, socket) if socket in ready else None
                    if received is not None and isinstance(received[0], StatusReport):
                        if index != self._current:
                            self._use_broker(index)
                        report: dict[str, Any] = msgpack.unpackb(received[1])
                        return report
        finally:
            for socket in waiting.values():
                if socket is not in_use:
                    socket.close(linger=0)
        raise BrokerUnavailable(self._unavailable(timeout_s))

    def ask(
        self,
        step: AnyStep,
        body: bytes,
        opening: AnyOpening,
        *,
        is_known: bool,
        wait_for_worker: bool,
        reply_bytes: int = 0,
    ) -> tuple[StepReply | NeedRows | NeedTensors, bytes]:
        """Have a step computed: its StepReply with the body, or what a worker lacks for it.

        The opening goes along unless the broker `is_known` to have it, and when it asks for it.
        `reply_bytes` says about how much comes back: what is on its way up or down over a thin link
        adds to the patience and to the client's timeout. Raises NoWorker (unless told to wait for
        one), StepRefused when the pool gave up or did not answer within the client's timeout,
        BrokerUnavailable when no broker did.
        """
        if len(body) > MAX_BODY_BYTES:
            raise SettingsError(
                f"a step has {len(body):,} bytes and brokers take {MAX_BODY_BYTES:,}; make fewer "
                "images at once, send shorter pieces of a prompt, or choose a smaller codec"
            )
        frames = [encode_header(step), body]
        if not is_known:
            frames.append(encode_header(opening))
        again = [encode_header(AskAgain(*step.key))]
        travel_s = self._travel_s(wire_bytes(frames) + reply_bytes)
        give_up_at = time.monotonic() + self._timeout_s + travel_s
        patience = _Patience(time.monotonic(), travel_s)
        send_at = patience.since
        sent_before = is_sent = False  # at all; to the broker in use, over a connection that lasts
        while (now := time.monotonic()) < give_up_at:
            is_sent = is_sent and not self._has_lost_link()
            if now >= send_at:
                if patience.is_over(now, is_sent):
                    self._use_broker((self._current + 1) % len(self._brokers))
                    patience.begin(now)
                    is_sent = False
                limit_s = min(ASK_AGAIN_S, give_up_at - now)
                handed_over = self._send(again if is_sent else frames, limit_s)
                if handed_over and not is_sent:
                    is_sent, self._sent_at = True, time.monotonic()
                self.asked_again += sent_before
                sent_before = True
                send_at = now + (patience.next_pause() if handed_over else 0.0)
            received = self._receive(max(0.001, min(send_at, give_up_at) - now))
            if received is None:
                continue
            message, answer_body = received
            if _key_of(message) != step.key:
                continue  # the answer to something asked before
            patience.hear(time.monotonic())
            self._learn_rate(wire_bytes(frames) + len(answer_body))
            if isinstance(message, StepReply | NeedRows | NeedTensors):
                return message, answer_body
            if isinstance(message, StepPending):
                send_at = min(send_at, patience.since + ASK_AGAIN_S)
                continue
            is_sent, send_at = False, patience.since  # the broker does not have it
            if isinstance(message, Busy):
                send_at += message.retry_ms / 1000 * random.uniform(0.5, 1.5)
            elif isinstance(message, NeedOpening):
                frames = [frames[0], body, encode_header(opening)]
            elif isinstance(message, StepRefusedMessage):
                if message.code != "no_worker":
                    raise StepRefused(message.reason)
                if not wait_for_worker:
                    raise NoWorker(message.reason)
                send_at += NO_WORKER_RETRY_S
        if patience.was_heard and not patience.is_over(give_up_at, is_sent):
            raise StepRefused(
                f"the broker at {self.broker} has the step, but no worker answered it within "
                f"{self._timeout_s:g} s; see `midspan status`"
            )
        raise BrokerUnavailable(self._unavailable(self._timeout_s))

    # --- how fast the link is

    def _travel_s(self, message_bytes: int) -> float:
        """How long a message may be on its way; a fourth of the rate that was seen is allowed."""
        rate = max(SLOWEST_LINK, (self._bytes_per_s or 0.0) / 4)
        return message_bytes / rate

    def _learn_rate(self, message_bytes: int) -> None:
        """An answer came: so much went through since the step was sent, at least."""
        if self._sent_at is not None and message_bytes >= RATE_FROM_BYTES:
            rate = message_bytes / max(1e-6, time.monotonic() - self._sent_at)
            known = self._bytes_per_s
            self._bytes_per_s = rate if known is None else (known + rate) / 2
        self._sent_at = None

    def end_session(self, session_id: bytes) -> None:
        """Say that a session is over. Nobody answers; what was not heard expires."""
        self._send([encode_header(EndSession(session_id))], timeout_s=0.0)

    # --- the socket

    def _read_link_events(self) -> None:
        """What ZeroMQ tells on the side: connections that ended, and keys that were refused."""
        while has_message(self._link_events):
            event = read_link_event(self._link_events)
            if event == zmq.EVENT_DISCONNECTED:
                self._lost_link = True
                continue
            refused = event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            if not refused and self._keys is not None:
                self._refused_by = (
                    f"the broker at {self.broker} has another key than --broker-key, or none"
                )
                continue
            why = "refused this edge's key" if self._keys else "wants --key and --broker-key"
            self._refused_by = (
                f"the broker at {self.broker} {why}; a key is admitted there with "
                "`midspan keys authorize`"
            )

    def _has_lost_link(self) -> bool:
        """Whether the connection ended since this was last asked: what was in it is gone."""
        self._read_link_events()
        lost, self._lost_link = self._lost_link, False
        return lost

    def _use_broker(self, index: int) -> None:
        """Begin anew with a broker, perhaps the one in use."""
        self._read_link_events()
        self._link_events.close(linger=0)
        self._socket.close(linger=0)
        self._current = index
        self._connect()

    def _connect(self) -> None:
        self._lost_link = False
        self._socket = self._socket_to(self._current)
        self._link_events: Socket = self._socket.get_monitor_socket(
            LINK_EVENTS,
            f"inproc://{secrets.token_hex(8)}",  # a closed one's may still be in use
        )

    def _socket_to(self, index: int) -> Socket:
        # no pings: behind a large message on a thin link they would end the connection
        return connect_dealer(self._context, self._brokers[index], self._keys, pings=False)

    def _send(self, frames: list[bytes], timeout_s: float, socket: Socket | None = None) -> bool:
        """Hand frames to a connected broker; False when there is none in time."""
        socket = socket or self._socket
        socket.setsockopt(zmq.SNDTIMEO, round(timeout_s * 1000))
        try:
            socket.send_multipart(frames)
        except zmq.Again:
            return False
        self.bytes_up += wire_bytes(frames)
        return True

    def _receive(
        self, timeout_s: float, socket: Socket | None = None
    ) -> tuple[Message, bytes] | None:
        socket = socket or self._socket
        socket.setsockopt(zmq.RCVTIMEO, max(1, round(timeout_s * 1000)))
        try:
            frames = receive_frames(socket)
        except zmq.Again:
            return None
        self.bytes_down += wire_bytes(frames)
        try:
            check_frames(frames)
            return decode_header(frames[0]), frames[1] if len(frames) > 1 else b""
        except ProtocolError as error:
            if is_of_other_protocol(frames[0]):
                raise BrokerUnavailable(f"the broker at {self.broker} says: {error}") from error
            return None  # not an answer that we can read; ask again

    def _unavailable(self, waited_s: float) -> str:
        self._read_link_events()
        if self._refused_by:
            return self._refused_by
        listed = ", ".join(self._brokers)
        return (
            f"no broker answers at {listed} (waited {waited_s:g} s); "
            "start one with `midspan up`, or name yours with --broker"
        )


def _key_of(message: Message) -> tuple[Any, Any, Any]:
    return (
        getattr(message, "session_id", None),
        getattr(message, "generation", None),
        getattr(message, "step", None),
    )
