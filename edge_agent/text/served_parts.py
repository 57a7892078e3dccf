"""Which parts of a model an edge asks for: such as the pool serves, or several in a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from common.errors import SettingsError
from common.spans.cut import Span, check_middle, find_route, find_routes, read_span


def pick_part(
    report: Mapping[str, Any], fingerprint: str, num_layers: int, missing: Span | None = None
) -> str | None:
    """The layers that most workers serve, of those the most layers; None if none are served.

    Spans that follow on each other count as one. `report` is a broker's, which passes on what
    workers call their parts: what is no span of the model is passed over, and what does not hold
    all of `missing`, what is not here. Those with the LM head are for edges that lack that.
    """
    served = _count_spans(report, fingerprint, num_layers)
    stretches = {
        Span(first, *stop): sum(served[span] for span in route)
        for first in {span.first for span in served}
        for stop, route in find_routes(served, first).items()
        if route and _fits(Span(first, *stop), missing)
    }
    if not stretches:
        return None
    return str(max(stretches, key=lambda span: (stretches[span], len(span), -span.first)))


def _fits(span: Span, missing: Span | None) -> bool:
    if missing is None:
        return not span.with_end
    holds = span.first <= missing.first and missing.last <= span.last
    return holds and span.with_end == missing.with_end


def pick_route(report: Mapping[str, Any], fingerprint: str, middle: Span) -> list[Span]:
    """The fewest spans that are served and make up `middle`; none if they do not."""
    return find_route(_count_spans(report, fingerprint, middle.last), middle)


def _count_spans(report: Mapping[str, Any], fingerprint: str, num_layers: int) -> Counter[Span]:
    """How many workers serve each."""
    return Counter(
        span
        for worker in report["workers"]
        if worker["state"] == "ready"
        for service in worker["services"]
        if service["model"] == fingerprint
        and (span := _read_span(service["part"], num_layers)) is not None
    )


def _read_span(part: str, num_layers: int) -> Span | None:
    try:
        span = read_span(part)
        check_middle(span, num_layers, what=part)
    except SettingsError:
        return None
    return span
