"""Text that is handed out while it is being written."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import CheckpointError, SettingsError
from edge_agent.replay_log import ReplayLog
from edge_agent.stop_strings import StopStrings
from edge_agent.tokenizer import TextStream, TextTokenizer


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


def test_a_replay_log_gives_any_range_and_forgets_what_is_cut_back() -> None:
    log = ReplayLog(row_bytes=2)
    log.append(b"aabbcc")
    log.cut_back(2)
    log.append(b"dd")
    assert (len(log), log.read(0, 3), log.read(1, 2)) == (3, b"aabbdd", b"bb")


def test_a_replay_log_takes_whole_rows_only() -> None:
    with pytest.raises(ValueError, match="no whole rows"):
        ReplayLog(row_bytes=4).append(b"abc")
