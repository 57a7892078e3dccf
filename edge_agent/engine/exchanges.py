"""All steps that an engine waits for, over one link: sent, asked for again, and answered.

Each belongs to somebody, of whom nothing is known here. A connection that ends and a broker that
falls silent concern all of them at once. What a session has sent goes through the link in turn, so
the last of its steps may be on its way for as long as all of them take.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from common.errors import BrokerUnavailable, MidspanError
from common.protocol.messages import StepKey
from edge_agent.engine.exchange import Answered, Ask, BrokerGone, Exchange
from edge_agent.engine.link import BrokerLink, key_of
from edge_agent.engine.link_meter import LinkMeter

RETRY_SEND_S = 0.02  # when there is no connection

Owner = TypeVar("Owner")
Outcome = Answered | MidspanError


class Exchanges(Generic[Owner]):
    """Not thread-safe."""

    def __init__(self, link: BrokerLink, timeout_s: float, meter: LinkMeter | None = None) -> None:
        """The `meter` learns from them, and may be another's as well."""
        self._link = link
        self._timeout_s = timeout_s
        self.meter = meter or LinkMeter()
        self._by_key: dict[StepKey, tuple[Owner, Exchange]] = {}
        self._of_session: dict[bytes, dict[StepKey, Exchange]] = {}  # in the order of its steps
        self._due: list[tuple[float, int, StepKey, Exchange]] = []
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def due_at(self) -> float | None:
        """When to look after them if nothing is heard."""
        return self._due[0][0] if self._due else None

    def begin(self, owner: Owner, ask: Ask) -> StepKey:
        """Have a step computed. Raises SettingsError for a body that no broker takes."""
        before = self._of_session.get(ask.step.session_id, {})
        behind_bytes = sum(exchange.travel_bytes for exchange in before.values())
        exchange = Exchange(
            ask, self._timeout_s, self.meter, time.monotonic(), behind_bytes, not self._by_key
        )
        if len(self._by_key) == 1:  # where there are more, all know
            ((_, other),) = self._by_key.values()
            other.on_company()
        self._by_key[exchange.key] = owner, exchange
        self._of_session.setdefault(ask.step.session_id, before)[exchange.key] = exchange
        self._send(exchange)
        self._plan(exchange)
        return exchange.key

    def drop(self, key: StepKey) -> None:
        """Nobody waits for a step any more."""
        if self._by_key.pop(key, None) is not None:
            own = self._of_session[key[0]]
            del own[key]
            if not own:
                del self._of_session[key[0]]

    def receive(self) -> Iterator[tuple[Owner, StepKey, Outcome]]:
        """What has come: whose step, and its answer or why there is none.

        Raises BrokerUnavailable for a broker of another protocol.
        """
        while (received := self._link.receive_now()) is not None:
            message, body, size = received
            key = key_of(message) or (b"", 0, 0)
            if key in self._by_key:
                outcome = self._hear(key, message, body, size)
                if outcome is not None:
                    owner, _ = self._by_key[key]
                    self.drop(key)
                    yield owner, key, outcome

    def _hear(self, key: StepKey, message: Any, body: bytes, size: int) -> Outcome | None:
        _, exchange = self._by_key[key]
        try:
            answered = exchange.hear(message, body, size, time.monotonic())
        except MidspanError as error:
            return error
        if answered is None:
            self._plan(exchange)
        return answered

    def look_after(self) -> Iterator[tuple[Owner, StepKey, Outcome]]:
        """Send what is due again, and go to the next broker when this one is silent.

        What comes are those that are given up.
        """
        now = time.monotonic()
        if self._link.has_lost_link():
            for _, exchange in self._by_key.values():
                exchange.on_link_lost()
        while self._due and self._due[0][0] <= now:
            _, _, key, exchange = heapq.heappop(self._due)
            if key not in self._by_key:
                continue
            owner, newest = self._by_key[key]
            if newest is not exchange or exchange.due_at > now:
                continue  # it has been answered, or is planned for later
            try:
                is_given_up = exchange.check(now, self._link.broker)
            except BrokerGone:
                self.drop(key)
                why = self._link.why_unavailable(self._timeout_s)
                yield owner, key, BrokerUnavailable(why)
                continue
            except MidspanError as error:
                self.drop(key)
                yield owner, key, error
                continue
            if is_given_up:
                self._use_next_broker(now)
            self._send(exchange)
            self._plan(exchange)

    def _use_next_broker(self, now: float) -> None:
        self._link.use_next()
        for _, exchange in self._by_key.values():
            exchange.on_other_broker(now)
            self._plan(exchange)

    def _plan(self, exchange: Exchange) -> None:
        heapq.heappush(self._due, (exchange.due_at, next(self._order), exchange.key, exchange))

    def _send(self, exchange: Exchange) -> None:
        now = time.monotonic()
        frames = exchange.due(now)
        if frames is None:
            return
        own = self._of_session[exchange.key[0]].values()
        first = next((each for each in own if not each.is_sent), exchange)
        if first is not exchange and not exchange.is_sent:  # a broker wants them in order
            exchange.on_not_handed_over(now, RETRY_SEND_S)
        elif self._link.send(frames, 0.0):
            exchange.on_handed_over(frames, now)
        else:
            exchange.on_not_handed_over(now, RETRY_SEND_S)
