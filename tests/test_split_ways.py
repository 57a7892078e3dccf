"""`midspan eval split`: three ways to an answer, what each costs, and rows that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from common.errors import CheckpointError, SettingsError
from edge_agent.text.tokenizer import TextTokenizer
from evaluation.command import evaluate
from evaluation.leakage.split_model import SplitModel
from evaluation.split.rows_file import load_rows

WORDS = "Once upon a time, there was a brave fox named Mia. She loved to paint in the sun."
HIDDEN, NEW = 128, 12


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("split") / "story.txt"
    path.write_text(WORDS)
    return path


def run(*arguments: object) -> list[dict[str, Any]]:
    words = ["split", "stories-llama", *map(str, arguments), "-n", str(NEW), "--json"]
    done = CliRunner().invoke(evaluate, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_three_ways_write_what_the_whole_model_writes_and_count_their_bytes(
    story: Path, tmp_path: Path, demo_directory: Path, whole_model: torch.nn.Module
) -> None:
    log = tmp_path / "steps.jsonl"
    codecs = ["--codec", "fp32", "--codec", "int8"]
    ways = run("--text", story, *codecs, "--mbit", 8, "--rtt-ms", 5, "--stages", log)
    tokenizer = TextTokenizer(demo_directory)
    prompt = tokenizer.encode(WORDS)
    written = whole_model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )[0, len(prompt) :].tolist()
    device, cloud, exact, coarse = ways
    assert [way["text"] for way in (device, cloud, exact)] == [tokenizer.decode(written)] * 3
    assert [way["same_percent"] for way in (device, cloud, exact)] == [100] * 3
    assert (device["prompt_up"], device["token_down"], device["link_ms"]) == (0, 0, 0)
    assert cloud["prompt_up"] == len(WORDS.encode())
    assert (cloud["token_up"], cloud["link_ms"]) == (0, cloud["token_down"] / 1e3)  # streamed
    assert (exact["prompt_up"], exact["token_up"]) == (len(prompt) * HIDDEN * 4, HIDDEN * 4)
    assert coarse["token_down"] == HIDDEN + 2  # and a scale
    assert exact["link_ms"] == pytest.approx(5 + 2 * HIDDEN * 4 / 1e3)  # a byte a microsecond
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(steps) == len(ways) * NEW
    assert [s["token_id"] for s in steps[:NEW]] == written
    for step in steps:
        assert step["stage_ms"]["head"] > 0
        assert (step["stage_ms"]["encode"] > 0) == (step["way"] == "split")
        assert (step["stage_ms"]["tokenize"] > 0) == (step["step"] == 0)


@pytest.mark.parametrize("codec", ["fp32", "smallest"])
def test_an_answer_goes_on_from_captured_rows_without_the_prompt(
    codec: str, story: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "rows.safetensors"
    ways = run("--text", story, "--codec", codec, "--save-rows", kept)
    story_less = run("--from-rows", kept)
    assert story_less[0]["text"] == ways[-1]["text"]
    assert story_less[0]["codec"] == codec
    spoilt = load_file(kept)
    spoilt["head_kv"].mul_(-5)
    with_metadata = load_rows(kept)
    about = {"model": with_metadata.model, "span": with_metadata.span, "codec": codec}
    save_file(spoilt, kept, about)
    assert run("--from-rows", kept)[0]["text"] != ways[-1]["text"], "the KV is what tokens see"


def test_rows_of_another_cut_and_files_that_hold_none_are_refused(
    story: Path, tmp_path: Path, demo_directory: Path
) -> None:
    kept = tmp_path / "rows.safetensors"
    run("--text", story, "--codec", "fp32", "--save-rows", kept, "--span", "1:7")
    with pytest.raises(SettingsError, match=r"span 1-7 of the model .*, not of 2-6 of "):
        load_rows(kept).check(SplitModel(demo_directory).ends)
    with pytest.raises(CheckpointError, match=r"story\.txt holds no captured rows"):
        load_rows(story)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "from --text or --from-rows; expected one of them"),
        (["--from-rows", "x", "--codec", "int8"], "goes on with the codec of its rows"),
        (["--text", "README.md", "-n", "500"], "and 500 of an answer; the model has 512"),
    ],
)
def test_what_cannot_be_asked_of_a_split_is_said(options: list[str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        CliRunner().invoke(evaluate, ["split", "stories-llama", *options], catch_exceptions=False)
