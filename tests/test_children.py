"""Processes that midspan starts: their last words, and their end with all that they started."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import error_line
from waiting import wait_until

from deploy.child import Child, ChildGroup, midspan_command, stop_all
from deploy.pool import LocalPool, PoolSettings
from deploy.scaling.command_fleet import CommandFleet

FOR_EVER = "while :; do sleep 0.05; done"
DEAF = f"trap '' TERM; echo deaf; {FOR_EVER}"


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def read_pids(file: Path) -> list[int]:
    return [int(word) for word in file.read_text().split()] if file.exists() else []


def is_alive(pid: int) -> bool:
    """A process that has ended and was not yet waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def nobody(pids: list[int]) -> Callable[[], bool]:
    return lambda: not any(map(is_alive, pids))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kill -9 $$", "it was killed by signal 9 (SIGKILL)"),
        ("kill -40 $$", "it was killed by signal 40 (Real-time signal 6)"),
        ("exit 3", "it ended with exit code 3: it said nothing"),
        ("echo one; echo; echo Error: two; exit 1", "it ended with exit code 1: two"),
        ("yes | head -c 1000000; echo last; exit 1", "it ended with exit code 1: last"),
    ],
)
def test_last_words_say_how_a_process_ended(tmp_path: Path, script: str, words: str) -> None:
    child = Child("it", shell(script), tmp_path)
    wait_until(lambda: not child.is_running())
    assert child.last_words() == words


def test_those_that_do_not_hear_sigterm_are_killed_together(tmp_path: Path) -> None:
    children = [Child(f"deaf-{index}", shell(DEAF), tmp_path) for index in range(3)]
    for child in children:
        child.wait_for("deaf")
    stop_all(children, timeout_s=0.2)
    assert {child.last_words().partition(" was ")[2] for child in children} == {
        "killed by signal 9 (SIGKILL)"
    }


def test_what_a_command_has_started_ends_with_it(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    with CommandFleet(shell(f"sleep 1000 & echo $! > {file}; wait")) as fleet:
        fleet.start_worker()
        wait_until(lambda: bool(read_pids(file)))
    wait_until(nobody(read_pids(file)))


def test_what_a_command_has_started_may_finish_when_it_is_told_to_end(tmp_path: Path) -> None:
    ready, done = tmp_path / "ready", tmp_path / "done"
    worker = f"(trap 'sleep 0.3; touch {done}; exit' TERM; touch {ready}; {FOR_EVER})"
    with CommandFleet(shell(f"{worker} & wait")) as fleet:
        fleet.start_worker()
        wait_until(ready.exists)
    assert done.exists()


def test_what_deaf_commands_have_started_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    child = ChildGroup("it", shell(f'sh -c "{DEAF}" & echo $! > {file}; {DEAF}'), tmp_path)
    child.wait_for("deaf")
    wait_until(lambda: child.log_text().count("deaf") == 2 and bool(read_pids(file)))
    stop_all([child], timeout_s=0.2)
    wait_until(nobody([child.pid, *read_pids(file)]))


def test_a_command_that_ends_and_leaves_others_behind_leaves_none(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    with CommandFleet(shell(f"sleep 1000 & echo $! >> {file}")) as fleet:
        for count in (1, 2, 3, 4):
            fleet.start_worker()
            wait_until(lambda: bool(fleet.look_after(0.0)))
            assert len(read_pids(file)) == count
    wait_until(nobody(read_pids(file)))


def test_the_command_of_autoscale_keeps_its_options(tmp_path: Path) -> None:
    said = tmp_path / "said"
    script = tmp_path / "worker"
    script.write_text(
        f'#!/bin/sh\necho "$@" > {said}.draft; mv {said}.draft {said}; exec sleep 1000\n'
    )
    script.chmod(0o755)
    with LocalPool(PoolSettings(workers=0)) as pool:
        command = midspan_command(
            "autoscale", "--broker", pool.edge_endpoint, "--workers", "1..1",
            str(script), "--broker", "tcp://127.0.0.1:9", "--workers", "x", "-n",
        )  # fmt: skip
        autoscaler = Child("autoscale", command, pool.directory)
        try:
            autoscaler.wait_for("starting auto-")
            wait_until(said.exists)
        finally:
            autoscaler.stop()
    assert said.read_text() == "--broker tcp://127.0.0.1:9 --workers x -n\n"


def test_an_option_that_autoscale_does_not_have_is_no_command() -> None:
    options = ["--workers", "0..1", "--cooldown", "5", "--", os.devnull]
    assert "No such option" in error_line("autoscale", *options)
    assert "--cooldown" in error_line("autoscale", *options)
