"""Spans and cuts as users type them."""

import pytest

from common.errors import SettingsError
from common.spans.cut import Cut, Span, default_cut, parse_cut, parse_span


def test_a_cut_makes_head_middle_and_tail() -> None:
    cut = parse_cut("2-6", num_layers=8)
    assert cut == parse_cut("2:6", num_layers=8)
    assert (cut.head(), cut.middle, cut.tail(8)) == (Span(0, 2), Span(2, 6), Span(6, 8))


def test_the_default_cut_keeps_a_quarter_on_each_side() -> None:
    assert [default_cut(n) for n in (8, 32, 2)] == [Cut(2, 6), Cut(8, 24), Cut(0, 2)]


def test_an_edge_and_a_worker_agree_on_the_default() -> None:
    assert parse_cut(None, 12).middle == parse_span(None, 12)


@pytest.mark.parametrize(
    ("text", "cut"),
    [("2:-2", Cut(2, 6)), ("-6:-2", Cut(2, 6)), ("-8:8", Cut(0, 8)), ("0:-1", Cut(0, 7))],
)
def test_numbers_below_zero_count_from_the_end(text: str, cut: Cut) -> None:
    assert parse_cut(text, num_layers=8) == cut


@pytest.mark.parametrize("text", ["-2:2", "-9:4", "4:-4"])
def test_numbers_from_the_end_that_are_out_of_range_are_shown_as_both(text: str) -> None:
    with pytest.raises(SettingsError, match=rf"span {text} \(-?\d+--?\d+\) is out of range"):
        parse_cut(text, num_layers=8)


@pytest.mark.parametrize("text", ["6-2", "2-2", "0-9", "8-9"])
def test_a_span_out_of_range_names_itself_and_the_layers(text: str) -> None:
    with pytest.raises(
        SettingsError, match=rf"span {text} is out of range: the model has 8 layers"
    ):
        parse_cut(text, num_layers=8)


@pytest.mark.parametrize("text", ["", "2", "a-b", "2/6", "-1-4", "2-6-8"])
def test_a_span_that_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="not of the form a-b"):
        parse_cut(text, num_layers=8)
