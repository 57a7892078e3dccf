"""A pool whose model is a stand-in: what it writes is known, and all else is real."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from forks import error_line, run_midspan

from common.codecs.codec import make_codec
from common.spans.attention import Segment
from loadtest.synthetic.model import (
    MODULUS,
    SyntheticOracle,
    SyntheticSpan,
    make_ends,
    read_numbers,
    read_shape,
    write_numbers,
    write_on,
)


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "int4"])
def test_rows_hold_numbers_through_codecs(codec: str) -> None:
    numbers = torch.tensor([0, 1, 999, MODULUS - 1])
    rows = write_numbers(numbers, 128)
    body = make_codec(codec, "up").encode(rows)
    decoded = make_codec(codec, "up").decode(body, len(numbers), 128)
    assert read_numbers(decoded).tolist() == numbers.tolist()


def test_what_it_writes_is_what_head_middle_and_tail_write(demo_directory: Path) -> None:
    shape = read_shape(demo_directory, None)
    ends, middle = make_ends(demo_directory, shape), SyntheticSpan(shape, len(shape.cut.middle))
    caches, kv = ends.new_caches(), middle.new_kv()
    prompt = [7, 1000, 3]
    ids, written = list(prompt), list[int]()
    for _ in range(5):
        (rows,) = ends.run_heads([(ids, caches)])
        rows = middle.run(rows, [Segment(kv, kv.length, len(ids))])
        ((scores,),) = ends.run_tails([(rows, caches)])
        written.append(scores.best)
        ids = [scores.best]
    assert written == write_on(prompt, 5)


def test_sessions_in_a_batch_write_what_each_writes_alone(demo_directory: Path) -> None:
    shape = read_shape(demo_directory, None)
    middle = SyntheticSpan(shape, 4)
    prompts = [[5, 6, 7], [8], [9, 10]]
    rows = [write_numbers(torch.tensor(prompt), shape.hidden) for prompt in prompts]
    segments = [Segment(middle.new_kv(), 0, len(prompt)) for prompt in prompts]
    together = read_numbers(middle.run(torch.cat(rows), segments)).tolist()
    alone = [
        read_numbers(middle.run(row, [Segment(middle.new_kv(), 0, len(row))])).tolist()
        for row in rows
    ]
    assert together == list(itertools.chain(*alone))


def test_a_kv_row_that_is_another_makes_every_token_after_it_wrong(demo_directory: Path) -> None:
    shape = read_shape(demo_directory, None)
    middle = SyntheticSpan(shape, 4)
    kv = middle.new_kv()
    middle.run(write_numbers(torch.tensor([5, 6]), shape.hidden), [Segment(kv, 0, 2)])
    with torch.inference_mode():
        kv.buffer[1, 0] += 1
    wrong = middle.run(write_numbers(torch.tensor([7]), shape.hidden), [Segment(kv, 2, 1)])
    assert read_numbers(wrong).tolist() != read_numbers(_run_alone(middle, [5, 6, 7])).tolist()[2:]


def _run_alone(middle: SyntheticSpan, tokens: list[int]) -> torch.Tensor:
    rows = write_numbers(torch.tensor(tokens), middle.hidden)
    return middle.run(rows, [Segment(middle.new_kv(), 0, len(tokens))])


def test_tokens_that_are_others_are_counted() -> None:
    want = write_on([1, 2, 3], 4)
    oracle = SyntheticOracle()
    assert oracle.count_wrong([1, 2, 3], want) == 0
    assert oracle.count_wrong([1, 2, 3], [*want[:2], want[2] ^ 1, want[3]]) == 1


def test_kv_rows_are_as_large_as_the_models(demo_directory: Path) -> None:
    shape = read_shape(demo_directory, "2:6")
    # keys and values of 4 layers, 2 heads of 32 values each, in float32
    assert SyntheticSpan(shape, len(shape.cut.middle)).layout.row_bytes == 4 * 2 * 2 * 32 * 4


@pytest.mark.long
def test_workers_in_few_processes_are_killed_and_every_token_is_right() -> None:
    done = run_midspan(
        "loadtest", "--synthetic", "2", "--workers", "6", "--processes", "2", "--duration", "12",
        "--concurrency", "20", "--prompt-tokens", "4,300", "--tokens", "40", "--kill-every", "2",
        "--json",
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    assert report["sessions"] >= 20
    assert (report["failed"], report["tokens_wrong"]) == (0, 0)
    assert report["kills"] >= 1
    assert report["takeovers"] >= 1  # of half of the sessions, at each kill
    assert report["workers"]["most"] == 6
    stand_in = report["synthetic"]
    assert (stand_in["ms"], stand_in["per"], stand_in["edges"]) == (2, "batch", "compute nothing")


def test_a_stand_in_is_named_in_the_table() -> None:
    done = run_midspan(
        "loadtest", "--synthetic", "0", "--workers", "1", "--processes", "1", "--sessions", "2",
        "--tokens", "3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no model was computed: a batch slept 0 ms in the workers" in done.stdout


def test_workers_that_processes_cannot_share_evenly_are_refused() -> None:
    words = "2 processes (--processes) share evenly"
    assert words in error_line("loadtest", "--synthetic", "1", "--workers", "3")
    line = error_line("loadtest", "--synthetic", "1", "--broker", "tcp://127.0.0.1:9")
    assert "--synthetic is a pool of our own" in line
