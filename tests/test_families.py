"""The survey of all families of models: what docs/models.md says of them holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from evaluation import families
from evaluation.families import (
    CRASHED,
    DIFFERENT,
    NOT_TINY,
    PAGE,
    REFUSED,
    Finding,
    format_page,
    list_families,
    read_page,
    try_family,
)

# a plain one, one that adds outside its layers, experts, sinks, one with pictures, one refused
FEW = ["llama", "bloom", "mixtral", "gpt_oss", "mistral3", "qwen3_next"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A process that has used several cannot be forked."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outline(finding: Finding) -> tuple[str, bool, str]:
    """What does not depend on the processor: its last bits make equal logits close ones."""
    return finding.family, finding.is_right, "" if finding.is_right else finding.verdict


@pytest.mark.parametrize("family", FEW)
def test_a_family_does_as_the_page_says(family: str) -> None:
    said = next(finding for finding in read_page(PAGE.read_text()) if finding.family == family)
    assert outline(try_family(family)) == outline(said)


def test_the_page_is_what_the_command_writes_of_its_findings() -> None:
    assert format_page(read_page(PAGE.read_text())) == PAGE.read_text()


def test_the_page_has_every_family_that_the_library_has() -> None:
    assert [finding.family for finding in read_page(PAGE.read_text())] == list_families()


def test_no_family_crashes_or_comes_out_differently_by_the_page() -> None:
    findings = read_page(PAGE.read_text())
    assert not [f for f in findings if f.verdict in (CRASHED, DIFFERENT)]
    assert sum(f.is_right for f in findings) >= 80


def test_a_family_that_ends_its_process_is_counted_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end(_: str) -> Any:
        os._exit(7)

    monkeypatch.setattr(families, "examine", end)
    assert try_family("llama") == Finding("llama", CRASHED, "its process ended with 7")


def test_a_family_without_an_example_that_can_be_made_is_said_not_to_be_tried() -> None:
    finding = try_family("bart")
    assert (finding.verdict, finding.is_right) == (NOT_TINY, False)
    assert "encoder" in finding.words


def test_a_refusal_is_told_in_the_words_of_the_guard() -> None:
    finding = try_family("hy_v4")
    assert finding.verdict == REFUSED
    assert "hy_v4 models with indexed_attention layers cannot be cut" in finding.words


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_page_holds_for_every_family() -> None:
    said = read_page(PAGE.read_text())
    found = [try_family(family) for family in list_families()]
    assert not [f for f in found if f.verdict in (CRASHED, DIFFERENT)]
    assert [outline(f) for f in found] == [outline(f) for f in said]
