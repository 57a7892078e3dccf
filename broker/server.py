"""The broker's sockets and clock: two ROUTER sockets around a BrokerState.

One thread, one poll loop. It reads the header frame of a message and keeps the bodies as they
came, to be sent again if a worker dies. Nothing here decides; see broker/state.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import msgpack
import zmq

from broker.actions import (
    AcceptDrain,
    Action,
    Answer,
    AskOpening,
    Dispatched,
    Forget,
    ForwardEnd,
    Note,
    Refuse,
    TellBusy,
    TellPending,
)
from broker.report import make_report
from broker.state import BrokerState
from common.errors import ProtocolError, SettingsError
from common.messages import (
    Announce,
    Busy,
    Dispatch,
    Drain,
    DrainAccepted,
    EndSession,
    Leave,
    Message,
    NeedOpening,
    NeedRows,
    Opening,
    StatusQuery,
    StatusReport,
    Step,
    StepFailed,
    StepKey,
    StepPending,
    StepRefused,
    StepReply,
)
from common.settings import MAX_BODY_BYTES
from common.sockets import Context, Socket, has_message
from common.wire import check_frames, decode_header, encode_header

log = logging.getLogger("midspan.broker")

MAX_TICK_S = 0.05
RECEIVE_BURST = 256  # messages read from one socket before the other gets a turn


class BrokerServer:
    """Binds both sockets on construction; `run` serves until `stop`.

    Raises SettingsError when an address cannot be bound.
    """

    def __init__(
        self,
        edge_endpoint: str,
        worker_endpoint: str,
        clock: Callable[[], float] = time.monotonic,
        **state_settings: Any,
    ) -> None:
        self._clock = clock
        self._context: Context = zmq.Context()
        try:
            self._edges = self._bind(edge_endpoint, "--edges")
            self._workers = self._bind(worker_endpoint, "--workers")
        except SettingsError:
            self._context.destroy(linger=0)
            raise
        self.edge_endpoint = self._edges.getsockopt_string(zmq.LAST_ENDPOINT)
        self.worker_endpoint = self._workers.getsockopt_string(zmq.LAST_ENDPOINT)
        self.state = BrokerState(started_at=clock(), **state_settings)
        self._frames: dict[StepKey, list[bytes]] = {}
        self._answer: list[bytes] = []
        self._bad_messages = 0
        self._stopping = False

    def _bind(self, endpoint: str, option: str) -> Socket:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 200)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_BODY_BYTES)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        socket.setsockopt(zmq.SNDTIMEO, 0)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise SettingsError(
                f"{option} {endpoint} cannot be bound: {zmq.strerror(error.errno or 0)}; "
                "is another broker running?"
            ) from error
        return socket

    def stop(self) -> None:
        """Make `run` return; may be called from a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Serve until `stop` is called, then close the sockets."""
        poller = zmq.Poller()
        poller.register(self._edges, zmq.POLLIN)
        poller.register(self._workers, zmq.POLLIN)
        tick_s = min(MAX_TICK_S, self.state.silence_s / 4)
        next_tick_at = self._clock() + tick_s
        try:
            while not self._stopping:
                wait_s = max(0.0, next_tick_at - self._clock())
                ready = dict(poller.poll(round(wait_s * 1000) + 1))
                if self._workers in ready:
                    self._receive(self._workers, self._on_worker_message)
                if self._edges in ready:
                    self._receive(self._edges, self._on_edge_message)
                now = self._clock()
                if now >= next_tick_at:
                    if now - next_tick_at > self.state.silence_s / 2:
                        self._receive(self._workers, self._on_worker_message)  # we slept, not they
                    self._perform(self.state.on_tick(now))
                    next_tick_at = now + tick_s
        finally:
            self._context.destroy(linger=200)

    def _receive(
        self, socket: Socket, handle: Callable[[bytes, Message, list[bytes]], None]
    ) -> None:
        for _ in range(RECEIVE_BURST):
            if not has_message(socket):
                return
            peer_id, *frames = socket.recv_multipart()
            try:
                check_frames(frames)
                handle(peer_id, decode_header(frames[0]), frames)
            except ProtocolError as error:
                self._bad_messages += 1
                log.warning("dropped a message: %s", error)

    def _on_edge_message(self, edge_id: bytes, message: Message, frames: list[bytes]) -> None:
        now = self._clock()
        if isinstance(message, Step):
            opening = self._read_opening(frames)
            self._frames.setdefault(message.key, frames[:2])
            actions = self.state.on_step(message, opening, edge_id, now)
            if message.key not in self.state.steps:
                actions.append(Forget(message.key))
            self._perform(actions)
        elif isinstance(message, StatusQuery):
            report = make_report(self.state, now) | {"bad_messages": self._bad_messages}
            self._send(self._edges, edge_id, [encode_header(StatusReport()), msgpack.packb(report)])
        elif isinstance(message, EndSession):
            self._perform(self.state.on_end(message.session_id))
        else:
            raise ProtocolError(f"an edge may not send {message.kind!r}")

    def _read_opening(self, frames: list[bytes]) -> Opening | None:
        if len(frames) not in (2, 3):
            raise ProtocolError(f"step has {len(frames) - 1} further frames; expected 1 or 2")
        if len(frames) == 2:
            return None
        opening = decode_header(frames[2])
        if not isinstance(opening, Opening):
            raise ProtocolError(f"step carries {opening.kind!r}; expected an opening")
        return opening

    def _on_worker_message(self, peer_id: bytes, message: Message, frames: list[bytes]) -> None:
        now = self._clock()
        if isinstance(message, StepReply | NeedRows):
            self._answer = frames
            self._perform(self.state.on_answer(message, now))
            self._answer = []
        elif isinstance(message, Announce):
            self._perform(self.state.on_announce(message, now))
        elif isinstance(message, StepFailed):
            log.warning("worker %s failed a step: %s", message.worker_id, message.reason)
            self._perform(self.state.on_failed(message, now))
        elif isinstance(message, Drain):
            self._perform(self.state.on_drain(message.worker_id, now))
        elif isinstance(message, Leave):
            self._perform(self.state.on_worker_gone(message.worker_id, "left", now))
        else:
            raise ProtocolError(f"a worker may not send {message.kind!r}")

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Dispatched(worker_id, key, attempt, queue_us):
                    if not self.state.is_current(action):
                        continue
                    header = encode_header(Dispatch(attempt, queue_us))
                    opening = encode_header(self.state.sessions[key[0]].opening)
                    frames = [header, *self._frames[key], opening]
                    sent = self._send(self._workers, worker_id.encode(), frames)
                    if not sent:
                        now = self._clock()
                        self._perform(self.state.on_undeliverable(action, now))
                case Answer(edge_id, _):
                    self._send(self._edges, edge_id, self._answer)
                case Forget(key):
                    self._frames.pop(key, None)
                case Refuse(edge_id, key, code, reason):
                    refusal = StepRefused(*key, code, reason[:2000])
                    self._send(self._edges, edge_id, [encode_header(refusal)])
                case TellPending(edge_id, key):
                    self._send(self._edges, edge_id, [encode_header(StepPending(*key))])
                case AskOpening(edge_id, key):
                    self._send(self._edges, edge_id, [encode_header(NeedOpening(*key))])
                case TellBusy(edge_id, key, retry_ms):
                    self._send(self._edges, edge_id, [encode_header(Busy(*key, retry_ms))])
                case ForwardEnd(worker_id, session_id):
                    self._send(
                        self._workers, worker_id.encode(), [encode_header(EndSession(session_id))]
                    )
                case AcceptDrain(worker_id):
                    self._send(self._workers, worker_id.encode(), [encode_header(DrainAccepted())])
                case Note(text):
                    log.info(text)

    def _send(self, socket: Socket, peer_id: bytes, frames: list[bytes]) -> bool:
        """False when the peer is gone or takes nothing more; whoever needs it will ask again."""
        try:
            socket.send_multipart([peer_id, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True
