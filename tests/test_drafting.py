"""Drafters that look at words: lookup in the session's own text, and how guesses are counted."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from torch import Tensor

from edge_agent.text.drafting.drafter import Draft
from edge_agent.text.drafting.grades import NGRAM
from edge_agent.text.drafting.lookup import SHORT_GRADE, LookupDrafter
from edge_agent.text.drafting.measure import KnownText, count_right, tokens_per_round_trip
from edge_agent.text.drafting.text_index import LONGEST_MATCH, NOWHERE, TextIndex


def tokens_of(drafts: list[Draft]) -> list[int]:
    return [draft.token_id for draft in drafts]


def look_everywhere(ids: list[int]) -> tuple[int, int]:
    """The latest of the longest matches of two tokens or more, by trying all places."""
    best, longest = NOWHERE, 1
    for place in range(len(ids) - 1, 1, -1):
        length = 0
        while length < min(place, LONGEST_MATCH) and ids[place - 1 - length] == ids[-1 - length]:
            length += 1
        if length > longest:
            best, longest = place, length
    return best, longest if best != NOWHERE else 0


def test_the_longest_match_is_the_one_that_a_search_of_all_places_finds() -> None:
    rng = random.Random(0)
    index = TextIndex()
    for _ in range(400):
        index.append(rng.randrange(6))
        assert index.find() == look_everywhere(index.ids)


def test_an_index_that_was_cut_back_is_as_if_it_had_never_known_more() -> None:
    rng = random.Random(1)
    index = TextIndex()
    index.extend([rng.randrange(4) for _ in range(200)])
    for position in (150, 3, 1, 0):
        index.cut_back(position)
        fresh = TextIndex()
        fresh.extend(index.ids)
        assert vars(index) == vars(fresh)
        index.extend(index.ids + [rng.randrange(4) for _ in range(50)])
        index.cut_back(position)


def test_what_followed_on_the_latest_of_the_longest_matches_is_guessed() -> None:
    text = [1, 2, 3, 40, 9, 2, 3, 50, 9, 1, 2, 3, 60, 9, 2, 3, 70, 9, 1, 2, 3]
    assert tokens_of(LookupDrafter().propose(text, 3)) == [60, 9, 2]
    assert tokens_of(LookupDrafter().propose([*text[:-3], 8, 2, 3], 2)) == [70, 9]


def test_nothing_is_guessed_where_no_two_tokens_stood_before() -> None:
    assert LookupDrafter().propose([], 4) == []
    assert LookupDrafter().propose([5], 4) == []
    assert LookupDrafter().propose(list(range(50)), 4) == []


def test_a_text_that_repeats_itself_is_guessed_beyond_its_end() -> None:
    assert tokens_of(LookupDrafter().propose([7, 8, 9, 7, 8, 9, 7, 8], 7)) == [9, 7, 8, 9, 7, 8, 9]


def test_longer_matches_have_higher_grades_up_to_the_last() -> None:
    drafts = LookupDrafter().propose([*range(2, 100), 1, 50, 51], 40)
    grades = [draft.grade for draft in drafts]
    assert grades == sorted(grades)
    assert set(grades) == set(range(SHORT_GRADE, NGRAM))


@pytest.mark.parametrize(
    ("copied", "following"),
    [
        pytest.param([*range(10, 20), 99], [21, 22, 23], id="changed"),
        pytest.param([*range(10, 20), 21], [22, 23, 24], id="left out"),
        pytest.param([*range(10, 20), 99, 20], [21, 22, 23], id="added"),
    ],
)
def test_a_copy_goes_on_behind_a_word_that_was(copied: list[int], following: list[int]) -> None:
    drafter = LookupDrafter()
    text = list(range(60))
    drafter.propose([*text, *copied[:9]], 4)
    assert tokens_of(drafter.propose([*text, *copied], 3)) == following


def test_a_place_is_given_up_when_a_text_goes_on_otherwise() -> None:
    drafter = LookupDrafter()
    text = [*range(60), *range(10, 20)]
    assert drafter.propose(text, 4) != []
    assert drafter.propose([*text, *range(100, 106)], 4) == []


def test_a_place_is_not_followed_any_more_after_cutting_back() -> None:
    drafter = LookupDrafter()
    text = [*range(60), *range(10, 20)]
    drafter.propose(text, 4)
    drafter.cut_back(70)  # nothing
    assert drafter.propose([*text, 100], 4) != []
    drafter.cut_back(70)
    assert drafter.propose([*text[:70], 101], 4) == []


def test_a_drafter_that_was_cut_back_guesses_as_a_new_one() -> None:
    rng = random.Random(2)
    text = [rng.randrange(5) for _ in range(120)]
    drafter = LookupDrafter()
    drafter.propose(text, 4)
    drafter.cut_back(60)
    other = text[:60] + [rng.randrange(5) for _ in range(20)]
    assert drafter.propose(other, 8) == LookupDrafter().propose(other, 8)


def edit(ids: list[int], share: float, rng: random.Random) -> list[int]:
    """A copy of which a part of the tokens is changed, left out, or has another behind it."""
    copy = []
    for token in ids:
        if rng.random() >= share:
            copy.append(token)
        else:
            copy += rng.choice([[rng.randrange(1000)], [], [token, rng.randrange(1000)]])
    return copy


def test_a_copy_with_edits_of_one_token_in_twenty_takes_few_round_trips() -> None:
    rng = random.Random(3)
    texts = []
    for _ in range(6):
        original = [rng.randrange(1000) for _ in range(400)]
        texts.append(KnownText([*original, *edit(original, 0.05, rng)], len(original)))
    rates = [tokens_per_round_trip(lambda _: LookupDrafter(), texts, m) for m in (4, 8, 16)]
    # if the first guess behind each edit were right: the mean of min(M, edit-free tokens) + 1
    bounds = [(1 - 0.95 ** (m + 1)) / 0.05 for m in (4, 8, 16)]
    assert all(0.75 * bound < rate < bound for rate, bound in zip(rates, bounds, strict=True))


class Guessing:
    """Guesses what it is given, whatever stands before."""

    name = "lookup"

    def __init__(self, following: list[int]) -> None:
        self.following = following
        self.asked: list[int] = []

    def propose(self, token_ids: Sequence[int], limit: int) -> list[Draft]:
        self.asked.append(len(token_ids))
        return [Draft(token, 0) for token in self.following[len(token_ids) :][:limit]]

    def observe(self, boundary: Tensor, tail_inputs: Tensor) -> None:
        raise AssertionError("these texts have no rows")

    def cut_back(self, position: int) -> None:
        raise AssertionError("nothing is taken back here")


def test_a_round_trip_gives_the_guesses_that_are_right_and_one_token_more() -> None:
    text = list(range(2 + 1 + 12))
    right, wrong = Guessing(text), Guessing([99] * 20)
    assert tokens_per_round_trip(lambda _: right, [KnownText(text, 2)], 3) == 12 / 3
    assert right.asked == [3, 7, 11]
    assert tokens_per_round_trip(lambda _: wrong, [KnownText(text, 2)], 3) == 1
    assert count_right([Draft(1, 0), Draft(2, 0), Draft(9, 0), Draft(4, 0)], [1, 2, 3, 4]) == 2
