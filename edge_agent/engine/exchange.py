"""One step's life between an edge and its brokers: events in, frames out. No sockets, no clock.

Nothing is lost by asking again, because every message is idempotent. A broker that has a step says
so at once when it is asked again (StepPending), so silence means that the broker is gone, and the
next one on the list is tried. Silence is measured by the link: what is on its way at 5 KB/s takes
half a minute for a prompt, and a second copy behind the first would take another one. So a step is
asked for again by its name only (AskAgain), unless its connection ended or the broker says that it
does not have it.

Times are in seconds, monotonic.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from common.errors import NoWorker, SettingsError, StepOvertaken, StepRefused
from common.protocol.messages import (
    AnyOpening,
    AskAgain,
    Busy,
    Message,
    Need,
    NeedOpening,
    Step,
    StepKey,
    StepPending,
    StepReply,
)
from common.protocol.messages import StepRefused as StepRefusedMessage
from common.protocol.sockets import wire_bytes
from common.protocol.wire import encode_header
from common.settings import MAX_BODY_BYTES
from edge_agent.engine.link_meter import LinkMeter

ASK_AGAIN_S = 0.5  # a step that is not answered is sent again after this
SILENCE_S = 1.5  # a broker that says nothing for this long is given up for the next
ASKED_S = 1.0  # if it was asked for so long: an edge that had no time to ask heard nothing either
NO_WORKER_RETRY_S = 0.25

Answer = StepReply | Need


@dataclass(frozen=True, slots=True)
class Ask:
    """A step to be computed. `reply_bytes` says about how much comes back.

    The opening goes along unless the broker `is_known` to have it, and when it asks for it. It is
    not sent before `pause_s` have passed. When nobody serves it, `hint` says what would, and a
    worker is waited for if that is wanted, unless `takes_detours` and the broker knows one.
    """

    step: Step
    body: bytes
    opening: AnyOpening
    is_known: bool
    wait_for_worker: bool
    reply_bytes: int = 0
    pause_s: float = 0.0
    hint: str = ""
    takes_detours: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer with its body, and what it cost to have it: bytes on the wire."""

    answer: Answer
    body: bytes
    bytes_up: int
    bytes_down: int
    asked_again: int


class Exchange:
    """Goes on until `hear` returns the answer or something raises. Not thread-safe.

    Whoever drives it calls `check` in time for `due_at`, sends the frames that are `due`, and says
    what became of that. Raises SettingsError on construction for a body that no broker takes.
    """

    def __init__(
        self,
        ask: Ask,
        timeout_s: float,
        meter: LinkMeter,
        now: float,
        behind_bytes: int = 0,
        is_alone: bool = True,
    ) -> None:
        """`behind_bytes` of the same session are on their way before it; alone nothing else is."""
        if len(ask.body) > MAX_BODY_BYTES:
            raise SettingsError(
                f"a step has {len(ask.body):,} bytes and brokers take {MAX_BODY_BYTES:,}; make "
                "fewer images at once, send shorter pieces of a prompt, or choose a smaller codec"
            )
        self._ask = ask
        self.key: StepKey = ask.step.key
        self._frames = [encode_header(ask.step), ask.body]
        if not ask.is_known:
            self._frames.append(encode_header(ask.opening))
        self._meter = meter
        self.travel_bytes = wire_bytes(self._frames) + ask.reply_bytes
        self._goes_alone = is_alone
        self._travel_s = meter.travel_s(self.travel_bytes + behind_bytes)
        self._timeout_s = timeout_s
        self._give_up_at = now + timeout_s + self._travel_s
        self._send_at = now + ask.pause_s
        self._since = now  # when something was last heard, or a broker came into use
        self._pause_s = ASK_AGAIN_S
        self._was_heard = False
        self._is_sent = False  # to the broker in use, over a connection that lasts
        self._sent_at: float | None = None
        self._asked_at: float | None = None  # first, since something was last heard
        self._was_sent = False  # at all
        self.asked_again = 0
        self.bytes_up = self.bytes_down = 0

    @property
    def is_sent(self) -> bool:
        """To the broker in use, over a connection that lasts."""
        return self._is_sent

    @property
    def due_at(self) -> float:
        """When to look at it again if nothing is heard."""
        return min(self._send_at, self._give_up_at)

    def check(self, now: float, broker: str) -> bool:
        """Whether the broker in use is to be given up for the next. Raises when time is over.

        StepRefused if the broker has the step all the same; BrokerGone if it was silent.
        """
        is_silent = now - self._since > SILENCE_S + (self._travel_s if self._is_sent else 0.0)
        if self._is_sent:
            is_silent &= self._asked_at is not None and now - self._asked_at >= ASKED_S
        if now < self._give_up_at:
            return is_silent and now >= self._send_at
        if self._was_heard and not is_silent:
            raise StepRefused(
                f"the broker at {broker} has the step, but no worker answered it within "
                f"{self._timeout_s:g} s; see `midspan status`"
            )
        raise BrokerGone(self._timeout_s)

    def on_other_broker(self, now: float) -> None:
        """Another broker is in use, or the same over a new connection."""
        self._begin(now)
        self._is_sent = False
        self._send_at = now

    def on_company(self) -> None:
        """Others go over the link as well: what it takes does not say how the link is."""
        self._goes_alone = False

    def on_link_lost(self) -> None:
        """The connection ended: what was in it is gone."""
        self._is_sent = False

    def due(self, now: float) -> list[bytes] | None:
        """What to send now, if anything; say what became of it with `on_handed_over`."""
        if now < self._send_at:
            return None
        return [encode_header(AskAgain(*self.key))] if self._is_sent else self._frames

    def on_handed_over(self, frames: list[bytes], now: float) -> None:
        """The frames are on their way."""
        if not self._is_sent:
            self._is_sent, self._sent_at = True, now
        elif self._asked_at is None:
            self._asked_at = now
        self.asked_again += self._was_sent
        self._was_sent = True
        self.bytes_up += wire_bytes(frames)
        self._send_at = now + self._pause_s
        self._pause_s *= 2  # what is asked goes through the same thin link

    def on_not_handed_over(self, now: float, retry_s: float) -> None:
        """There is no connection that takes anything."""
        self._send_at = now + retry_s

    def hear(self, message: Message, body: bytes, size: int, now: float) -> Answered | None:
        """A message about this step came, of `size` bytes in all; the answer, if it is that.

        Raises NoWorker unless one is to be waited for, and StepRefused.
        """
        self._begin(now)
        self._was_heard = True
        self.bytes_down += size
        if self._sent_at is not None:
            self._learn(message, size, now - self._sent_at)
            self._sent_at = None
        if isinstance(message, StepReply | Need):
            return Answered(message, body, self.bytes_up, self.bytes_down, self.asked_again)
        if isinstance(message, StepPending):
            self._send_at = min(self._send_at, now + ASK_AGAIN_S)
            return None
        self._is_sent, self._send_at = False, now  # the broker does not have it
        if isinstance(message, Busy):
            self._send_at += message.retry_ms / 1000 * random.uniform(0.5, 1.5)
        elif isinstance(message, NeedOpening):
            self._frames = [*self._frames[:2], encode_header(self._ask.opening)]
        elif isinstance(message, StepRefusedMessage):
            if message.code == "stale":
                raise StepOvertaken(message.reason)
            if message.code != "no_worker":
                raise StepRefused(message.reason)
            detour = message.detour if self._ask.takes_detours else []
            if detour or not self._ask.wait_for_worker:
                raise NoWorker(f"{message.reason}{self._ask.hint}", detour)
            self._send_at += NO_WORKER_RETRY_S
        return None

    def _learn(self, message: Message, size: int, seconds: float) -> None:
        both_ways_bytes = wire_bytes(self._frames) + size
        self._meter.learn(both_ways_bytes, seconds)
        if isinstance(message, StepReply) and self._goes_alone:
            pool_s = (message.queue_us + message.compute_us) / 1e6
            self._meter.note(both_ways_bytes, seconds - pool_s)

    def _begin(self, now: float) -> None:
        self._since, self._pause_s, self._asked_at = now, ASK_AGAIN_S, None


class BrokerGone(Exception):
    """No broker said anything about a step in all the time that it had, in seconds."""
