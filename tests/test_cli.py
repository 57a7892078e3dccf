"""The command line as users meet it: what it prints, and how it says what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from forks import error_line, run_midspan
from pools import PROMPTS, generate
from random_models import save_random_model
from transformers import LlamaConfig

from common.errors import BrokerUnavailable
from deploy.child import Child, midspan_command
from deploy.cli import midspan
from deploy.pool import LocalPool, PoolSettings
from edge_agent.commands import own_answer
from edge_agent.text.ends import ModelEnds
from edge_agent.text.generation import Generation
from edge_agent.text.session import Session
from edge_agent.text.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1)) as running:
        yield running


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory, demo_directory: Path) -> Path:
    """A model that no worker serves, with the demo model's tokenizer and of the same name."""
    directory = tmp_path_factory.mktemp("other") / "stories-llama"
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=8,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    save_random_model(config, directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((demo_directory / name).read_bytes())
    return directory


@pytest.mark.usefixtures("unforked")
def test_ask_streams_a_text_and_says_what_it_cost(pool: LocalPool) -> None:
    done = run_midspan("ask", PROMPTS[0], "--broker", pool.edge_endpoint, "-n", "20", "--stats")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 10
    for words in ("tokens/s", "bytes per token", "head", "network", "queue", "middle", "w1"):
        assert words in done.stderr


def test_an_answer_that_ctrl_c_ends_has_cost_something_too(
    pool: LocalPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Generation.stream

    def stream(generation: Generation) -> Iterator[str]:
        for piece in whole(generation):
            yield piece
            if len(generation.token_ids) == 6:
                raise KeyboardInterrupt

    monkeypatch.setattr(Generation, "stream", stream)
    monkeypatch.setattr(own_answer, "freeze_loaded_objects", lambda: None)  # this process lives on
    command = ["ask", PROMPTS[0], "--broker", pool.edge_endpoint, "--stats", "--threads", "1"]
    done = CliRunner().invoke(midspan, command)
    assert done.exit_code == 1
    assert done.stderr.startswith("what it cost")
    assert "6 new after" in done.stderr


def test_ask_prints_one_object_with_json(pool: LocalPool, demo_directory: Path) -> None:
    command = ["ask", "-", "--broker", pool.edge_endpoint, "-n", "12", "--json", "--span", "2-6"]
    answer = json.loads(run_midspan(*command, stdin=PROMPTS[0]).stdout)
    assert set(answer) == {"text", "token_ids", "stats"}
    assert len(answer["token_ids"]) == answer["stats"]["new_tokens"] == 12
    decoded = TextTokenizer(demo_directory).decode(answer["token_ids"])
    assert decoded.strip() == answer["text"].strip()


def test_ask_draws_as_the_checkpoint_says_unless_it_is_told_otherwise(
    pool: LocalPool, demo_directory: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in demo_directory.iterdir():
        if path.is_file() and path.name != "generation_config.json":
            (model / path.name).symlink_to(path)
    said = {"do_sample": True, "temperature": 0.8, "top_k": 30, "repetition_penalty": 1.6}
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **said}))

    def ask(*options: str) -> list[int]:
        command = ["ask", PROMPTS[0], "--broker", pool.edge_endpoint, "-n", "24", "--json"]
        tokens: list[int] = json.loads(run_midspan(*command, *options).stdout)["token_ids"]
        return tokens

    typed = ["-t", "0.8", "--top-k", "30", "--repetition-penalty", "1.6"]
    assert ask("--model", str(model), "--seed", "5") == ask(*typed, "--seed", "5")
    greedy = ["--model", str(model), "-t", "0", "--repetition-penalty", "1"]
    assert ask(*greedy) == ask() != ask("--model", str(model), "--seed", "5")


def test_status_shows_the_worker_as_a_table_and_as_json(pool: LocalPool) -> None:
    table = run_midspan("status", "--broker", pool.edge_endpoint).stdout
    assert "w1" in table
    assert re.search(r"stories-llama +2-6 +float32 +\w{16} +1 +0$", table, re.MULTILINE)
    assert f"broker {pool.edge_endpoint}, up " in table
    assert max(map(len, table.splitlines())) <= 80
    report = json.loads(run_midspan("status", "--broker", pool.edge_endpoint, "--json").stdout)
    assert [worker["worker_id"] for worker in report["workers"]] == ["w1"]


def test_an_unknown_model_lists_what_comes_with_midspan() -> None:
    line = error_line("ask", "hi", "--model", "gpt-9")
    assert "model 'gpt-9' is no directory" in line
    assert "stories-llama" in line


def test_a_wrong_checkpoint_folder_is_named(pool: LocalPool, tmp_path: Path) -> None:
    line = error_line("ask", "hi", "--model", str(tmp_path), "--broker", pool.edge_endpoint)
    assert f"{tmp_path / 'config.json'} does not exist" in line


def test_an_edges_span_out_of_range_is_named(pool: LocalPool) -> None:
    line = error_line("ask", "hi", "--span", "2-9", "--broker", pool.edge_endpoint)
    assert "span 2-9 is out of range: the model has 8 layers" in line


@pytest.mark.parametrize("prompt", ["", "   ", "-"])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    assert "the prompt is empty" in error_line("ask", prompt, stdin="\n")


def test_a_prompt_longer_than_the_context_says_both_lengths(pool: LocalPool) -> None:
    line = error_line("ask", "once " * 600, "--broker", pool.edge_endpoint)
    assert "tokens; stories-llama has a context of 512" in line


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--codec", "int9", "codec 'int9' is unknown; known are fp32, fp16, bf16, int8"),
        ("--dtype", "int4", "'int4' is not one of 'float32'"),
        ("--top-p", "0", "top-p is 0.0; expected more than 0"),
        ("-t", "-1", "temperature is -1.0"),
        ("-n", "-1", "-1 is not in the range 0 to 2^31"),
        ("--broker", "localhost", "--broker has value 'localhost'; expected tcp://HOST:PORT"),
    ],
)
def test_an_option_out_of_range_is_named(
    pool: LocalPool, option: str, value: str, words: str
) -> None:
    assert words in error_line("ask", "hi", "--broker", pool.edge_endpoint, option, value)


def test_a_broker_that_is_not_there_is_named() -> None:
    line = error_line("ask", "hi", "--broker", "tcp://127.0.0.1:1")
    assert "no broker answers at tcp://127.0.0.1:1" in line
    assert "midspan up" in line


def test_no_worker_for_the_model_says_at_once_what_is_served(
    pool: LocalPool, other_model: Path
) -> None:
    line = error_line("ask", "hi", "--model", str(other_model), "--broker", pool.edge_endpoint)
    assert "no worker serves 2-6 of the model with fingerprint" in line
    assert "being served: stories-llama 2-6 (fingerprint" in line


def test_no_worker_for_the_span_says_at_once_what_is_served(pool: LocalPool) -> None:
    line = error_line("ask", "hi", "--span", "1-7", "--broker", pool.edge_endpoint)
    assert "no worker serves 1-7" in line
    assert re.search("To serve it: `midspan worker --model .*stories-llama --span 1-7`", line)
    assert "being served: stories-llama 2-6" in line


def test_a_port_in_use_is_named(pool: LocalPool) -> None:
    line = error_line("broker", "--edge-endpoint", pool.edge_endpoint)
    assert f"--edge-endpoint {pool.edge_endpoint} cannot be bound: Address already in use" in line


@pytest.mark.usefixtures("unforked")
def test_a_span_out_of_range_is_named(pool: LocalPool) -> None:
    line = error_line("worker", "--span", "6-9", "--redis-url", pool.redis_url)
    assert "span 6-9 is out of range: the model has 8 layers" in line


def test_a_device_that_is_not_there_is_named(pool: LocalPool) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    line = error_line("worker", "--device", "cuda", "--redis-url", pool.redis_url)
    assert "device 'cuda' cannot be used" in line


@pytest.mark.usefixtures("unforked")
def test_up_starts_again_what_dies_and_drains_on_a_signal(tmp_path: Path) -> None:
    endpoints = [f"ipc://{tmp_path}/edges", f"ipc://{tmp_path}/workers"]
    command = midspan_command(
        "up", "--workers", "1", "--span", "1:-1",
        "--edge-endpoint", endpoints[0], "--worker-endpoint", endpoints[1],
    )  # fmt: skip
    up = Child("up", command, tmp_path)
    try:
        up.wait_for("ready: edges at")
        (worker,) = status_of(endpoints[0])["workers"]
        assert "1-7" in [service["part"] for service in worker["services"]]
        os.kill(worker["pid"], signal.SIGKILL)
        up.wait_for("w1 was killed by signal 9 (SIGKILL); starting w2")
        options = ["--broker", endpoints[0], "--span", "1:-1", "-n", "5", "--timeout", "30"]
        ask = run_midspan("ask", PROMPTS[0], *options)
        assert ask.returncode == 0, ask.stderr
    finally:
        up.stop()
    assert up.log_text().endswith("stopped\n")


def status_of(endpoint: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(
        run_midspan("status", "--broker", endpoint, "--json").stdout
    )
    return report


def test_a_broker_that_goes_away_is_not_said_to_have_the_step(demo_ends: ModelEnds) -> None:
    with LocalPool(PoolSettings(workers=1)) as dying:

        def harm(index: int, _: Session) -> None:
            if index == 3:
                assert dying.broker is not None
                dying.broker.kill()

        ids = TextTokenizer(demo_ends.directory).encode(PROMPTS[0])
        with pytest.raises(BrokerUnavailable, match="no broker answers"):
            generate(dying, demo_ends, ids, 9, on_token=harm, timeout_s=4)


def test_up_says_which_process_failed_and_why() -> None:
    line = error_line(
        "up", "--workers", "1", "--span", "6-99",
        "--edge-endpoint", "tcp://127.0.0.1:*", "--worker-endpoint", "tcp://127.0.0.1:*",
    )  # fmt: skip
    assert "w1 ended with exit code 1" in line
    assert "6-99" in line
