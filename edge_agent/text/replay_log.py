"""The boundary rows an edge has sent in a session: what makes every other store expendable."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from common.protocol.messages import BOUNDARY, Part

MAX_PARTS = 256  # of one step


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows that were encoded together, from row `start` on."""

    start: int
    rows: int
    codec: int  # index into the session's codecs
    body: bytes
    name: str = BOUNDARY  # of the part in a step

    @property
    def end(self) -> int:
        return self.start + self.rows


class ReplayLog:
    """Encoded rows in order, as they were sent; they are sent again in the same pieces.

    So a worker that computes them again decodes the very same values.
    """

    def __init__(self) -> None:
        self._pieces: list[Encoded] = []

    def __len__(self) -> int:
        return self._pieces[-1].end if self._pieces else 0

    def append(self, rows: int, codec: int, body: bytes, name: str = BOUNDARY) -> None:
        """Add rows that were encoded together."""
        self._pieces.append(Encoded(len(self), rows, codec, body, name))

    def cut_back(self, position: int) -> int:
        """Forget the pieces that reach beyond `position`; returns how many rows are left."""
        while self._pieces and self._pieces[-1].end > position:
            self._pieces.pop()
        return len(self)

    def read(self, position: int, max_rows: int, max_pieces: int = MAX_PARTS) -> list[Encoded]:
        """Whole pieces from the one that holds row `position` on, about `max_rows` rows."""
        first = bisect.bisect_right(self._pieces, position, key=lambda piece: piece.start) - 1
        taken: list[Encoded] = []
        for piece in self._pieces[first : first + max_pieces]:
            if taken and piece.end - taken[0].start > max_rows:
                break
            taken.append(piece)
        return taken


def parts_of(pieces: list[Encoded]) -> list[Part]:
    """How a step describes these pieces."""
    return [Part(piece.codec, [piece.rows], len(piece.body), piece.name) for piece in pieces]
