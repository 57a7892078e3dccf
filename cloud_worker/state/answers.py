"""Reads Redis's answers (RESP 2) as they come, into memory that is allocated and touched once.

A takeover is tens of megabytes in a few milliseconds. Pages that are touched for the first time
cost ten times as much as the bytes that are then copied into them, so answers land in one buffer
that stays, and bulk strings are handed out as views of it instead of copies.

Protocol: https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from socket import socket
from typing import Final, TypeAlias

import redis

LANDING_BYTES = 3 << 20  # an answer of 1 MB, the next one's beginning, and room to read into
READ_BYTES = 1 << 20
LONGEST_LINE = 64 << 10
LONGEST_BULK = 512 << 20
MOST_ITEMS = 1 << 16
DEEPEST = 8
END = b"\r\n"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The server refused a command."""

    reason: str


Answer: TypeAlias = "int | str | memoryview | Refusal | list[Answer] | None"


class _IncompleteType:
    """The type of INCOMPLETE."""


INCOMPLETE: Final = _IncompleteType()


class _WantMore(Exception):
    """An answer is not there before this many bytes are."""

    def __init__(self, end: int) -> None:
        self.end = end


class AnswerReader:
    """The answers of one connection, whole or in part."""

    def __init__(self) -> None:
        self._memory = bytearray(LANDING_BYTES)
        self._memory[::4096] = bytes(len(range(0, LANDING_BYTES, 4096)))  # touches each page
        self._view = memoryview(self._memory)
        self._begin = self._end = 0  # of what is not handed out yet
        self._wanted = 0  # the next answer ends here, or later

    def receive(self, link: socket | ssl.SSLSocket) -> int:
        """Read once what has come, as many bytes as it returns; 0 is the connection's end.

        Views that were handed out before are no longer valid. Raises what the socket raises.
        """
        self._make_room()
        received = link.recv_into(self._view[self._end : self._end + READ_BYTES])
        self._end += received
        return received

    def next_answer(self) -> Answer | _IncompleteType:
        """The next answer, or INCOMPLETE. Its views hold until the next `receive`.

        Raises redis.InvalidResponse for what is no answer.
        """
        if self._begin == self._end or self._end < self._wanted:
            return INCOMPLETE
        try:
            answer, self._begin = self._parse(self._begin)
        except _WantMore as more:
            self._wanted = more.end
            return INCOMPLETE
        self._wanted = 0
        return answer

    def _make_room(self) -> None:
        unread = self._end - self._begin
        if unread and len(self._memory) - self._end >= READ_BYTES:
            return
        self._wanted -= self._begin
        if unread + READ_BYTES > len(self._memory):  # it grows with what comes, unannounced
            grown = bytearray(2 * len(self._memory))
            grown[:unread] = self._view[self._begin : self._end]
            self._memory, self._view = grown, memoryview(grown)
        elif unread:
            self._view[:unread] = self._view[self._begin : self._end]
        self._begin, self._end = 0, unread

    def _parse(self, at: int, depth: int = 0) -> tuple[Answer, int]:
        """The answer that begins at `at`, and where it ends."""
        line_end = self._memory.find(END, at, self._end)
        if line_end < 0:
            if self._end - at > LONGEST_LINE:
                raise redis.InvalidResponse("the server's answer has no end")
            raise _WantMore(self._end + 1)
        kind, line, at = self._memory[at], self._memory[at + 1 : line_end], line_end + len(END)
        if kind == ord(":"):
            return _to_int(line), at
        if kind == ord("+"):
            return line.decode(errors="replace"), at
        if kind == ord("-"):
            return Refusal(line.decode(errors="replace")), at
        size = _to_int(line)
        if kind == ord("$") and size <= LONGEST_BULK:
            if size < 0:
                return None, at
            if self._end < at + size + len(END):
                raise _WantMore(at + size + len(END))
            return self._view[at : at + size], at + size + len(END)
        if kind == ord("*") and size <= MOST_ITEMS and depth < DEEPEST:
            items: list[Answer] = []
            for _ in range(size):
                item, at = self._parse(at, depth + 1)
                items.append(item)
            return (items if size >= 0 else None), at
        raise redis.InvalidResponse(f"the server's answer begins with {chr(kind)!r} and {size}")


def _to_int(line: bytearray) -> int:
    try:
        return int(line)
    except ValueError:
        raise redis.InvalidResponse("the server's answer has no number where one belongs") from None
