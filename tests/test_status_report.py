"""What `midspan status` says of a report: in 80 columns, and nothing of what is not the case."""

from __future__ import annotations

from typing import Any

import click
import pytest

from broker.book import COUNTERS
from deploy.status_report import TROUBLES, format_report

BROKER = "tcp://127.0.0.1:5555"


def worker(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "worker_id": name, "state": "ready", "in_flight": 12, "capacity": 64, "warm_sessions": 130,
        "steps_done": 1_234_567,
        "stats": {"warm_bytes": 987_654_321, "store_up": True},
        "services": [
            {"name": "a-model-with-a-very-long-name-of-its-own", "model": "f" * 16, "part": "12-68",
             "precision": "bfloat16"},
            {"name": "landscapes-sdxl", "model": "e" * 16, "part": "inner", "precision": "float32"},
        ],
    } | changes  # fmt: skip


def report(*workers: dict[str, Any], **counters: int) -> dict[str, Any]:
    return {
        "uptime_s": 7300.0, "workers": list(workers), "sessions": 1, "steps_in_flight": 3,
        "queues": [{"model": "d" * 16, "part": "2-6", "precision": "float32", "queued": 9}],
        "counters": dict.fromkeys(COUNTERS, 0) | {"answers": 5} | counters,
        "refused_connections": {}, "ended_connections": 0, "bad_messages": 0,
    }  # fmt: skip


def test_it_fits_in_80_columns() -> None:
    text = format_report(report(worker("w-1234abcd"), worker("a-host-with-a-long-name-0")), BROKER)
    assert max(map(len, click.unstyle(text).splitlines())) <= 80
    assert "broker tcp://127.0.0.1:5555, up 2 h\n2 workers, 1 session, 9 steps queued" in text


@pytest.mark.parametrize("said", ["much", float("nan"), float("inf"), 2**64 - 1, True])
def test_a_worker_that_says_odd_things_of_itself_does_not_hide_the_others(said: Any) -> None:
    odd = worker("\x1b[2J\r\nodd", stats={"warm_bytes": said, "store_up": True})
    lines = click.unstyle(format_report(report(odd, worker("w1")), BROKER)).splitlines()
    assert sum(line.startswith(("?[2J??odd", "w1")) for line in lines) == 2


def test_a_queue_that_nobody_serves_is_shown() -> None:
    text = click.unstyle(format_report(report(worker("w1")), BROKER))
    (line,) = [line for line in text.splitlines() if "d" * 16 in line]
    assert line.split() == ["2-6", "float32", "d" * 16, "0", "9"]


def test_troubles_are_told_once_there_are_any() -> None:
    assert "since the broker began" not in format_report(report(), BROKER)
    text = format_report(report(dead_workers=2, refused=1_000), BROKER)
    assert "  2 workers died or fell silent\n  1,000 steps refused" in text


def test_a_worker_without_its_store_is_red() -> None:
    down = worker("w2", stats={"store_up": False})
    text = format_report(report(worker("w1"), down), BROKER)
    red = [line for line in text.splitlines() if line.startswith("\x1b[31m")]
    assert len(red) == 1
    assert "w2" in red[0]
    assert "The store of w2 is down" in text


@pytest.mark.parametrize("name", [n for n in COUNTERS if n not in TROUBLES])
def test_what_is_no_trouble_is_not_told_as_one(name: str) -> None:
    assert name in ("steps", "answers", "cancelled")
