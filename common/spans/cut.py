"""Spans and cuts: which layers of a model run where.

A span `a-b` is the half-open range of decoder layers a..b. The cut around it makes three of a model
with n layers: head 0-a and tail b-n on the edge, middle a-b on the workers. With `a-ne` the workers
have what follows the last layer, too: the edge has no tail, and gets logits.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.errors import SettingsError


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Layers `first` to `last`, without `last`; `with_end` also the final norm and the LM head."""

    first: int
    last: int
    with_end: bool = False

    def __str__(self) -> str:
        return f"{self.first}-{self.last}{'e' * self.with_end}"

    @property
    def stop(self) -> tuple[int, bool]:
        """Where it leads to: the next layer, and whether that is behind everything."""
        return self.last, self.with_end

    def __len__(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Cut:
    """The two layer indices where a model is cut."""

    begin: int
    end: int
    has_tail: bool = True  # on the edge

    def __str__(self) -> str:
        return f"{self.begin}:{self.end if self.has_tail else ''}"

    @property
    def middle(self) -> Span:
        return Span(self.begin, self.end, with_end=not self.has_tail)

    def head(self) -> Span:
        return Span(0, self.begin)

    def tail(self, num_layers: int) -> Span:
        return Span(self.end, num_layers)


def are_joined(spans: Sequence[Span]) -> bool:
    """Whether each span begins where the one before ends."""
    return all(a.stop == (b.first, False) for a, b in itertools.pairwise(spans))


def find_route(spans: Iterable[Span], middle: Span) -> list[Span]:
    """The fewest of the spans that make up `middle` one after another; none if they do not."""
    return find_routes(spans, middle.first).get(middle.stop, [])


def find_routes(spans: Iterable[Span], first: int) -> dict[tuple[int, bool], list[Span]]:
    """For each `stop` that spans one after another lead to from `first` on: the fewest of them."""
    routes: dict[tuple[int, bool], list[Span]] = {(first, False): []}
    for span in sorted(set(spans)):  # so that no shorter way to its beginning comes later
        so_far = routes.get((span.first, False))
        if span.first < span.last and so_far is not None:
            known = routes.get(span.stop)
            if known is None or len(so_far) + 1 < len(known):
                routes[span.stop] = [*so_far, span]
    return routes


def default_cut(num_layers: int) -> Cut:
    """A quarter of the layers on each side stays on the edge (2:6 for 8 layers)."""
    side = num_layers // 4
    return Cut(side, num_layers - side)


def parse_cut(text: str | None, num_layers: int) -> Cut:
    """The cut around a span, as `parse_span` reads it. Raises SettingsError."""
    span = parse_span(text, num_layers)
    return Cut(span.first, span.last, has_tail=not span.with_end)


def parse_span(text: str | None, num_layers: int) -> Span:
    """As `read_span`, with 0 <= a < b <= num_layers; None gives the default middle.

    In `a:b` numbers below 0 count from the end, as in Python: 2:-2 leaves two layers on each side.
    `a:` is all from layer a on, with what follows the last.
    """
    if text is None:
        return default_cut(num_layers).middle
    match = re.fullmatch(r"\s*(-?\d{1,9})\s*:\s*(-?\d{1,9})?\s*", text)
    if match is None:
        span = read_span(text)
    else:
        first, last = (
            number + num_layers if number < 0 else number
            for number in (int(match[1]), int(match[2] or num_layers))
        )
        span = Span(first, last, with_end=match[2] is None)
    said = str(span) if match is None or "-" not in text else f"{text.strip()} ({span})"
    check_middle(span, num_layers, what=f"span {said}")
    return span


def read_span(text: str) -> Span:
    """Read `a-b`, `a:b` or `a-ne`, for a model of any depth. Raises SettingsError."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*[-:]\s*(\d{1,9})(e?)\s*", text)
    if match is None:
        raise SettingsError(
            f"span {text!r} is not of the form a-b, for example 2-6, or a:b, where -2 is the last "
            "but one, or a: for all from layer a on and the LM head"
        )
    return Span(int(match[1]), int(match[2]), with_end=bool(match[3]))


def check_middle(span: Span, num_layers: int, what: str) -> None:
    """Raise SettingsError unless `span` holds at least one of the model's layers and no others."""
    if not 0 <= span.first < span.last <= num_layers:
        raise SettingsError(
            f"{what} is out of range: the model has {num_layers} layers, "
            f"so it must hold 0 <= a < b <= {num_layers}"
        )
    if span.with_end and span.last != num_layers:
        raise SettingsError(
            f"{what} ends at layer {span.last} of {num_layers}; what follows the last layer (e) "
            "goes with that one only"
        )
