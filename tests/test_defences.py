"""Defences do what they say, and the attacks that know of them are not taken in by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edge_agent.text.tokenizer import TextTokenizer
from evaluation.leakage.adaptive import (
    PriorSearch,
    align,
    sort_by_known_rows,
    sort_by_statistics,
)
from evaluation.leakage.defences import (
    Defence,
    cheap_noise,
    coarse,
    draw_order,
    draw_rotation,
    erased,
    even_noise,
    find_telling_directions,
    sparse,
)
from evaluation.leakage.exact_search import ExactSearch
from evaluation.leakage.inversion import LinearMap
from evaluation.leakage.split_model import SplitModel
from evaluation.leakage.tryout import Ground, draw_rows, find_strength, load_heads
from evaluation.texts import read_prompts

TOKENS = torch.arange(400) % 20


@pytest.fixture(scope="module")
def ground(demo_directory: Path) -> Ground:
    texts = read_prompts(
        demo_directory / "validation.txt", TextTokenizer(demo_directory), True, 200
    )
    return Ground(SplitModel(demo_directory), texts[:16], texts[16:32])


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def make_rows(generator: torch.Generator) -> torch.Tensor:
    """Twenty tokens that differ in the first three of twelve channels, where there is noise too."""
    centres = torch.zeros(20, 12)
    centres[:, :3] = 3 * torch.randn(20, 3, generator=generator)
    return centres[TOKENS] + torch.randn(400, 12, generator=generator)


def test_what_a_defence_adds_has_deviation_one_where_it_is_whitened(
    generator: torch.Generator,
) -> None:
    rows = make_rows(generator)
    shape = torch.randn(12, 12, generator=generator)
    for defence in (even_noise(rows, 0.5), cheap_noise(shape, 2), coarse(rows, "int3")):
        added = defence.protect(rows, generator) - rows
        white = defence.whiten(added)
        assert float(white.square().mean()) == pytest.approx(1, rel=0.1)  # of 4,800 draws


def test_of_each_row_so_many_values_are_kept_and_they_are_those_furthest_from_the_mean() -> None:
    rows = torch.tensor([[1.0, 2.0, -30.0], [-1.0, -2.0, 30.0]])  # means of 0
    kept = sparse(rows, 2).expect(torch.tensor([[9.0, 0.2, 1.0]]))
    assert torch.equal(kept, torch.tensor([[9.0, 0.2, 0.0]]))  # 1 of 30 is least


def test_the_directions_in_which_tokens_differ_are_found_and_erased(
    generator: torch.Generator,
) -> None:
    rows = make_rows(generator)
    axes = find_telling_directions(rows, TOKENS, 3)
    assert torch.allclose(axes.T @ axes, torch.eye(3), atol=1e-5)  # float32
    assert float(axes[:3].square().sum()) > 0.95 * 3  # all but what 400 rows leave open
    left = erased(rows, TOKENS, 3).expect(rows)
    assert float((left @ axes).std(dim=0).max()) < 1e-5


def test_a_rotation_keeps_lengths_and_is_found_from_a_few_known_tokens(
    ground: Ground, generator: torch.Generator
) -> None:
    plain = torch.cat(ground.rows[:8])
    turn = draw_rotation(plain.shape[1], generator)
    rotated = plain @ turn
    assert torch.allclose(rotated.norm(dim=1), plain.norm(dim=1), rtol=1e-4)
    found = align(rotated, plain[:64], ground.own_rows, ground.own_tokens)
    right = (found == ground.tokens[: len(plain)]).float().mean()
    assert right > 0.9


def test_shuffled_channels_are_sorted_by_a_few_known_rows_and_by_statistics_alone(
    ground: Ground,
) -> None:
    plain = torch.cat(ground.rows)
    order = draw_order(plain.shape[1], seed=5)
    assert sorted(order.tolist()) == list(range(128))
    shuffled = plain[:, order]
    assert torch.equal(sort_by_known_rows(shuffled, plain[:64]), plain)
    told = sort_by_statistics(shuffled, ground.own_rows, ground.own_tokens)
    in_place = (told == plain).all(dim=0)
    assert int(in_place.sum()) > 120  # of 128; from other texts, without a known token


def test_exact_search_reads_rows_whose_cut_was_drawn_for_each_step(ground: Ground) -> None:
    heads = load_heads(ground.split.ends.directory, (1, 7))
    text = ground.texts[0][:30]
    rows = draw_rows(heads, text, seed=4)
    whole = [draw_rows([head], text, seed=0) for head in heads]
    chosen = {index for n, row in enumerate(rows) for index in (0, 1) if row.equal(whole[index][n])}
    assert chosen == {0, 1}
    codec = ground.split.make_codecs("fp32").up
    vocabulary = ground.split.ends.vocabulary
    assert ExactSearch(heads, vocabulary, text[0]).recover(rows, codec) == text
    assert ExactSearch(heads[:1], vocabulary, text[0]).recover(rows, codec) != text


def test_what_the_model_expects_helps_where_noise_is_as_large_as_the_rows(
    ground: Ground, generator: torch.Generator
) -> None:
    codecs = ground.split.make_codecs("fp32")
    text = ground.texts[0][:40]
    defence: Defence = even_noise(ground.own_rows, 2.5)
    seen = defence.protect(ground.rows[0][:40], generator)
    found = PriorSearch(ground.split, defence, text[0]).recover(seen, codecs)
    right = sum(a == b for a, b in zip(text, found, strict=True))
    by_row = LinearMap(defence.protect(ground.own_rows, generator), ground.own_tokens)
    assert right > int((by_row.recover(seen) == torch.tensor(text)).sum())
    assert right > 28  # without what the model expects about 20 of 40


def test_the_strength_that_is_found_costs_what_is_allowed_and_no_more(ground: Ground) -> None:
    few = Ground(ground.split, [text[:50] for text in ground.texts[:4]], [])
    strength = find_strength(few, lambda s: even_noise(ground.own_rows, s), 0.2, 2)
    assert few.measure_loss(even_noise(ground.own_rows, strength)) <= 10
    assert few.measure_loss(even_noise(ground.own_rows, 1.3 * strength)) > 5
