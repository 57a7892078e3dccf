"""Prompt lookup: what followed where the session's own text said the same before.

After Saxena's prompt lookup decoding (2023), with two changes: the longest match counts, of any
length from two tokens on, and a place that has been copied from is followed across a changed, left
out or added word, for text that is edited keeps on matching behind the edit.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from edge_agent.text.drafting import grades
from edge_agent.text.drafting.drafter import Draft
from edge_agent.text.drafting.text_index import LONGEST_MATCH, NOWHERE, TextIndex

SURE_MATCH = 4  # tokens: beats a place that is followed across an edit
FOLLOWED_RUN = 9  # tokens that were copied from a place before an edit is taken for one
MOST_EDITS = 3  # in a row; then the place is given up
SKIPPED = 3  # tokens that an edit may leave out
LENGTHS = (3, 5, 10)  # of matches, from which on they are of the next grade
EDITED_GRADE, SHORT_GRADE = grades.LOOKUP, grades.LOOKUP + 1
LONG_GRADE = SHORT_GRADE + 2


class LookupDrafter:
    """Copies what followed on the longest match."""

    name = "lookup"
    is_free = True

    def __init__(self) -> None:
        self._text = TextIndex()
        self._source = _Source(self._text)

    def propose(self, token_ids: Sequence[int], limit: int) -> list[Draft]:
        for token in token_ids[len(self._text.ids) :]:
            self._source.follow(token)
            self._text.append(token)
        place, length = self._text.find()
        source = self._source
        if place != NOWHERE and length > source.run and not (source.edits and length < SURE_MATCH):
            source.begin(place, length)
        if source.place == NOWHERE:
            return []
        return self._copy(limit)

    def observe(self, boundary: Tensor, tail_inputs: Tensor) -> None:
        """Rows say nothing about words."""

    def cut_back(self, position: int) -> None:
        if position < len(self._text.ids):
            self._text.cut_back(position)
            self._source.drop()

    def _copy(self, limit: int) -> list[Draft]:
        """The source's tokens; past the end of the text those that were copied themselves."""
        ids, source, drafts = self._text.ids, self._source, list[Draft]()
        for index in range(limit):
            at = source.place + index
            token = ids[at] if at < len(ids) else drafts[at - len(ids)].token_id
            drafts.append(Draft(token, source.grade(index)))
        return drafts


def grade_of(length: int) -> int:
    """Of a guess behind a match of so many tokens."""
    return SHORT_GRADE + sum(length >= bound for bound in LENGTHS)


class _Source:
    """The place that a session's text is being copied from, if it is.

    `place` is that of the token that should come next, `run` how many have been copied in a row,
    `edits` how many tokens in a row were others.
    """

    def __init__(self, text: TextIndex) -> None:
        self._text = text
        self.drop()

    def drop(self) -> None:
        self.place, self.run, self.edits, self._before = NOWHERE, 0, 0, 0

    def grade(self, index: int) -> int:
        """Of the guess after `index` others; behind an edit the first has one of its own."""
        if self.edits:
            return grade_of(self._before + index) if index else EDITED_GRADE
        return grade_of(self.run + index)

    def begin(self, place: int, run: int) -> None:
        self.place, self.run, self.edits, self._before = place, run, 0, 0

    def follow(self, token: int) -> None:
        """A token has come."""
        if self.place == NOWHERE:
            return
        if self._text.ids[self.place] == token:
            self.place += 1
            self.run = min(self.run + 1, LONGEST_MATCH)
            self.edits = 0
        elif max(self.run, self._before) < FOLLOWED_RUN or self.edits == MOST_EDITS:
            self.drop()
        else:
            self._pass_edit(token)

    def _pass_edit(self, token: int) -> None:
        """Go on behind the same token nearby (words were left out, or added), or the next place."""
        ids, begin = self._text.ids, self.place - self.edits
        nearby = ids[begin : self.place + 1 + SKIPPED]
        self._before, self.run = max(self.run, self._before), 0
        self.edits += 1
        self.place = begin + nearby.index(token) + 1 if token in nearby else self.place + 1
        if self.place >= len(ids):
            self.drop()
