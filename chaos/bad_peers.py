"""Peers that are admitted and do wrong: a worker that lies, an edge that floods or abandons.

For tests and `midspan chaos`. They speak the protocol as it is, over sockets of their own.
"""

from __future__ import annotations

import os
import random
import secrets
import threading
import time
from typing import Any

import zmq

from common.protocol.messages import (
    Announce,
    Dispatch,
    ImageOpening,
    Need,
    Opening,
    Part,
    Service,
    Step,
    StepReply,
)
from common.protocol.sockets import Context, connect_dealer, has_message, receive_frames
from common.protocol.wire import decode_header, encode_header

ANNOUNCE_S = 0.1
POLL_MS = 10
TEXT_LIES = ("asks for tensors", "asks for rows it was sent", "asks for rows without end",
             "answers too few rows", "answers in another precision")  # fmt: skip
IMAGE_LIES = ("asks for rows", "asks for unknown tensors", "asks for latents",
              "asks for conditioning without end", "answers nothing")  # fmt: skip


class LyingWorker:
    """Announces services as its own and answers every step with a lie, until `close`.

    `services` are maps as `midspan status` has them. Without a `lie` of its own it takes any of
    TEXT_LIES and IMAGE_LIES.
    """

    def __init__(
        self, broker: str, services: list[dict[str, Any]], seed: int, lie: str = ""
    ) -> None:
        self.lies = 0
        self._only = lie
        self.worker_id = f"liar-{secrets.token_hex(4)}"
        self._services = [Service(**service) for service in services]
        self._broker = broker
        self._rng = random.Random(seed)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="liar", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed = True
        self._thread.join()

    def _run(self) -> None:
        context: Context = zmq.Context()
        socket = connect_dealer(context, self._broker)
        announce = encode_header(
            Announce(self.worker_id, self._services, 64, 100, pid=os.getpid(), host="liar")
        )
        announce_at = 0.0
        while not self._closed:
            if time.monotonic() >= announce_at:
                socket.send(announce)
                announce_at = time.monotonic() + ANNOUNCE_S
            socket.poll(POLL_MS)
            while has_message(socket):
                frames = receive_frames(socket)
                dispatch = decode_header(frames[0])
                if isinstance(dispatch, Dispatch):
                    self.lies += 1
                    socket.send_multipart(self._lie(dispatch, decode_header(frames[1])))
        context.destroy(linger=0)

    def _lie(self, dispatch: Dispatch, step: Any) -> list[bytes]:
        to: dict[str, Any] = {
            "session_id": step.session_id,
            "generation": step.generation,
            "step": step.step,
            "attempt": dispatch.attempt,
            "worker_id": self.worker_id,
        }
        nothing: dict[str, Any] = {"committed": 0, "queue_us": 0, "compute_us": 0}
        lie = self._only or self._rng.choice(TEXT_LIES if step.reply_rows else IMAGE_LIES)
        answer: Need | StepReply
        match lie:
            case "asks for tensors" | "asks for latents":
                answer = Need(have=0, names=["latents"], **to)
            case "asks for unknown tensors":
                answer = Need(have=0, names=["prompt", "password"], **to)
            case "asks for conditioning without end":
                answer = Need(have=0, names=["conditioning"], **to)
            case "asks for rows it was sent":
                answer = Need(have=step.position + 1, names=[], **to)
            case "asks for rows" | "asks for rows without end":
                answer = Need(have=0, names=[], **to)
            case "answers in another precision":
                answer = StepReply(rows=1, precision="float8", **nothing, **to)
            case _:
                answer = StepReply(rows=0, **nothing, **to)
        return [encode_header(answer), b""]


def flood(broker: str, services: list[dict[str, Any]], steps: int) -> None:
    """One edge sends many small bad steps, each in a session of its own, and goes on listening."""
    context: Context = zmq.Context()
    socket = connect_dealer(context, broker)
    socket.setsockopt(zmq.SNDTIMEO, 2000)
    for index in range(steps):
        service = services[index % len(services)]
        socket.send_multipart(_bad_step(service, index))
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        if socket.poll(POLL_MS):
            receive_frames(socket)
    context.destroy(linger=0)


def _bad_step(service: dict[str, Any], index: int) -> list[bytes]:
    """A step of the wrong kind, or without bounds, or that nobody can compute."""
    model, part, forever = service["model"], service["part"], 2**53
    text = Opening(model, [part], service["hidden"], ["int8"], "")
    image = ImageOpening(model, [part], ["int8"], 1, 1.0, [1.0], False, "", "float32")
    session_id = secrets.token_bytes(16)
    rows = (1, 1, 2**40, 65_536)[index % 4]
    step = Step(session_id, 0, 0, 0, 0, [Part(0, [rows], 12)], 1, 0, forever)
    if index % 3 == 0:
        picture = Step(session_id, 0, 0, 0, 0, [], 0, 0, forever)
        return [encode_header(picture), b"", encode_header(text)]
    return [encode_header(step), bytes(12), encode_header(image if index % 3 == 1 else text)]


def abandon(broker: str, service: dict[str, Any], sessions: int, rows: int = 256) -> None:
    """An edge sends long steps that can be computed, in many sessions, and is gone at once."""
    import torch

    from common.codecs.codec import make_codec

    body = make_codec("int8", "up").encode(torch.randn(rows, service["hidden"]))
    opening = Opening(service["model"], [service["part"]], service["hidden"], ["int8"], "")
    context: Context = zmq.Context()
    socket = connect_dealer(context, broker)
    socket.setsockopt(zmq.SNDTIMEO, 2000)
    for _ in range(sessions):
        step = Step(
            secrets.token_bytes(16), 0, 0, 0, 0, [Part(0, [rows], len(body))], rows, 0, 600_000
        )
        socket.send_multipart([encode_header(step), body, encode_header(opening)])
    context.destroy(linger=500)
