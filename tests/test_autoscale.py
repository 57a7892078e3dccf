"""Pools that grow and shrink: real brokers, real workers that start and drain."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from forks import ROOT
from pools import PROMPTS, generate, reference_tokens
from waiting import wait_until

from deploy.child import Child, midspan_command
from deploy.pool import LocalPool, PoolSettings
from deploy.scaling.keeper import hold_options, kept_pool
from deploy.scaling.policy import ScalingSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session import Session
from edge_agent.text.tokenizer import TextTokenizer
from loadtest.observed import SCALED

TOKENS = 24
FROM_ZERO = PoolSettings(workers=0, broker_options=hold_options(0))


def count_known(pool: LocalPool) -> int:
    client = pool.connect()
    try:
        return len(client.status()["workers"])
    finally:
        client.close()


def test_a_request_to_an_empty_pool_waits_for_the_worker_that_it_brings_and_the_last_one_goes(
    demo_ends: ModelEnds, whole_model: torch.nn.Module
) -> None:
    tokenizer = TextTokenizer(demo_ends.directory)
    (want,) = reference_tokens(whole_model, tokenizer, PROMPTS[:1], TOKENS)
    prompt = tokenizer.encode(PROMPTS[0])
    with kept_pool(FROM_ZERO, ScalingSettings(0, 2, 0.5, 2.0)) as pool:
        assert pool.workers == {}
        tokens, _ = generate(pool, demo_ends, prompt, TOKENS)
        assert tokens == want
        wait_until(lambda: not pool.workers and count_known(pool) == 0)
        tokens, _ = generate(pool, demo_ends, prompt, TOKENS)
        assert tokens == want


@pytest.mark.long
def test_a_session_outlives_the_pool_that_shrinks_to_nothing_under_it(
    demo_ends: ModelEnds, whole_model: torch.nn.Module
) -> None:
    tokenizer = TextTokenizer(demo_ends.directory)
    (want,) = reference_tokens(whole_model, tokenizer, PROMPTS[1:2], TOKENS)
    with kept_pool(FROM_ZERO, ScalingSettings(0, 2, 0.5, 2.0)) as pool:

        def wait_for_nobody(count: int, _: Session) -> None:
            if count == TOKENS // 2:
                wait_until(lambda: count_known(pool) == 0)

        prompt = tokenizer.encode(PROMPTS[1])
        tokens, session = generate(pool, demo_ends, prompt, TOKENS, on_token=wait_for_nobody)
    assert tokens == want
    assert len(session.stats.tokens_by_worker) == 2
    assert session.stats.rows_replayed == 0


@pytest.mark.long
@pytest.mark.usefixtures("unforked")
def test_a_pool_grows_with_its_load_and_shrinks_again_without_a_row_replayed(
    tmp_path: Path,
) -> None:
    """Many sessions at first, few later; what computes is a stand-in, all else is real."""
    trace = tmp_path / "trace.jsonl"
    due = [0.1 * index for index in range(80)] + [10.0 + 2.0 * index for index in range(40)]
    lines = [json.dumps({"at": at, "prompt_tokens": 16, "tokens": 16}) for at in due]
    trace.write_text("\n".join(lines))
    command = midspan_command(
        "loadtest", "--synthetic", "400", "--workers", "1..4", "--trace", str(trace), "--json"
    )
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert (report["failed"], report["tokens_wrong"]) == (0, 0)
    moves = [
        tuple(map(int, re.findall(r"(\d+) -> (\d+)", event["what"])[0]))
        for event in report["events"]
        if event["what"].startswith(SCALED)
    ]
    assert any(before < after for before, after in moves)
    assert any(before > after for before, after in moves)
    assert report["takeovers"] > 0
    assert report["replays"] == {"sessions": 0, "rows": 0}


def test_autoscale_starts_a_users_command_for_each_worker_and_drains_them_at_its_end(
    demo_ends: ModelEnds, whole_model: torch.nn.Module
) -> None:
    tokenizer = TextTokenizer(demo_ends.directory)
    (want,) = reference_tokens(whole_model, tokenizer, PROMPTS[:1], TOKENS)
    with LocalPool(FROM_ZERO) as pool:
        started = midspan_command(
            "worker", "--broker", pool.worker_endpoint, "--redis-url", pool.redis_url,
            "--threads", "1",
        )  # fmt: skip
        command = midspan_command(
            "autoscale", "--broker", pool.edge_endpoint, "--workers", "0..1", "--", *started
        )
        autoscaler = Child("autoscale", command, pool.directory)
        tokens, session = generate(pool, demo_ends, tokenizer.encode(PROMPTS[0]), TOKENS)
        assert tokens == want
        (name,) = session.stats.tokens_by_worker
        assert f"0 -> 1 workers: the pool could use 1.0; starting {name}" in autoscaler.log_text()
        autoscaler.stop()
        assert autoscaler.log_text().splitlines()[-2:] == ["draining …", "stopped"]
        wait_until(lambda: count_known(pool) == 0)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["no-such-program"], "Error: 'no-such-program' cannot be run: No such file or directory"),
        (["sh", "-c", "echo no GPU here; exit 3"], "no GPU here; 5 ended in a minute, giving up"),
    ],
)
def test_a_command_that_starts_no_worker_is_given_up_with_its_last_words(
    command: list[str], words: str
) -> None:
    with LocalPool(PoolSettings(workers=0)) as pool:
        autoscale = midspan_command(
            "autoscale", "--broker", pool.edge_endpoint, "--workers", "1..2", "--", *command
        )
        child = Child("autoscale", autoscale, pool.directory)
        child.wait_for(words)
        wait_until(lambda: not child.is_running())


def test_a_pool_is_looked_after_though_nobody_reads_about_it_any_more(tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def read_pids() -> list[int]:
        return [int(word) for word in pids.read_text().split()] if pids.exists() else []

    with LocalPool(PoolSettings(workers=0)) as pool:
        command = midspan_command(
            "autoscale", "--broker", pool.edge_endpoint, "--workers", "1..1", "--",
            "sh", "-c", f"echo $$ >> {pids}; exec sleep 1000",
        )  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as autoscaler:
            try:
                wait_until(lambda: len(read_pids()) == 1)
                assert autoscaler.stdout is not None
                autoscaler.stdout.close()
                for count in (1, 2):
                    os.kill(read_pids()[-1], signal.SIGKILL)
                    wait_until(lambda wanted=count + 1: len(read_pids()) == wanted)
            finally:
                autoscaler.terminate()


def test_a_step_that_nobody_serves_is_refused_after_the_time_for_which_it_is_held(
    demo_ends: ModelEnds,
) -> None:
    from common.errors import NoWorker

    tokenizer = TextTokenizer(demo_ends.directory)
    settings = PoolSettings(workers=0, broker_options=["--hold", "4"])
    with LocalPool(settings) as pool:
        began_at = time.monotonic()
        with pytest.raises(NoWorker, match="there are no workers at all"):
            generate(pool, demo_ends, tokenizer.encode(PROMPTS[0]), TOKENS)
        assert time.monotonic() - began_at >= 4
