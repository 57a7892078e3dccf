"""The boundary rows an edge has sent in a session: what makes every other store expendable."""

from __future__ import annotations


class ReplayLog:
    """Rows of a fixed number of bytes, appended in order; any range can be sent again."""

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._rows = bytearray()

    def __len__(self) -> int:
        return len(self._rows) // self._row_bytes

    def append(self, encoded: bytes) -> None:
        """Add encoded rows; `encoded` must be whole rows."""
        if len(encoded) % self._row_bytes:
            raise ValueError(f"{len(encoded)} bytes are no whole rows of {self._row_bytes}")
        self._rows += encoded

    def cut_back(self, position: int) -> None:
        """Forget the rows from `position` on."""
        del self._rows[position * self._row_bytes :]

    def read(self, start: int, end: int) -> bytes:
        """The encoded rows start..end."""
        return bytes(self._rows[start * self._row_bytes : end * self._row_bytes])
