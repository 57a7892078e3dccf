"""Drafts by n-grams: a table beside a model, the session's own text, and outputs that are kept."""

from __future__ import annotations

import fcntl
import random
import stat
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import CheckpointError, SettingsError
from edge_agent.text.drafting.grades import MODEL, NGRAM
from edge_agent.text.drafting.ngram import NgramDrafter, share_grade
from edge_agent.text.drafting.ngram_table import (
    ORDER,
    Guess,
    NgramTable,
    build_table,
    hash_ending,
    hash_endings,
    load_table,
)
from edge_agent.text.drafting.own_outputs import OwnOutputs

VOCABULARY = 20


def draw_text(seed: int, tokens: int) -> list[int]:
    """A text in which what follows depends on the two tokens before, mostly."""
    rng = random.Random(seed)
    text = [1, 2]
    while len(text) < tokens:
        likely = (3 * text[-1] + 5 * text[-2]) % VOCABULARY
        text.append(likely if rng.random() < 0.7 else rng.randrange(VOCABULARY))
    return text


def table_of(*texts: list[int], largest: int = 1 << 20) -> NgramTable:
    return build_table([(text[:-1], text[1:]) for text in texts], VOCABULARY, largest)


def test_the_hashes_of_a_text_are_those_of_its_endings() -> None:
    text = draw_text(0, 30)
    by_length = hash_endings(np.array(text))
    for end in range(ORDER, len(text) + 1):
        keys = [int(hashes[end - length]) for length, hashes in enumerate(by_length, 1)]
        assert hash_ending(text[:end]) == keys


def test_the_most_frequent_token_after_the_longest_known_context_is_guessed() -> None:
    texts = [draw_text(seed, 300) for seed in range(3)]
    table = table_of(*texts)
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for text in texts:
        for at in range(1, len(text)):
            for length in range(1, min(ORDER, at) + 1):
                counts[tuple(text[at - length : at])][text[at]] += 1
    unseen = draw_text(9, 500)
    for end in range(ORDER, len(unseen)):
        endings = [tuple(unseen[end - length : end]) for length in range(ORDER, 0, -1)]
        seen = counts[next(ending for ending in endings if ending in counts)]
        guess = table.guess(unseen[:end])
        assert guess is not None
        # of those seen as often the one of the lowest number
        assert guess.token_id == min(seen, key=lambda token: (-seen[token], token))


def test_what_follows_may_be_given_apart_from_the_text() -> None:
    table = build_table([([5, 6, 7], [16, 17, 18])], VOCABULARY)
    assert table.guess([5, 6]) == Guess(17, int(255 / 1.25) / 255, 1)


def test_a_context_that_says_what_a_shorter_one_says_is_left_out() -> None:
    assert len(table_of([1, 2, 3, 4, 5])) == 4


def test_of_too_many_contexts_the_frequent_ones_stay() -> None:
    often, once = [1, 2] * 20, list(range(3, 19))
    table = table_of(often, once, largest=2)
    assert len(table) == 2
    assert table.guess([1]) is not None
    assert table.guess([3]) is None


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    text = draw_text(1, 400)
    table, path = table_of(text), tmp_path / "drafting" / "ngrams.safetensors"
    table.save(path)
    read = load_table(path, VOCABULARY)
    assert len(read) == len(table)
    assert [read.guess(text[:at]) for at in range(400)] == [
        table.guess(text[:at]) for at in range(400)
    ]
    assert [entry.name for entry in path.parent.iterdir()] == ["ngrams.safetensors"]


def test_large_vocabularies_have_wider_tokens(tmp_path: Path) -> None:
    table = build_table([([70_000, 5], [5, 99_999])], 100_000)
    table.save(tmp_path / "table")
    guess = load_table(tmp_path / "table", 100_000).guess([5])
    assert guess is not None
    assert guess.token_id == 99_999


@pytest.mark.parametrize(
    ("tensors", "about", "reason"),
    [
        ({}, {"format": "other/1"}, "its format is 'other/1'"),
        ({}, {"vocabulary": "7"}, "vocabulary of 7 tokens, and the model's has 20"),
        ({"keys": np.array([2, 1], np.uint32)}, {}, "not in order"),
        ({"tokens": np.array([1, 20], np.uint16)}, {}, "not of the vocabulary"),
        ({"tokens": np.array([1, 2], np.uint32)}, {}, "are of"),
        ({"shares": np.array([1], np.uint8)}, {}, "have shapes"),
    ],
    ids=["format", "vocabulary", "order", "token", "type", "shape"],
)
def test_what_is_no_table_of_the_model_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], about: dict[str, str], reason: str
) -> None:
    path = tmp_path / "ngrams.safetensors"
    table_of([1, 2, 3]).save(path)
    good = load_file(path)
    assert len(good["keys"]) == 2
    said = {"format": "midspan-ngrams/1", "vocabulary": "20"}
    save_file({**good, **tensors}, path, metadata={**said, **about})
    with pytest.raises(CheckpointError, match=f"{path.name} holds no usable table.*{reason}"):
        load_table(path, VOCABULARY)


def test_a_table_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.*No such file"):
        load_table(tmp_path / "nowhere", VOCABULARY)
    (tmp_path / "broken").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="broken holds no usable table"):
        load_table(tmp_path / "broken", VOCABULARY)


def test_guesses_build_on_each_other() -> None:
    drafter = NgramDrafter([table_of([1, 2, 3, 4, 5, 6])])
    assert [draft.token_id for draft in drafter.propose([9, 2], 8)] == [3, 4, 5, 6]


def test_the_sessions_own_text_speaks_where_it_knows_more() -> None:
    table = table_of([1, 2, 3, 4] * 5)
    text = [8, 1, 2, 10, 11, 12]
    assert [draft.token_id for draft in NgramDrafter([table]).propose([*text, 1, 2], 2)] == [10, 11]
    assert NgramDrafter([table]).propose([*text, 13, 2], 1)[0].token_id == 3


def test_the_first_table_speaks_where_contexts_are_as_long() -> None:
    first, second = table_of([1, 2, 7]), table_of([1, 2, 8, 9, 8])
    assert NgramDrafter([first, second]).propose([1, 2], 1)[0].token_id == 7
    assert NgramDrafter([second, first]).propose([1, 2], 1)[0].token_id == 8
    assert NgramDrafter([first, second]).propose([8], 1)[0].token_id == 9


def test_grades_of_ngrams_rise_with_the_share() -> None:
    grades = [share_grade(percent / 100) for percent in range(101)]
    assert grades == sorted(grades)
    assert set(grades) == set(range(NGRAM, MODEL))


def test_a_drafter_that_was_cut_back_knows_nothing_of_what_was_behind() -> None:
    drafter = NgramDrafter([])
    drafter.propose([1, 2, 3, 4], 1)
    drafter.cut_back(2)
    assert drafter.propose([1, 2, 5, 2, 3], 4) == []


def read_tokens(outputs: OwnOutputs) -> list[int]:
    return [int(token) for token in np.frombuffer(outputs.path.read_bytes(), dtype=np.uint32)]


def test_what_a_model_wrote_is_guessed_by_the_next_process(tmp_path: Path) -> None:
    outputs = OwnOutputs(tmp_path / "kept", "f1", VOCABULARY)
    assert outputs.table is None
    outputs.add([1, 2], [3, 4, 5])
    again = OwnOutputs(tmp_path / "kept", "f1", VOCABULARY)
    assert again.table is not None
    assert [d.token_id for d in NgramDrafter([again.table]).propose([7, 2], 9)] == [3, 4, 5]
    assert OwnOutputs(tmp_path / "kept", "f2", VOCABULARY).table is None


def test_outputs_are_guessed_by_the_same_process_once_they_are_many(tmp_path: Path) -> None:
    outputs = OwnOutputs(tmp_path, "f1", VOCABULARY)
    for _ in range(200):
        outputs.add([1], [2, 3])
    assert outputs.table is not None
    assert outputs.table.guess([1]) == Guess(2, 254 / 255, 1)
    assert outputs.table.guess([3]) is None


def test_outputs_are_for_their_user_alone(tmp_path: Path) -> None:
    outputs = OwnOutputs(tmp_path, "f1", VOCABULARY, largest=20)
    for _ in range(9):  # halved in between
        outputs.add([1], [2, 3])
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_newer_half_of_too_many_outputs_stays(tmp_path: Path) -> None:
    outputs = OwnOutputs(tmp_path, "f1", VOCABULARY, largest=20)
    mark = 0xFFFFFFFF
    for number in range(5):
        outputs.add([], [number, number, number])
    assert read_tokens(outputs) == [token for n in range(5) for token in (n, n, n, mark)]
    outputs.add([], [5, 5, 5])
    assert read_tokens(outputs) == [4, 4, 4, mark, 5, 5, 5, mark]


def test_tokens_that_were_cut_or_are_none_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "f1.tokens"
    path.write_bytes(np.array([1, 2, 999, 3], np.uint32).tobytes() + b"\x01\x02")
    outputs = OwnOutputs(tmp_path, "f1", VOCABULARY)
    assert outputs.table is not None
    outputs.add([], [7])
    assert read_tokens(outputs) == [1, 2, 999, 3, 7, 0xFFFFFFFF]


def test_a_directory_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"cannot be kept in .*file"):
        OwnOutputs(tmp_path / "file", "f1", VOCABULARY)


def test_nobody_else_writes_while_an_answer_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, append = OwnOutputs(tmp_path, "f1", VOCABULARY), OwnOutputs._append
    refused = []

    def try_to_lock(self: OwnOutputs, data: bytes) -> None:
        with (tmp_path / "f1.lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refused.append(True)
        append(self, data)

    monkeypatch.setattr(OwnOutputs, "_append", try_to_lock)
    outputs.add([1], [2, 3])
    assert refused == [True]


def test_processes_that_add_at_once_lose_no_answer(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from edge_agent.text.drafting.own_outputs import OwnOutputs
outputs = OwnOutputs(Path(sys.argv[1]), "f1", 1000)
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    outputs.add([int(sys.argv[2])], [number] * 7)
"""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        process.communicate()
        assert process.returncode == 0
    tokens = np.frombuffer((tmp_path / "f1.tokens").read_bytes(), np.uint32).reshape(-1, 9)
    answers = sorted(row.tolist() for row in tokens)
    assert answers == [[who, *[n] * 7, 0xFFFFFFFF] for who in range(2) for n in range(100)]
