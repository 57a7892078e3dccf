"""The short form of `midspan chaos`: a fault every few seconds, every token compared."""

from __future__ import annotations

import json

from forks import run_midspan


def test_a_pool_that_is_broken_all_the_time_changes_no_token() -> None:
    done = run_midspan(
        "chaos", "--duration", "60", "--sessions", "6", "--workers", "3", "--seed", "3", "--json",
        timeout_s=200,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert done.returncode == 0, result
    assert result["sessions_completed"] > 10
    assert len(result["faults"]) == 18
    assert all(result["faults"].values()), result["faults"]
    wrong = ("sessions_failed", "tokens_different", "tokens_lost", "tokens_doubled")
    assert {name: result[name] for name in wrong} == dict.fromkeys(wrong, 0)
