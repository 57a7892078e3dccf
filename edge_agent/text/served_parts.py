"""Which part of a model an edge asks for when nobody said: one that the pool serves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from common.errors import SettingsError
from common.spans.cut import Span, parse_span


def pick_part(report: Mapping[str, Any], fingerprint: str, num_layers: int) -> str | None:
    """The part that most workers serve, of those the widest; None if none is served.

    `report` is a broker's, which passes on what workers call their parts: what is no span of the
    model is passed over.
    """
    served = Counter(
        span
        for worker in report["workers"]
        if worker["state"] == "ready"
        for service in worker["services"]
        if service["model"] == fingerprint
        and (span := _read_span(service["part"], num_layers)) is not None
    )
    if not served:
        return None
    best = max(served, key=lambda span: (served[span], len(span), -span.first))
    return str(best)


def _read_span(part: str, num_layers: int) -> Span | None:
    try:
        return parse_span(part, num_layers)
    except SettingsError:
        return None
