"""The step of `smallest`: what is measured, what is found by it, and where it is kept."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from common.codecs.calibration import Calibration, load_calibration, save_calibration
from common.codecs.codec import make_codec
from edge_agent.text.perplexity import Window
from edge_agent.text.tokenizer import TextTokenizer
from evaluation.leakage.split_model import SplitModel, cross
from evaluation.step_search import (
    BUDGETS,
    PROMISED_NATS,
    CodedModel,
    Rise,
    choose_windows,
    find_budget,
    interpolate,
    measure_rises,
    share_of_loss,
)
from evaluation.texts import read_tokens

CODEC = "fisher0.05+predict"


@pytest.fixture(scope="module")
def calibration(demo_directory: Path) -> Calibration:
    return load_calibration(demo_directory / "calibration" / "2-6")


@pytest.fixture(scope="module")
def ids(demo_directory: Path) -> list[int]:
    text = demo_directory / "validation.txt"
    return read_tokens(text, TextTokenizer(demo_directory), True, 1800)


@pytest.fixture(scope="module")
def coded(whole_model: torch.nn.Module, calibration: Calibration) -> CodedModel:
    return CodedModel(whole_model, whole_model.model.layers, calibration)  # type: ignore[union-attr]


def test_what_a_budget_costs_is_measured_as_through_encoder_and_decoder(
    coded: CodedModel, ids: list[int], demo_directory: Path
) -> None:
    split, part = SplitModel(demo_directory), ids[:80]
    codecs = split.make_codecs(CODEC)
    up = split.send(part, codecs)
    down = cross(codecs.down, split.run_middle(up, split.new_kv()), up)
    q = split.read_downlink(down).softmax(dim=1).double()
    p = split.score(split.send(part, split.make_codecs("fp32"))).softmax(dim=1).double()
    places = range(39, 79)  # before each of the last 40
    divergence = sum(float((p[i] * (p[i] / q[i]).log()).sum()) for i in places) / 40
    loss = sum(math.log(float(p[i, part[i + 1]] / q[i, part[i + 1]])) for i in places) / 40
    (rise,) = measure_rises(coded, part, [Window(0, 80, 40)], [0.05])
    assert rise.divergence == pytest.approx(divergence, rel=1e-2)  # a rounding edge or two
    assert rise.loss == pytest.approx(loss, rel=1e-2)


def test_the_budget_that_is_found_costs_what_is_promised(coded: CodedModel, ids: list[int]) -> None:
    found = find_budget(coded, ids, context=256)
    assert found == torch.tensor(found, dtype=torch.float32).item()
    (rise,) = measure_rises(coded, ids, choose_windows(len(ids), 256), [found])
    # the loss of so few tokens is noise, of which the search believes a part, and not smooth
    low, high = sorted((PROMISED_NATS, PROMISED_NATS / share_of_loss([rise])))
    assert low / 1.7 < rise.divergence < high * 1.7


@pytest.mark.parametrize(("wanted", "budget"), [(2e-3, 0.02), (3e-4, 0.003), (1.2e-2, 0.12)])
def test_between_two_budgets_the_loss_is_a_power(wanted: float, budget: float) -> None:
    rises = [Rise(b, b / 10, 0.0) for b in (0.01, 0.05)]
    assert interpolate(rises, wanted) == pytest.approx(budget)


def test_a_budget_is_never_beyond_those_that_are_tried() -> None:
    flat = [Rise(b, 1e-9, 0.0) for b in BUDGETS]
    assert BUDGETS[0] <= interpolate(flat, PROMISED_NATS) <= BUDGETS[-1]
    assert interpolate([Rise(0.01, 1e-9, 0), Rise(0.02, 2e-9, 0)], 1.0) == BUDGETS[-1]
    assert share_of_loss([Rise(0.01, 1.0, -3.0)]) == 0.4


def test_the_windows_of_a_search_have_context() -> None:
    assert choose_windows(1000, 100)[0] == Window(50, 150, 50)
    assert sum(window.scored for window in choose_windows(1000, 100)) == 900


def test_a_searched_budget_is_kept_and_only_smallest_goes_by_it(
    calibration: Calibration, tmp_path: Path
) -> None:
    budget = torch.tensor(0.03, dtype=torch.float32).item()
    save_calibration(dataclasses.replace(calibration, smallest_budget=budget), tmp_path)
    kept = load_calibration(tmp_path)
    assert kept.smallest_budget == budget
    rows = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)) * kept.up.scale

    def send(codec: str, of: Calibration) -> bytes:
        return make_codec(codec, "up", of).encode(rows)

    before = dataclasses.replace(kept, smallest_budget=None)  # as an earlier version saved it
    assert send("smallest", kept) == send(f"fisher{budget:.9f}", kept)
    assert send("smallest", before) == send("fisher0.01", kept) == send("fisher0.01", before)


def test_a_calibration_without_a_searched_budget_is_read(
    calibration: Calibration, tmp_path: Path
) -> None:
    save_calibration(dataclasses.replace(calibration, smallest_budget=None), tmp_path)
    assert load_calibration(tmp_path).smallest_budget is None
