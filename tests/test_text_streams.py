"""Text that is handed out while it is being written."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import CheckpointError, SettingsError
from common.protocol.messages import Part
from edge_agent.text.replay_log import ReplayLog, parts_of
from edge_agent.text.stop_strings import StopStrings
from edge_agent.text.tokenizer import TextStream, TextTokenizer


@pytest.fixture(scope="module")
def tokenizer(demo_directory: Path) -> TextTokenizer:
    return TextTokenizer(demo_directory)


@pytest.mark.parametrize(
    "text",
    ["Once upon a time, there was a fox.", "Grüße aus Köln — 你好, мир! 🦊🦊", "  two  spaces\n\n"],
)
def test_the_pieces_of_a_stream_make_the_whole_text(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, ids[:1])
    pieces = [stream.add(token) for token in ids[1:]]
    assert "".join(pieces) == tokenizer.decode(ids[1:])
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no usable tokenizer"):
        TextTokenizer(tmp_path)


def test_an_empty_prompt_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(SettingsError, match="empty"):
        tokenizer.encode(" \n")


def feed(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    cutter = StopStrings(stops)
    shown = "".join(cutter.add(piece) for piece in pieces)
    return shown + cutter.finish(), cutter.found


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
       st.lists(st.integers(0, 30), max_size=6))  # fmt: skip
def test_a_text_is_cut_at_its_first_stop_however_it_arrives(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    edges = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    shown, found = feed(stops, pieces)
    if not found:
        assert shown == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(shown)
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
        assert not any(stop in shown for stop in stops)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    cutter = StopStrings(["The end."])
    assert [cutter.add("Bye. The"), cutter.add(" end"), cutter.add("ing")] == [
        "Bye. ",
        "",
        "The ending",
    ]


def test_a_replay_log_gives_whole_pieces_from_any_row_on() -> None:
    log = ReplayLog()
    for rows, body in ((4, b"aaaa"), (1, b"b"), (1, b"c"), (3, b"ddd")):
        log.append(rows, 0, body)
    assert len(log) == 9
    assert [piece.body for piece in log.read(0, max_rows=99)] == [b"aaaa", b"b", b"c", b"ddd"]
    assert [piece.body for piece in log.read(2, max_rows=5)] == [b"aaaa", b"b"]
    assert [piece.body for piece in log.read(4, max_rows=2)] == [b"b", b"c"]
    assert [piece.body for piece in log.read(8, max_rows=1)] == [b"ddd"]
    assert parts_of(log.read(4, 2)) == [Part(0, [1], 1), Part(0, [1], 1)]
