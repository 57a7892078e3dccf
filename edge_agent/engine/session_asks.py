"""How a session asks the pool for its steps, be it of text or of an image. No sockets, no clock.

A session numbers its steps, remembers in which precision it is computed, and loses patience: with a
worker whose answers cannot be used, or that lacks again what it was just sent, and in the end with
all of them.
"""

from __future__ import annotations

import secrets
from collections import Counter

from msgspec import structs

from common.errors import MidspanError, StepRefused
from common.protocol.messages import AnyOpening, Need, Part, Step, StepReply
from common.settings import MAX_ATTEMPTS
from edge_agent.engine.exchange import Ask

ALONE_PAUSE_S = 1.0  # before a step goes once more to the only worker, which has spoilt it twice
MAX_NEEDS = 16  # in one piece of work; every worker that dies on the way costs one or two


class SessionAsks:
    """The steps of one session. `is_known`: a broker has heard of it, and a worker has answered.

    `command` would start a worker for it. With `takes_detours` it had rather go another way than
    wait for one.
    """

    def __init__(self, opening: AnyOpening, command: str = "", takes_detours: bool = False) -> None:
        self._hint = f". To serve it: `{command}`" if command else ""
        self.session_id = secrets.token_bytes(16)
        self.opening = opening
        self.is_known = False
        self._takes_detours = takes_detours
        self._number = 0
        self._shun = ""  # a worker that the next step would rather not go to
        self.begin_work()

    def begin_work(self) -> None:
        """What comes next is one piece of work: patience is new."""
        self._needs = 0
        self._pause_s = 0.0
        self._unusable: Counter[str] = Counter()  # answers, by worker
        self._askers: Counter[str] = Counter()  # workers that lacked something

    def make(
        self,
        *,
        position: int,
        parts: list[Part],
        body: bytes,
        reply_codec: int,
        deadline_s: float,
        reply_bytes: int,
        generation: int = 0,
        fork: int = 0,
        reply_rows: int = 0,
        tentative: int = 0,
    ) -> Ask:
        """The next step. `reply_bytes` says about how much comes back."""
        step = Step(
            session_id=self.session_id,
            generation=generation,
            fork=fork,
            step=self._number,
            position=position,
            parts=parts,
            reply_rows=reply_rows,
            reply_codec=reply_codec,
            deadline_ms=round(deadline_s * 1000),
            shun=self._shun,
            tentative=tentative,
        )
        self._number += 1
        self._shun = ""
        return Ask(
            step, body, self.opening,
            is_known=self.is_known, wait_for_worker=self.is_known, reply_bytes=reply_bytes,
            pause_s=self._pause_s, hint=self._hint, takes_detours=self._takes_detours,
        )  # fmt: skip

    def on_usable(self, answer: StepReply | Need) -> None:
        """An answer makes sense. The first one settles the session's precision.

        A broker that has forgotten is told by the opening.
        """
        if answer.precision and not self.opening.precision:
            self.opening = structs.replace(self.opening, precision=answer.precision)

    def on_unusable(self, answer: StepReply | Need, error: MidspanError) -> None:
        """An answer made no sense: another worker shall try. Raises StepRefused after some.

        If the same one has tried again there is no other now; who was there mostly comes back.
        """
        self._unusable[answer.worker_id] += 1
        self._shun = answer.worker_id
        self._pause_s = ALONE_PAUSE_S if self._unusable[answer.worker_id] > 1 else 0.0
        count = self._unusable.total()
        if count >= MAX_ATTEMPTS:
            raise StepRefused(f"{count} answers could not be used: {error}") from error

    def on_need(self, need: Need, what: str, hint: str = "") -> None:
        """A worker lacks `what` of the session. Raises StepRefused after many of these."""
        self._needs += 1
        self._askers[need.worker_id] += 1
        if self._askers[need.worker_id] > 1:  # it was given that, or says so to no end
            self._shun = need.worker_id
        if self._needs > MAX_NEEDS:
            raise StepRefused(f"workers lost {what} {self._needs} times in one step{hint}")
