"""What Prometheus is told of an endpoint; nothing in it comes from a prompt or a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from edge_agent.engine.streams import Token
    from edge_agent.text.stats import GenerationStats

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
KINDS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/images/generations": "images",
}


class Metrics:
    """In a registry of its own: a process may have several endpoints."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self._requests = Counter(
            "midspan_requests", "By kind and HTTP status.", ["kind", "status"], registry=own
        )
        self.tokens = Counter("midspan_tokens", "Prompt or completion.", ["kind"], registry=own)
        self.bytes = Counter(
            "midspan_boundary_bytes", "Between edge and pool.", ["direction"], registry=own
        )
        self.images = Counter("midspan_images", "Made.", registry=own)
        self.first_token = Histogram(
            "midspan_first_token_seconds", "From the request.", registry=own, buckets=SECONDS
        )
        self.token = Histogram(
            "midspan_token_seconds", "From one to the next.", registry=own, buckets=SECONDS
        )

    def watch(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A gauge that is read when Prometheus asks."""
        Gauge(name, what, registry=self.registry).set_function(read)

    def count_request(self, path: str, status: int) -> None:
        self._requests.labels(KINDS.get(path, "other"), str(status)).inc()

    def meter(self, prompt_tokens: int) -> Meter:
        return Meter(self, prompt_tokens)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class Meter:
    """Counts one answer while it is made."""

    def __init__(self, metrics: Metrics, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._bytes_up = self._bytes_down = 0
        self._last_at_s: float | None = None
        metrics.tokens.labels("prompt").inc(prompt_tokens)
        self._completion = metrics.tokens.labels("completion")
        self._up, self._down = metrics.bytes.labels("up"), metrics.bytes.labels("down")

    def note(self, token: Token) -> None:
        if self._last_at_s is None:
            self._metrics.first_token.observe(token.at_s)
        else:
            self._metrics.token.observe(token.at_s - self._last_at_s)
        self._last_at_s = token.at_s
        self._completion.inc()
        self._count_bytes(token.bytes_up, token.bytes_down)

    def end(self, stats: GenerationStats) -> None:
        """With all that it has cost: a prompt that is only scored has no token that says it."""
        self._count_bytes(stats.bytes_up, stats.bytes_down)

    def _count_bytes(self, up: int, down: int) -> None:
        self._up.inc(max(0, up - self._bytes_up))
        self._down.inc(max(0, down - self._bytes_down))
        self._bytes_up, self._bytes_down = up, down
