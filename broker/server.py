"""The broker's sockets and clock: two ROUTER sockets around a BrokerState.

One thread, one poll loop. It reads the header frame of a message and keeps the bodies as they
came, to be sent again if a worker dies. Nothing here decides; see broker/state.py.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import zmq

from broker.actions import (
    AcceptDrain,
    Action,
    Answer,
    AskOpening,
    AskStep,
    Cancel,
    Dispatched,
    Forget,
    ForwardEnd,
    Note,
    PassOn,
    Refuse,
    TellBusy,
    TellJoined,
    TellNotJoined,
    TellPending,
)
from broker.admission import Admission
from broker.connections import ConnectionLimits, Connections
from broker.metrics import list_families
from broker.peer import Peer
from broker.port import Port
from broker.report import make_report
from broker.state import BrokerState
from common.console.log_limit import LogLimit
from common.console.memory import read_memory_bytes
from common.errors import ProtocolError, SettingsError
from common.metrics.page import MetricsPage
from common.protocol.messages import (
    Alive,
    Announce,
    AnyOpening,
    AskAgain,
    Busy,
    CancelStep,
    Dispatch,
    Drain,
    DrainAccepted,
    EndSession,
    ImageOpening,
    Joined,
    Leave,
    Message,
    Need,
    NeedOpening,
    NeedStep,
    NotJoined,
    Opening,
    StatusQuery,
    StatusReport,
    Step,
    StepDropped,
    StepFailed,
    StepKey,
    StepPending,
    StepRefused,
    StepReply,
)
from common.protocol.sockets import Context
from common.protocol.spinning import SpinningPoller
from common.protocol.wire import check_frames, decode_header, encode_header, refuse_protocol
from common.settings import MAX_BROKER_MB

log = logging.getLogger("midspan.broker")

MAX_TICK_S = 0.05
LOOK_S = 0.005  # at what is not a message, while there are messages all the time
RECEIVE_BURST = 256  # messages read from one socket before the other gets a turn


class BrokerServer:
    """Binds both sockets on construction; `run` serves until `stop`.

    With `keys`, a directory (see common/security/keys.py), only authorized peers are admitted.
    What it does is published on the page `metrics`. For `spin_s` after a message it waits for the
    next one without sleeping.
    Raises SettingsError when an address cannot be bound or the keys cannot be read.
    """

    def __init__(
        self,
        edge_endpoint: str,
        worker_endpoint: str,
        clock: Callable[[], float] = time.monotonic,
        keys: Path | None = None,
        max_memory_mb: int = MAX_BROKER_MB,
        connection_limits: ConnectionLimits | None = None,
        metrics: MetricsPage | None = None,
        spin_s: float = 0.0,
        **state_settings: Any,
    ) -> None:
        self._clock = clock
        self._poller = SpinningPoller(spin_s)
        self._max_memory_bytes = max_memory_mb << 20
        self._context: Context = zmq.Context()
        self._admission: Admission | None = None
        self._connections = Connections(connection_limits or ConnectionLimits(), keys is not None)
        try:
            if keys is not None:
                self._admission = Admission(self._context, keys)
            self._edges = self._open(edge_endpoint, "edge")
            self._workers = self._open(worker_endpoint, "worker")
        except SettingsError:
            self._close(linger=0)
            raise
        self.edge_endpoint = self._edges.endpoint
        self.worker_endpoint = self._workers.endpoint
        self.state = BrokerState(started_at=clock(), **state_settings)
        self._metrics = metrics
        self._frames: dict[StepKey, list[bytes]] = {}
        self._answer: list[bytes] = []
        self._bad_messages = 0
        self._complaints = LogLimit(log)
        self._stopping = False

    def _open(self, endpoint: str, role: str) -> Port:
        return Port(self._context, endpoint, role, self._admission, self._connections)

    def stop(self) -> None:
        """Make `run` return; may be called from a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Serve until `stop` is called, then close the sockets."""
        poller = self._poller
        for port in (self._edges, self._workers):
            poller.register(port.socket, zmq.POLLIN)
            poller.register(port.monitor, zmq.POLLIN)
        tick_s = min(MAX_TICK_S, self.state.silence_s / 4)
        next_tick_at = self._clock() + tick_s
        look_at = 0.0
        received = 0
        try:
            while not self._stopping:
                now = self._clock()
                if not received or now >= look_at:  # asking takes as long as reading
                    wait_s = min(max(0.0, next_tick_at - now), self._connections.wait_s(now))
                    ready = dict(poller.poll(0 if received else round(wait_s * 1000) + 1))
                    look_at = self._clock() + LOOK_S
                    for port in (self._workers, self._edges):
                        if port.monitor in ready:
                            port.read_links()
                received = self._receive(self._workers, self._on_worker_message)
                # after what was said before the end, and all at once: a step must not go from
                # one dead worker to the next
                now = self._clock()
                if ended := self._workers.take_ended():
                    self._decide(functools.partial(self.state.on_disconnected, ended, now))
                received += self._receive(self._edges, self._on_edge_message)
                now = self._clock()
                if ended := self._edges.take_ended():
                    self._decide(functools.partial(self.state.on_edges_disconnected, ended, now))
                self._connections.check_strangers(now)
                if now >= next_tick_at:
                    if now - next_tick_at > self.state.silence_s / 2:  # we slept, not they
                        self._receive(self._workers, self._on_worker_message)
                    self._tick(now)
                    next_tick_at = now + tick_s
        finally:
            self._close(linger=200)

    def _decide(self, decide: Callable[[], list[Action]]) -> None:
        """What nobody has sent: a mistake of ours there shall not end it for all."""
        try:
            self._perform(decide())
        except Exception:
            log.exception("something could not be decided")

    def _tick(self, now: float) -> None:
        memory_bytes = read_memory_bytes()
        self.state.is_full = memory_bytes > self._max_memory_bytes
        self._connections.check_all(now, memory_bytes, self._count_kept)
        if self._admission is not None:
            self._connections.check_keys(self._admission.changed())
        self._decide(functools.partial(self.state.on_tick, now))
        if self._metrics is not None and self._metrics.is_due():
            ports = {"edges": self._edges, "workers": self._workers}
            families = list_families(self.state, ports, self._bad_messages, memory_bytes)
            self._metrics.publish(families)

    def _close(self, linger: int) -> None:
        if self._admission is not None:
            self._admission.stop()
        self._context.destroy(linger=linger)

    def _count_kept(self) -> int:
        """Bytes of the steps that are here."""
        return sum(len(frame) for frames in self._frames.values() for frame in frames)

    def _receive(self, port: Port, handle: Callable[[Peer, Message, list[bytes]], None]) -> int:
        """Handle what has come, up to a burst; how many messages that was."""
        for count in range(RECEIVE_BURST):
            received = port.receive()
            if received is None:
                return count
            try:
                self._handle(port, *received, handle)
            except Exception as error:  # one message must not end the broker
                log.exception("a message could not be handled")
                self._count_bad_message(error)
        return RECEIVE_BURST

    def _handle(
        self,
        port: Port,
        peer: Peer,
        frames: list[bytes],
        handle: Callable[[Peer, Message, list[bytes]], None],
    ) -> None:
        try:
            check_frames(frames)
            handle(peer, decode_header(frames[0]), frames)
        except ProtocolError as error:
            self._count_bad_message(error)
            refusal = refuse_protocol(frames[0])
            if refusal is not None:
                port.send(peer.address, [refusal])

    def _count_bad_message(self, error: Exception) -> None:
        self._bad_messages += 1
        self._complaints.warning("dropped a message, the %dth: %s", self._bad_messages, error)

    def _on_edge_message(self, edge: Peer, message: Message, frames: list[bytes]) -> None:
        now = self._clock()
        if isinstance(message, Step):
            self._poller.expect()
            try:
                opening = self._read_opening(frames)
            except ProtocolError as error:  # whoever sent it shall not wait for an answer
                self._perform([Refuse(edge.address, message.key, "invalid", str(error))])
                raise
            known = message.key in self.state.steps
            opening_frame = frames[2] if opening is not None else b""
            actions = self.state.on_step(message, opening, edge, len(frames[1]), now, opening_frame)
            if not known and message.key in self.state.steps:
                self._frames[message.key] = frames[:2]
            self._perform(actions)
        elif isinstance(message, StatusQuery):
            report = make_report(self.state, now) | {
                "bad_messages": self._bad_messages,
                "refused_connections": dict(self._admission.refused) if self._admission else {},
                "ended_connections": self._connections.ended,
            }
            self._edges.send(edge.address, [encode_header(StatusReport()), msgpack.packb(report)])
        elif isinstance(message, AskAgain):
            self._perform(self.state.on_ask_again(message, edge, now))
        elif isinstance(message, EndSession):
            self._perform(self.state.on_end(message.session_id, edge))
        elif isinstance(message, Announce):
            why = f"{self.edge_endpoint} is for edges; workers go to {self.worker_endpoint}"
            self._edges.send(edge.address, [encode_header(NotJoined(why, is_final=True))])
        elif isinstance(message, Alive | Leave):
            pass  # of a worker that is told so
        else:
            raise ProtocolError(f"an edge may not send {message.kind!r}")

    def _read_opening(self, frames: list[bytes]) -> AnyOpening | None:
        if len(frames) not in (2, 3):
            raise ProtocolError(f"step has {len(frames) - 1} further frames; expected 1 or 2")
        if len(frames) == 2:
            return None
        opening = decode_header(frames[2])
        if not isinstance(opening, Opening | ImageOpening):
            raise ProtocolError(f"step carries {opening.kind!r}; expected an opening")
        return opening

    def _on_worker_message(self, peer: Peer, message: Message, frames: list[bytes]) -> None:
        now = self._clock()
        if isinstance(
            message,
            StepReply | Need | StepFailed | StepDropped | Drain | Leave,
        ):
            forged = self.state.check_sender(message.worker_id, peer)
            if forged is not None:
                self._perform([forged])
                return
        if isinstance(message, StepReply) and len(frames) != 2:
            why = f"answered with {len(frames) - 1} bodies; expected 1"
            failed = StepFailed(*message.key, message.attempt, message.worker_id, why)
            self._perform(self.state.on_failed(failed, now))
        elif isinstance(message, StepReply | Need):
            self._poller.expect()
            self._answer = frames
            self._perform(self.state.on_answer(message, now, sum(map(len, frames[1:]))))
            self._answer = []
        elif isinstance(message, Announce):
            self._perform(self.state.on_announce(message, peer, now))
        elif isinstance(message, Alive):
            self._perform(self.state.on_alive(message, peer, now))
        elif isinstance(message, StepFailed):
            self._complaints.warning(
                "worker %s failed a step: %s", message.worker_id, message.reason
            )
            self._perform(self.state.on_failed(message, now))
        elif isinstance(message, StepDropped):
            self._perform(self.state.on_dropped(message, now))
        elif isinstance(message, Drain):
            self._perform(self.state.on_drain(message.worker_id, peer, now))
        elif isinstance(message, Leave):
            self._perform(self.state.on_worker_gone(message.worker_id, "left", now))
        elif isinstance(message, StatusQuery | Step | AskAgain):
            why = f"{self.worker_endpoint} is for workers; edges go to {self.edge_endpoint}"
            self._workers.send(peer.address, [encode_header(NotJoined(why, is_final=True))])
        else:
            raise ProtocolError(f"a worker may not send {message.kind!r}")

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Dispatched(worker_id, key, attempt, queue_us):
                    if not self.state.is_current(action):
                        continue
                    frames = self._make_dispatch(key, attempt, queue_us)
                    if not self._send_to_worker(worker_id, frames):
                        now = self._clock()
                        self._perform(self.state.on_undeliverable(action, now))
                case Answer(edge_id, _):
                    self._edges.send(edge_id, self._answer)
                case PassOn(step):
                    self._frames[step.key] = [encode_header(step), b"".join(self._answer[1:])]
                case Forget(key):
                    self._frames.pop(key, None)
                case Refuse(edge_id, key, code, reason, detour):
                    refusal = StepRefused(*key, code, reason[:2000], list(detour))
                    self._edges.send(edge_id, [encode_header(refusal)])
                case TellPending(edge_id, key):
                    self._edges.send(edge_id, [encode_header(StepPending(*key))])
                case AskOpening(edge_id, key):
                    self._edges.send(edge_id, [encode_header(NeedOpening(*key))])
                case AskStep(edge_id, key):
                    self._edges.send(edge_id, [encode_header(NeedStep(*key))])
                case Cancel(worker_id, key, attempt, owner):
                    cancel = CancelStep(*key, attempt, owner)
                    self._send_to_worker(worker_id, [encode_header(cancel)])
                case TellBusy(edge_id, key, retry_ms):
                    self._edges.send(edge_id, [encode_header(Busy(*key, retry_ms))])
                case ForwardEnd(worker_id, session_id, owner, route):
                    end = EndSession(session_id, owner, route)
                    self._send_to_worker(worker_id, [encode_header(end)])
                case TellJoined(address):
                    self._workers.send(address, [encode_header(Joined())])
                case TellNotJoined(address, reason):
                    refusal_of_worker = NotJoined(reason[:2000], is_final=False)
                    self._workers.send(address, [encode_header(refusal_of_worker)])
                case AcceptDrain(address):
                    self._workers.send(address, [encode_header(DrainAccepted())])
                case Note(text, is_warning):
                    if is_warning:
                        self._complaints.warning("%s", text)
                    else:
                        log.info("%s", text)

    def _make_dispatch(self, key: StepKey, attempt: int, queue_us: int) -> list[bytes]:
        session, record = self.state.sessions[key[0]], self.state.steps[key]
        dispatch = Dispatch(
            attempt, queue_us, session.edge.key, session.account.number, session.precision,
            record.earlier_compute_us, record.hop, record.units,
        )  # fmt: skip
        return [encode_header(dispatch), *self._frames[key], session.opening_frame]

    def _send_to_worker(self, worker_id: str, frames: list[bytes]) -> bool:
        worker = self.state.workers.get(worker_id)
        return worker is not None and self._workers.send(worker.peer.address, frames)
