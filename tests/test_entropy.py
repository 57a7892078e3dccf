"""The coder of `smallest`: every number comes back, in about the bits that its chance is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs.entropy import (
    FORMAT,
    LARGEST,
    NARROWEST,
    SymbolCoder,
    exponential,
    find_kinds,
    integrate_gaussian,
    list_widths,
)
from common.errors import NonFiniteError, ProtocolError

DEVIATIONS = torch.tensor([0.001, 0.3, 7.0, 0.3, 900.0, 1.0, 1e6, 2.5])


def draw(rows: int, deviations: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, len(deviations), generator=generator) * deviations
    return drawn.round().clamp(-LARGEST, LARGEST) + 0.0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(DEVIATIONS.tolist()), min_size=1, max_size=9),
    st.integers(1, 5),
    st.sampled_from([0.5, 1.0, 40.0, 1e5]),
)
def test_all_numbers_come_back_also_those_that_nobody_expected(
    deviations: list[float], rows: int, stretch: float
) -> None:
    coder = SymbolCoder(torch.tensor(deviations))
    symbols = draw(rows, torch.tensor(deviations) * stretch)
    assert torch.equal(coder.decode(memoryview(coder.encode(symbols)), rows), symbols)


def test_a_body_has_the_bits_that_its_numbers_are_worth() -> None:
    deviations = torch.tensor([0.2, 0.5, 1.0, 2.5, 7.0, 40.0]).repeat(4)
    symbols = draw(500, deviations)
    bits = 0.0
    for column, width in zip(symbols.T.tolist(), deviations.tolist(), strict=True):
        for x in column:
            low, high = ((x + half) / width / math.sqrt(2) for half in (-0.5, 0.5))
            bits -= math.log2((math.erf(high) - math.erf(low)) / 2)
    body = SymbolCoder(deviations).encode(symbols)
    assert bits * 0.999 < 8 * len(body) < bits * 1.004 + 64  # kinds of widths, and the last words


@pytest.mark.parametrize("width", [NARROWEST, 0.3, 1.0, 7.3, 300.0])
def test_a_table_is_the_gaussian_integrated_over_whole_numbers(width: float) -> None:
    table = integrate_gaussian(width, 60)
    for x, mass in zip(range(-60, 61), table, strict=True):
        low, high = ((x + half) / width / math.sqrt(2) for half in (-0.5, 0.5))
        assert mass == pytest.approx((math.erf(high) - math.erf(low)) / 2, abs=1e-5)


def test_a_table_is_to_the_last_bit_what_plain_sums_and_products_make() -> None:
    """Other processors have other vector instructions, and must make the same tables."""
    width, reach = 0.3, 5
    parts = 2 * math.ceil(1.5 / width) + 2
    for x in range(reach + 1):
        total = 0.0
        for part in range(parts + 1):
            point = (x + (part / parts - 0.5)) / width
            ends = 1.0 if part in (0, parts) else 4.0 if part % 2 else 2.0
            y, power = max(-0.5 * point * point, -200.0) / 1024, 1.0
            for factor in range(9, 0, -1):
                power = 1 + power * y / factor
            for _ in range(10):
                power = power * power
            total = ends * power if part == 0 else total + ends * power
        mass = total / (3 * parts * width * math.sqrt(2 * math.pi))
        assert integrate_gaussian(width, reach)[reach + x] == mass


def test_the_exponential_is_the_exponential() -> None:
    x = np.linspace(-40, 0, 500)
    assert exponential(x) == pytest.approx(np.exp(x), rel=1e-9)


def test_each_deviation_goes_to_the_width_that_is_nearest_by_ratio() -> None:
    widths = list_widths()
    for deviation in (0.001, NARROWEST, 0.0521, 0.0523, 0.9, 17.0, 1e9):
        nearest = min(range(len(widths)), key=lambda k: abs(math.log(widths[k] / deviation)))
        assert find_kinds(np.array([deviation]))[0] == nearest


def test_numbers_that_are_too_large_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="more than 32767 quantization steps away"):
        SymbolCoder(DEVIATIONS).encode(torch.full((1, 8), 32768.0))


@pytest.mark.parametrize("harm", ["cut", "longer", "earlier format", "empty", "other format"])
def test_other_bytes_are_refused(harm: str) -> None:
    body = SymbolCoder(DEVIATIONS).encode(draw(3, DEVIATIONS))
    words = body[len(FORMAT) :]
    harmed = {
        "cut": body[:-1], "longer": body + b"\x01\x02\x03\x04" * 3, "earlier format": words,
        "empty": b"", "other format": b"\x02" + words,
    }[harm]  # fmt: skip
    with pytest.raises(ProtocolError, match=r"none of format 1|cannot be decoded"):
        SymbolCoder(DEVIATIONS).decode(memoryview(harmed), 3)
