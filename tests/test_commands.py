"""What commands say and do around the main job: what to type next, who is in the way."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from common.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL
from common.listeners import name_listener
from common.settings import WORKER_ENDPOINT
from deploy.child import Child, midspan_command
from deploy.embedded_redis import EmbeddedRedis, choose_port
from deploy.hints import DEFAULT_REDIS, suggest_ask, suggest_worker
from deploy.pool import LocalPool, PoolSettings


def run_midspan(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        midspan_command(*arguments), input=stdin, capture_output=True, timeout=120, check=False
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def error_line(*arguments: str, stdin: bytes = b"") -> str:
    """The one line that a command says when it cannot do what it was asked."""
    done = run_midspan(*arguments, stdin=stdin)
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def up_arguments(directory: Path) -> list[str]:
    endpoints = ["--edges", f"ipc://{directory}/edges"]
    endpoints += ["--worker-endpoint", f"ipc://{directory}/workers"]
    return ["up", "--model", "stories-llama", *endpoints]


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1)) as running:
        yield running


def test_redis_passwords_are_in_no_argument_of_a_pools_processes(
    redis_server: EmbeddedRedis,
) -> None:
    server = redis.Redis.from_url(redis_server.url)
    server.config_set("requirepass", "open-sesame")
    url = redis_server.url.replace("unix://", "unix://:open-sesame@")
    try:
        with LocalPool(PoolSettings(workers=1, model="stories-llama", redis_url=url)) as pool:
            pool.wait_for_workers(1)
            for child in pool.workers.values():
                assert b"open-sesame" not in Path(f"/proc/{child.pid}/cmdline").read_bytes()
    finally:
        redis.Redis.from_url(url).config_set("requirepass", "")


def test_a_port_in_use_is_named_with_the_process_that_holds_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        line = error_line("broker", "--edges", f"tcp://127.0.0.1:{holder.getsockname()[1]}")
    assert "cannot be bound: Address already in use" in line
    assert f"in use by process {os.getpid()} (" in line


def test_a_brokers_address_is_named_as_held_by_a_broker(pool: LocalPool) -> None:
    assert pool.broker is not None
    words = f"process {pool.broker.pid} (midspan broker)"
    assert words in error_line("broker", "--edges", pool.edge_endpoint)
    assert words in error_line("up", "--edges", pool.edge_endpoint)


def test_a_listener_that_cannot_be_found_is_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert name_listener(f"tcp://127.0.0.1:{port}") == ""


def test_a_worker_beside_up_joins_with_the_command_that_up_prints(tmp_path: Path) -> None:
    up = Child("up", midspan_command(*up_arguments(tmp_path), "--workers", "1"), tmp_path)
    try:
        command = up.wait_for("one more worker: ").partition(": ")[2]
        assert "--redis-url unix:" not in command
        program, *arguments = shlex.split(command)
        assert program == "midspan"
        worker = Child("more", midspan_command(*arguments, "--id", "more"), tmp_path)
        try:
            worker.wait_for("worker more ready")
            edges = f"ipc://{tmp_path}/edges"
            give_up_at = time.monotonic() + 30
            while "more" not in run_midspan("status", "--broker", edges).stdout:
                assert time.monotonic() < give_up_at
        finally:
            worker.stop()
    finally:
        up.stop()


def test_the_text_that_up_suggests_to_ask_for_is_written(tmp_path: Path) -> None:
    keys = tmp_path / "my keys"
    arguments = [*up_arguments(tmp_path), "--workers", "1", "--span", "1-7", "--keys", str(keys)]
    up = Child("up", midspan_command(*arguments), tmp_path)
    try:
        _, *suggested = shlex.split(up.wait_for("try: midspan ask").partition(": ")[2])
        assert "1:7" in suggested
        done = run_midspan(*suggested, "-n", "5")
        assert done.returncode == 0, done.stderr
        assert "Redis at unix://" in up.log_text()  # keys, so no port that anybody here can read
    finally:
        up.stop()


def test_a_worker_need_not_say_what_is_the_default() -> None:
    settings = PoolSettings(model=DEMO_TEXT_MODEL, image_model=DEMO_IMAGE_MODEL)
    assert suggest_worker(settings, WORKER_ENDPOINT, DEFAULT_REDIS) == "midspan worker"
    assert suggest_ask(settings, "tcp://*:5555") == "midspan ask 'Once upon a time' --stats"


def test_a_suggested_worker_is_not_told_the_password() -> None:
    line = suggest_worker(PoolSettings(), WORKER_ENDPOINT, "redis://:sesame@10.0.0.1:6379/0")
    assert line == "MIDSPAN_REDIS_URL=… midspan worker"


def test_a_redis_port_in_use_is_not_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = holder.getsockname()[1]
        assert choose_port(taken) != taken
    assert choose_port(taken) == taken
