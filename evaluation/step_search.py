"""Find the step with which `smallest` costs what it promises, on text that nothing was fitted to.

A codec's budget says what its step would cost if the loss were quadratic; what it costs is another
matter for each model. Two things are measured, with rows through the codec at both cuts:

- the divergence of the coded model's distributions from the exact ones (Kullback-Leibler), which
  takes few tokens to be known well, but is the rise of the loss only if the model believes rightly;
- the rise of the loss itself, which takes many.

So the divergence says how both change with the step, and the sum of the rises over the sum of the
divergences, near the step that is sought, how much of it is loss.

Letters: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.codecs.calibration import Calibration
from common.codecs.codec import Codec, make_codec
from common.codecs.spec import PROMISED_LOSS, SMALLEST
from edge_agent.text.perplexity import Window, sliding_windows

PROMISED_NATS = math.log1p(PROMISED_LOSS)
BUDGETS = tuple(0.000625 * 2**k for k in range(10))  # nats a token; up to 0.32
LONGEST_WINDOW = 1024
FEWEST_TOKENS = 1000  # below this nothing is searched
FIRST_WINDOWS = 4
ROUNDS = 2
LEAST_SHARE = 0.4  # of the divergence that is loss; less is noise
Tick = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Rise:
    """What one budget costs, in nats per token."""

    budget: float
    divergence: float
    loss: float


class CodedModel:
    """A whole model whose rows cross a cut as `smallest` would have them, or as they are."""

    def __init__(self, model: Any, layers: Any, calibration: Calibration) -> None:
        begin, end = calibration.span
        self._model = model
        self._begin, self._end = layers[begin], layers[end - 1]
        self._calibration = calibration

    def read(self, ids: Sequence[int], scored: int, budget: float | None = None) -> Tensor:
        """Log-probabilities of what comes before each of the last `scored` tokens: (…, V)."""
        with self._coded(budget) if budget is not None else contextlib.nullcontext():
            logits: Tensor = self._model(torch.tensor([ids]), use_cache=False).logits[0]
        return logits[-scored - 1 : -1].float().log_softmax(dim=1)

    @contextlib.contextmanager
    def _coded(self, budget: float) -> Iterator[None]:
        known = replace(self._calibration, smallest_budget=budget)
        up, down = make_codec(SMALLEST, "up", known), make_codec(SMALLEST, "down", known)
        arrived: list[Tensor] = []

        def enter(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            arrived[:] = [_cross(up, arguments[0][0])]
            return (arrived[0][None], *arguments[1:])

        def leave(_: Any, __: Any, output: Any) -> Any:
            is_tuple = isinstance(output, tuple)
            rows = _cross(down, (output[0] if is_tuple else output)[0], arrived[0])[None]
            return (rows, *output[1:]) if is_tuple else rows

        hooks = [
            self._begin.register_forward_pre_hook(enter),
            self._end.register_forward_hook(leave),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _cross(codec: Codec, rows: Tensor, uplink: Tensor | None = None) -> Tensor:
    return codec.approximate(rows, uplink if codec.needs_uplink else None)


def choose_windows(tokens: int, context: int | None) -> list[Window]:
    """Half of each is context, as `midspan eval codec` has it.

    The first, which would begin in the middle of a text and have none, is left out.
    """
    length = min(context or LONGEST_WINDOW, LONGEST_WINDOW, tokens // 2)
    return list(sliding_windows(tokens, length, max(1, length // 2)))[1:]


@torch.inference_mode()
def measure_rises(
    model: CodedModel,
    ids: Sequence[int],
    windows: Sequence[Window],
    budgets: Sequence[float],
    tick: Tick = lambda _: None,
) -> list[Rise]:
    """Each budget over all windows."""
    sums = [[0.0, 0.0] for _ in budgets]
    for window in windows:
        part = list(ids[window.begin : window.end])
        targets = torch.tensor(part[-window.scored :])[:, None]
        exact = model.read(part, window.scored)
        for both, budget in zip(sums, budgets, strict=True):
            gap = exact - model.read(part, window.scored, budget)  # log p / q
            both[0] += float((exact.exp() * gap).sum(dtype=torch.float64))
            both[1] += float(gap.gather(1, targets).sum(dtype=torch.float64))
        tick(1)
    count = sum(window.scored for window in windows)
    return [Rise(b, s[0] / count, s[1] / count) for b, s in zip(budgets, sums, strict=True)]


def find_budget(
    model: CodedModel, ids: Sequence[int], context: int | None, tick: Tick = lambda _: None
) -> float:
    """The budget that costs PROMISED_LOSS on these tokens, exact in float32."""
    windows = choose_windows(len(ids), context)
    spread = windows[:: max(1, len(windows) // FIRST_WINDOWS)][:FIRST_WINDOWS]
    found = interpolate(measure_rises(model, ids, spread, BUDGETS), PROMISED_NATS)
    for _ in range(ROUNDS):
        rises = measure_rises(model, ids, windows, [found / 1.4, 1.4 * found], tick)
        found = interpolate(rises, PROMISED_NATS / share_of_loss(rises))
        if rises[0].budget <= found <= rises[1].budget:
            break
    return float(torch.tensor(found).item())  # as a file of float32 will say it


def share_of_loss(rises: Sequence[Rise]) -> float:
    """How much of the divergence is loss, within LEAST_SHARE and its inverse."""
    share = sum(r.loss for r in rises) / sum(r.divergence for r in rises)
    return min(max(share, LEAST_SHARE), 1 / LEAST_SHARE)


def interpolate(rises: Sequence[Rise], divergence: float) -> float:
    """The budget of that divergence, on straight lines between logarithms; within BUDGETS."""
    points: list[tuple[float, float]]
    points = [(math.log(r.budget), math.log(max(r.divergence, 1e-12))) for r in rises]
    pairs = list(itertools.pairwise(points))
    wanted = math.log(divergence)
    left, right = next((pair for pair in pairs if pair[1][1] >= wanted), pairs[-1])
    slope = (right[1] - left[1]) / (right[0] - left[0])
    budget = math.exp(left[0] + (wanted - left[1]) / slope) if slope > 0 else math.exp(left[0])
    return float(min(max(budget, BUDGETS[0]), BUDGETS[-1]))
