"""Which codec a session uses where its settings say `auto`: what the link is worth.

Of those that may be used the one that costs the model least is taken, unless another one is sooner
by more than a tenth: a step of one row for tokens, a prompt of PROMPT_ROWS for prompts. What a step
takes is the link's round trip, its bytes, and the time that this machine needs to encode and decode
it on both sides. Bytes and coding times are measured on rows drawn as the calibration knows them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

import torch
from torch import Tensor

from common.codecs.calibration import Calibration, DirectionCalibration
from common.codecs.codec import Codec, make_codec
from common.codecs.spec import AUTO, DEFAULT_CODEC, SMALLEST
from common.errors import SettingsError
from common.link import Link
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session_settings import SessionSettings

CANDIDATES = (DEFAULT_CODEC, "compact", SMALLEST)  # in the order of what they cost the model
TOLERANCE = 0.1  # of a step's time, for which nothing coarser is taken
PROMPT_ROWS = 512
SAMPLE_ROWS = 32
CODED_TIMES = 3
HEADER_BYTES = 120  # of a step and its answer, about


@dataclass(frozen=True, slots=True)
class Cost:
    """What the rows of a step take in a codec, up and down together."""

    row_bytes: float
    coding_ms: float  # to encode and decode them on both sides


class CodecChooser:
    """For sessions of one model; the same link gives each of them the same codecs.

    Raises SettingsError for sessions that are to be exact, as links never are the same twice.
    """

    def __init__(self, settings: SessionSettings, calibration: Calibration | None) -> None:
        if settings.exact and settings.is_open:
            raise SettingsError(
                "codec auto depends on how the link is just then, and the session is to be exact; "
                "name a codec"
            )
        self._settings = settings
        self._calibration = calibration
        self._costs: dict[tuple[str, int, bool], tuple[Cost, Cost]] = {}

    def choose(self, ends: ModelEnds, link: Link | None) -> SessionSettings:
        """Settings that name a codec everywhere. Of an unknown link the default one."""
        settings = self._settings
        if not settings.is_open:
            return settings
        codecs = self._list_usable(ends)
        prompt = decode = codecs[0]
        if link is not None:
            of_decode, of_prompt = zip(*(self._measure(c, ends) for c in codecs), strict=True)
            decode, prompt = (codecs[pick(costs, link)] for costs in (of_decode, of_prompt))
        return replace(
            settings,
            prompt_up=_settle(settings.prompt_up, prompt),
            prompt_down=_settle(settings.prompt_down, prompt),
            decode_up=_settle(settings.decode_up, decode),
            decode_down=_settle(settings.decode_down, decode),
            chosen_for=link,
        )

    def _list_usable(self, ends: ModelEnds) -> list[str]:
        """Without a calibration, or over several parts of the model, the default codec alone."""
        route = self._settings.route or ends.route
        if self._calibration is None or len(route) > 1:
            return [DEFAULT_CODEC]
        return list(CANDIDATES)

    def _measure(self, name: str, ends: ModelEnds) -> tuple[Cost, Cost]:
        key = (name, ends.hidden, ends.cut.has_tail)
        if key not in self._costs:
            self._costs[key] = measure_costs(
                name, ends.hidden, ends.cut.has_tail, self._calibration
            )
        return self._costs[key]


def pick(costs: Sequence[Cost], link: Link) -> int:
    """Which of several codecs, the finest first: the first that is not much slower than any."""
    steps_ms: list[float] = []
    coding_ms = 0.0
    for cost in costs:  # if a coarser codec takes less to code, that is the noise of a busy machine
        coding_ms = max(coding_ms, cost.coding_ms)
        steps_ms.append(link.take_ms(HEADER_BYTES + cost.row_bytes) + coding_ms)
    return next(i for i, ms in enumerate(steps_ms) if ms <= (1 + TOLERANCE) * min(steps_ms))


def measure_costs(
    name: str, hidden: int, comes_back: bool, known: Calibration | None
) -> tuple[Cost, Cost]:
    """Of one row, and of a prompt of PROMPT_ROWS; rows that do not come back only go up."""
    up = _draw_up(hidden, known)
    ways: list[tuple[Codec, Tensor, Tensor | None]] = [(make_codec(name, "up", known), up, None)]
    if comes_back:
        ways.append((make_codec(name, "down", known), _draw_down(up, known), up))
    alone = [_code_each(*way) for way in ways]
    together = [_code(*way) for way in ways]
    scale = PROMPT_ROWS / SAMPLE_ROWS
    return (
        Cost(sum(size for size, _ in alone), sum(s for _, s in alone) * 1e3),
        Cost(sum(size for size, _ in together) * scale, sum(s for _, s in together) * scale * 1e3),
    )


def _code_each(codec: Codec, rows: Tensor, uplink: Tensor | None) -> tuple[float, float]:
    """Bytes of a row that goes alone, and seconds to encode and decode it."""
    uplinks = [None] * len(rows) if uplink is None else torch.split(uplink, 1)
    pairs = zip(torch.split(rows, 1), uplinks, strict=True)
    sizes, times = zip(*(_code(codec, row, before, times=1) for row, before in pairs), strict=True)
    return mean(sizes), median(times)  # whatever else the machine had to do meanwhile


def _code(
    codec: Codec, rows: Tensor, uplink: Tensor | None, times: int = CODED_TIMES
) -> tuple[int, float]:
    """Bytes of the rows, and seconds to encode and decode them: the least of several times."""
    needed, best_s = uplink if codec.needs_uplink else None, math.inf
    for _ in range(times):
        begun_at = time.perf_counter()
        body = codec.encode(rows, needed)
        codec.decode(body, len(rows), rows.shape[1], uplink=needed)
        best_s = min(best_s, time.perf_counter() - begun_at)
    return len(body), best_s


def _draw_up(hidden: int, known: Calibration | None) -> Tensor:
    noise = torch.randn(SAMPLE_ROWS, hidden, generator=torch.Generator().manual_seed(1))
    return noise if known is None else _like(noise, known.up)


def _draw_down(up: Tensor, known: Calibration | None) -> Tensor:
    noise = torch.randn(up.shape, generator=torch.Generator().manual_seed(2))
    return noise if known is None else known.predictor.predict(up) + _like(noise, known.residual)


def _like(noise: Tensor, known: DirectionCalibration) -> Tensor:
    """Rows of the mean and covariance that were measured."""
    return known.mean + (noise * known.deviation) @ known.fisher_inverse


def _settle(asked: str, chosen: str) -> str:
    return chosen if asked == AUTO else asked
