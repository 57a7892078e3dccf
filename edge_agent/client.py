"""Talk to the broker: send a step until it is answered, over a list of brokers.

Nothing is lost by asking again, because every message is idempotent. A broker that has a step says
so at once when it is asked again (StepPending), so silence means that the broker is gone, and the
next one on the list is tried.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import msgpack
import zmq
from zmq.utils.monitor import recv_monitor_message

from common.errors import (
    BrokerUnavailable,
    NoWorker,
    ProtocolError,
    StepRefused,
)
from common.keys import ClientKeys
from common.messages import (
    AnyOpening,
    AnyStep,
    Busy,
    EndSession,
    Message,
    NeedOpening,
    NeedRows,
    NeedTensors,
    StatusQuery,
    StatusReport,
    StepReply,
)
from common.messages import StepRefused as StepRefusedMessage
from common.sockets import Context, connect_dealer, has_message, receive_frames, wire_bytes
from common.wire import check_frames, decode_header, encode_header

ASK_AGAIN_S = 0.5  # a step that is not answered is sent again after this
SILENCE_S = 1.5  # a broker that says nothing for this long is given up for the next
NO_WORKER_RETRY_S = 0.25
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


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
        """The report of the first broker that answers. Raises BrokerUnavailable."""
        for _ in self._brokers:
            self._send([encode_header(StatusQuery())], timeout_s)
            give_up_at = time.monotonic() + timeout_s
            while (left_s := give_up_at - time.monotonic()) > 0:
                received = self._receive(left_s)
                if received is not None and isinstance(received[0], StatusReport):
                    report: dict[str, Any] = msgpack.unpackb(received[1])
                    return report
            self._use_next_broker()
        raise BrokerUnavailable(self._unavailable(timeout_s))

    def ask(
        self,
        step: AnyStep,
        body: bytes,
        opening: AnyOpening,
        *,
        is_known: bool,
        wait_for_worker: bool,
    ) -> tuple[StepReply | NeedRows | NeedTensors, bytes]:
        """Have a step computed: its StepReply with the body, or what a worker lacks for it.

        The opening goes along unless the broker `is_known` to have it, and when it asks for it.
        Raises NoWorker (unless told to wait for one), StepRefused when the pool gave up or did not
        answer within the client's timeout, BrokerUnavailable when no broker did.
        """
        frames = [encode_header(step), body]
        if not is_known:
            frames.append(encode_header(opening))
        give_up_at = time.monotonic() + self._timeout_s
        send_at = time.monotonic()
        patient_from = send_at  # when the broker in use was last heard, or came into use
        heard_at = -SILENCE_S
        sent_before = False
        while (now := time.monotonic()) < give_up_at:
            if now >= send_at:
                if now - patient_from > SILENCE_S:
                    self._use_next_broker()
                    patient_from = now
                self._send(frames, min(ASK_AGAIN_S, give_up_at - now))
                self.asked_again += sent_before
                sent_before = True
                send_at = now + ASK_AGAIN_S
            received = self._receive(max(0.001, min(send_at, give_up_at) - now))
            if received is None:
                continue
            message, answer_body = received
            if _key_of(message) != step.key:
                continue  # the answer to something asked before
            heard_at = patient_from = time.monotonic()
            if isinstance(message, StepReply | NeedRows | NeedTensors):
                return message, answer_body
            if isinstance(message, Busy):
                send_at = heard_at + message.retry_ms / 1000 * random.uniform(0.5, 1.5)
            elif isinstance(message, NeedOpening):
                frames = [frames[0], body, encode_header(opening)]
                send_at = heard_at
            elif isinstance(message, StepRefusedMessage):
                if message.code != "no_worker":
                    raise StepRefused(message.reason)
                if not wait_for_worker:
                    raise NoWorker(message.reason)
                send_at = heard_at + NO_WORKER_RETRY_S
        if heard_at > give_up_at - SILENCE_S:
            raise StepRefused(
                f"the broker at {self.broker} has the step, but no worker answered it within "
                f"{self._timeout_s:g} s; see `midspan status`"
            )
        raise BrokerUnavailable(self._unavailable(self._timeout_s))

    def end_session(self, session_id: bytes) -> None:
        """Say that a session is over. Nobody answers; what was not heard expires."""
        self._send([encode_header(EndSession(session_id))], timeout_s=0.0)

    # --- the socket

    def _note_refusals(self) -> None:
        """A broker that refuses a key closes the connection; ZeroMQ tells on the side."""
        while has_message(self._handshakes):
            event = recv_monitor_message(self._handshakes)["event"]
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

    def _use_next_broker(self) -> None:
        self._note_refusals()
        self._handshakes.close(linger=0)
        self._socket.close(linger=0)
        self._current = (self._current + 1) % len(self._brokers)
        self._connect()

    def _connect(self) -> None:
        self._socket = connect_dealer(self._context, self.broker, self._keys)
        self._handshakes = self._socket.get_monitor_socket(HANDSHAKE_FAILED)

    def _send(self, frames: list[bytes], timeout_s: float) -> None:
        """Hand frames to a connected broker, or drop them when there is none in time."""
        self._socket.setsockopt(zmq.SNDTIMEO, round(timeout_s * 1000))
        try:
            self._socket.send_multipart(frames)
        except zmq.Again:
            return
        self.bytes_up += wire_bytes(frames)

    def _receive(self, timeout_s: float) -> tuple[Message, bytes] | None:
        self._socket.setsockopt(zmq.RCVTIMEO, max(1, round(timeout_s * 1000)))
        try:
            frames = receive_frames(self._socket)
        except zmq.Again:
            return None
        self.bytes_down += wire_bytes(frames)
        try:
            check_frames(frames)
            return decode_header(frames[0]), frames[1] if len(frames) > 1 else b""
        except ProtocolError:
            return None  # not an answer that we can read; ask again

    def _unavailable(self, waited_s: float) -> str:
        self._note_refusals()
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
