"""Redis's answers as they come over a socket, against hiredis, which reads the same bytes."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from typing import Any

import hiredis
import pytest
import redis

from cloud_worker.state.answers import INCOMPLETE, LANDING_BYTES, Answer, AnswerReader, Refusal

BULKS = (b"", b"committed", b"\r\n$5\r\n", bytes(1000), b"x" * 70_000)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


def draw_answer(rng: random.Random, depth: int = 0) -> bytes:
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind == 0:
        return b":%d\r\n" % rng.randrange(-(2**62), 2**62)
    if kind == 1:
        return b"+QUEUED\r\n"
    if kind == 2:
        return b"$-1\r\n" if rng.random() < 0.5 else b"*-1\r\n"
    if kind in (3, 4):
        bulk = rng.choice(BULKS)
        return b"$%d\r\n%s\r\n" % (len(bulk), bulk)
    items = [draw_answer(rng, depth + 1) for _ in range(rng.randrange(5))]
    return b"*%d\r\n%s" % (len(items), b"".join(items))


def whole(answer: Any) -> Any:
    """As hiredis says it: bytes for every kind of string."""
    if isinstance(answer, list):
        return [whole(item) for item in answer]
    if isinstance(answer, str):
        return answer.encode()
    return bytes(answer) if isinstance(answer, memoryview) else answer


def read_all(reader: AnswerReader) -> list[Answer]:
    answers = []
    while (answer := reader.next_answer()) is not INCOMPLETE:
        answers.append(whole(answer))
    return answers


@pytest.mark.parametrize("seed", range(20))
def test_answers_in_pieces_are_what_hiredis_reads(
    ends: tuple[socket.socket, socket.socket], seed: int
) -> None:
    here, there = ends
    rng = random.Random(seed)
    wire = b"".join(draw_answer(rng) for _ in range(30))
    reference = hiredis.Reader()
    reference.feed(wire)
    want = []
    while (answer := reference.gets()) is not False:
        want.append(answer)
    reader, got = AnswerReader(), []
    while wire:
        piece, wire = wire[: (size := rng.choice([1, 7, 100, 50_000]))], wire[size:]
        there.sendall(piece)
        assert reader.receive(here) == len(piece)
        got += read_all(reader)
    assert got == want


def test_an_answer_that_is_larger_than_the_buffer_comes_whole(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    here, there = ends
    bulk = random.Random(0).randbytes(2 * LANDING_BYTES + 5)
    wire = b":7\r\n$%d\r\n%s\r\n:8\r\n" % (len(bulk), bulk)
    reader, got = AnswerReader(), []
    for at in range(0, len(wire), 65_536):
        there.sendall(wire[at : at + 65_536])
        reader.receive(here)
        got += read_all(reader)
    assert got == [7, bulk, 8]


def test_answers_without_end_need_no_more_room_than_one(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    here, there = ends
    reader, got = AnswerReader(), []
    bulks = [random.Random(index).randbytes(60_000) for index in range(150)]
    wire = b"".join(b"$60000\r\n%s\r\n" % bulk for bulk in bulks)
    for at in range(0, len(wire), 47_000):
        there.sendall(wire[at : at + 47_000])
        reader.receive(here)
        got += read_all(reader)
    assert got == bulks
    assert len(reader._memory) == LANDING_BYTES


def test_what_the_server_refuses_is_said(ends: tuple[socket.socket, socket.socket]) -> None:
    here, there = ends
    there.sendall(b"*2\r\n-ERR no\r\n:1\r\n-NOSCRIPT gone\r\n")
    reader = AnswerReader()
    reader.receive(here)
    assert read_all(reader) == [[Refusal("ERR no"), 1], Refusal("NOSCRIPT gone")]


@pytest.mark.parametrize(
    "wire",
    [b"HTTP/1.1 200 OK\r\n", b":x\r\n", b"$9999999999\r\n", b"*99999999\r\n", b"*1\r\n" * 20,
     b"x" * 100_000],
)  # fmt: skip
def test_what_is_no_answer_is_refused(
    ends: tuple[socket.socket, socket.socket], wire: bytes
) -> None:
    here, there = ends
    there.sendall(wire)
    reader = AnswerReader()
    reader.receive(here)
    with pytest.raises(redis.InvalidResponse):
        reader.next_answer()
