"""Spans and cuts: which layers of a model run where.

A span `a-b` is the half-open range of decoder layers a..b. The cut around it makes three of a model
with n layers: head 0-a and tail b-n on the edge, middle a-b on the workers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from common.errors import SettingsError


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Layers `first` to `last`, without `last`."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    def __len__(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Cut:
    """The two layer indices where a model is cut."""

    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.begin}:{self.end}"

    @property
    def middle(self) -> Span:
        return Span(self.begin, self.end)

    def head(self) -> Span:
        return Span(0, self.begin)

    def tail(self, num_layers: int) -> Span:
        return Span(self.end, num_layers)


def find_route(spans: Iterable[Span], middle: Span) -> list[Span]:
    """The fewest of the spans that make up `middle` one after another; none if they do not."""
    return find_routes(spans, middle.first).get(middle.last, [])


def find_routes(spans: Iterable[Span], first: int) -> dict[int, list[Span]]:
    """For each layer that spans one after another lead to from `first` on: the fewest of them."""
    routes: dict[int, list[Span]] = {first: []}
    for span in sorted(set(spans)):  # so that no shorter way to its beginning comes later
        if span.first < span.last and (so_far := routes.get(span.first)) is not None:
            known = routes.get(span.last)
            if known is None or len(so_far) + 1 < len(known):
                routes[span.last] = [*so_far, span]
    return routes


def default_cut(num_layers: int) -> Cut:
    """A quarter of the layers on each side stays on the edge (2:6 for 8 layers)."""
    side = num_layers // 4
    return Cut(side, num_layers - side)


def parse_cut(text: str | None, num_layers: int) -> Cut:
    """The cut around a span, as `parse_span` reads it. Raises SettingsError."""
    span = parse_span(text, num_layers)
    return Cut(span.first, span.last)


def parse_span(text: str | None, num_layers: int) -> Span:
    """As `read_span`, with 0 <= a < b <= num_layers; None gives the default middle.

    In `a:b` numbers below 0 count from the end, as in Python: 2:-2 leaves two layers on each side.
    """
    if text is None:
        return default_cut(num_layers).middle
    match = re.fullmatch(r"\s*(-?\d{1,9})\s*:\s*(-?\d{1,9})\s*", text)
    if match is None:
        span = read_span(text)
    else:
        first, last = (
            number + num_layers if number < 0 else number for number in map(int, match.groups())
        )
        span = Span(first, last)
    said = str(span) if match is None or "-" not in text else f"{text.strip()} ({span})"
    check_middle(span, num_layers, what=f"span {said}")
    return span


def read_span(text: str) -> Span:
    """Read `a-b`, or `a:b`, for a model of any depth. Raises SettingsError."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*[-:]\s*(\d{1,9})\s*", text)
    if match is None:
        raise SettingsError(
            f"span {text!r} is not of the form a-b, for example 2-6, or a:b, where -2 is the last "
            "but one"
        )
    return Span(int(match[1]), int(match[2]))


def check_middle(span: Span, num_layers: int, what: str) -> None:
    """Raise SettingsError unless `span` holds at least one of the model's layers and no others."""
    if not 0 <= span.first < span.last <= num_layers:
        raise SettingsError(
            f"{what} is out of range: the model has {num_layers} layers, "
            f"so it must hold 0 <= a < b <= {num_layers}"
        )
