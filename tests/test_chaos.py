"""The short form of `midspan chaos`: a fault every few seconds, every token compared."""

from __future__ import annotations

import json

import pytest
from forks import run_midspan


@pytest.mark.parametrize(
    ("duration_s", "every_s", "completed"),
    [(30, 1, 3), pytest.param(60, 2, 10, marks=pytest.mark.long)],
)
def test_a_pool_that_is_broken_all_the_time_changes_no_token(
    duration_s: int, every_s: int, completed: int
) -> None:
    done = run_midspan(
        "chaos", "--duration", str(duration_s), "--every", str(every_s), "--sessions", "6",
        "--workers", "3", "--seed", "3", "--json", timeout_s=200,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert done.returncode == 0, result
    assert result["sessions_completed"] > completed
    assert len(result["faults"]) == 18
    assert all(result["faults"].values()), result["faults"]
    wrong = ("sessions_failed", "tokens_different", "tokens_lost", "tokens_doubled")
    assert 0 < result["round_trips"] < 0.8 * result["tokens"]  # drafts were checked all the while
    assert {name: result[name] for name in wrong} == dict.fromkeys(wrong, 0)
