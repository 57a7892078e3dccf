"""Where in a session's text the tokens that it ends with have stood before.

As in LZ77: of each pair of neighbours the last place is kept, and of each place the one before it
with the same pair, so a token is added and taken back in constant time, and a text of 100,000 costs
megabytes. Of the places with the same pair the latest few are compared backwards.
"""

from __future__ import annotations

from collections.abc import Sequence

LATEST_PLACES = 24  # compared, of those with the same pair
LONGEST_MATCH = 24  # tokens; longer ones are alike
NOWHERE = -1


class TextIndex:
    """The tokens of one session, and what has followed on each pair of them."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._last: dict[tuple[int, int], int] = {}  # the last token that followed on a pair
        self._before: list[int] = []  # the place before each with the same pair ahead of it

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add what `token_ids` has beyond the tokens that are here already."""
        for token in token_ids[len(self.ids) :]:
            self.append(token)

    def append(self, token: int) -> None:
        place = len(self.ids)
        if place < 2:
            self._before.append(NOWHERE)
        else:
            pair = (self.ids[-2], self.ids[-1])
            self._before.append(self._last.get(pair, NOWHERE))
            self._last[pair] = place
        self.ids.append(token)

    def cut_back(self, position: int) -> None:
        """Forget the tokens from `position` on."""
        while len(self.ids) > max(0, position):
            self.ids.pop()
            before = self._before.pop()
            if len(self.ids) < 2:
                continue
            pair = (self.ids[-2], self.ids[-1])
            if before == NOWHERE:
                del self._last[pair]
            else:
                self._last[pair] = before

    def find(self, tail: Sequence[int] = ()) -> tuple[int, int]:
        """The place that followed on the longest earlier match, and how many tokens match.

        Of matches of one length the latest; (NOWHERE, 0) where no pair matches. `tail` are tokens
        after the text that are not in it: those that were guessed.
        """
        ending = [*self.ids[-LONGEST_MATCH:], *tail][-LONGEST_MATCH:]
        if len(ending) < 2:
            return NOWHERE, 0
        place = self._last.get((ending[-2], ending[-1]), NOWHERE)
        best, longest = NOWHERE, 0
        for _ in range(LATEST_PLACES):
            if place == NOWHERE:
                break
            length = self._match(place, ending)
            if length > longest:
                best, longest = place, length
            if longest == LONGEST_MATCH:
                break
            place = self._before[place]
        return best, longest

    def _match(self, place: int, ending: Sequence[int]) -> int:
        """How many tokens before `place` are those that `ending` ends with."""
        ids, most = self.ids, min(place, len(ending))
        length = 2
        while length < most and ids[place - 1 - length] == ending[-1 - length]:
            length += 1
        return length
