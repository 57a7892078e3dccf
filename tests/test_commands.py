"""What commands say and do around the main job: what to type next, who is in the way."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from forks import error_line, run_midspan

from common.console.listeners import name_listener
from common.settings import WORKER_ENDPOINT
from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL
from deploy.child import Child, midspan_command
from deploy.embedded_redis import EmbeddedRedis, choose_port
from deploy.hints import DEFAULT_REDIS, suggest_ask, suggest_worker
from deploy.pool import LocalPool, PoolSettings


def up_arguments(directory: Path) -> list[str]:
    endpoints = ["--edge-endpoint", f"ipc://{directory}/edges"]
    endpoints += ["--worker-endpoint", f"ipc://{directory}/workers"]
    return ["up", "--model", "stories-llama", *endpoints]


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1)) as running:
        yield running


@pytest.mark.usefixtures("unforked")  # whose arguments are the fork server's
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
        line = error_line("broker", "--edge-endpoint", f"tcp://127.0.0.1:{holder.getsockname()[1]}")
    assert "cannot be bound: Address already in use" in line
    assert f"in use by process {os.getpid()} (" in line


def test_an_address_of_another_machine_is_not_blamed_on_another_broker() -> None:
    line = error_line("broker", "--insecure", "--edge-endpoint", "tcp://192.0.2.1:5555")
    assert "--edge-endpoint tcp://192.0.2.1:5555 cannot be bound: " in line
    assert line.endswith("; expected one of this machine's")


def test_a_brokers_address_is_named_as_held_by_a_broker(pool: LocalPool) -> None:
    assert pool.broker is not None
    words = f"process {pool.broker.pid} (midspan broker)"
    assert words in error_line("broker", "--edge-endpoint", pool.edge_endpoint)
    assert words in error_line("up", "--edge-endpoint", pool.edge_endpoint)


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
        assert "1-7" in suggested
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


def test_a_prompt_that_is_not_utf_8_is_named(pool: LocalPool) -> None:
    at_pool = ["--broker", pool.edge_endpoint]
    line = error_line("ask", "-", *at_pool, stdin=b"a caf\xe9")
    assert "the prompt on stdin is not UTF-8: byte 5 is 0xe9" in line
    typed = os.fsdecode(b"a caf\xe9")
    assert "the prompt is not UTF-8 at character 5" in error_line("ask", typed, *at_pool)
    assert "--stop is not UTF-8" in error_line("ask", "hi", "--stop", typed, *at_pool)
    assert "the prompt is not UTF-8" in error_line("image", typed, *at_pool)
    assert "--negative is not UTF-8" in error_line("image", "a hill", "--negative", typed, *at_pool)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("'--seed': 18446744073709551616 is not in the range", ["ask", "hi", "--seed", str(2**64)]),
        ("'--seed'", ["image", "a hill", "--seed", str(-(2**63) - 1)]),
        ("'--seed'", ["eval", "image", "--seed", str(2**64)]),
        ("'--threads': 100000 is not in the range 1<=x<=", ["ask", "hi", "--threads", "100000"]),
        ("'--threads'", ["worker", "--threads", "100000"]),
        ("'--threads'", ["up", "--threads", "100000"]),
        ("'--capacity'", ["worker", "--capacity", "0"]),
        ("'--cache-mb'", ["worker", "--cache-mb", "-1"]),
        ("'--heartbeat-ms'", ["worker", "--heartbeat-ms", str(10**30)]),
        ("'--max-queued'", ["broker", "--max-queued", str(10**30)]),
        ("'--every': nan is not a number", ["chaos", "--every", "nan"]),
        ("'--window': 0 is not in the range", ["calibrate", "m", "--text", "t", "--window", "0"]),
        ("'--window'", ["eval", "codec", "m", "--text", "t", "--window", "0"]),
        ("--timeout is 1e+300", ["ask", "hi", "--timeout", "1e300"]),
        ("--size is '99999999x8'; expected at most", ["image", "a hill", "--size", "99999999x8"]),
        ("--size is '" + "9" * 5000, ["image", "a hill", "--size", "9" * 5000]),
        ("temperature is 1e-320", ["ask", "hi", "-t", "1e-320"]),
        ("repetition penalty is inf", ["ask", "hi", "--repetition-penalty", "inf"]),
    ],
)
def test_a_number_out_of_bounds_is_named(words: str, arguments: list[str]) -> None:
    assert words in error_line(*arguments)


def test_a_file_that_cannot_be_written_is_named_before_the_work(
    tmp_path: Path, demo_directory: Path
) -> None:
    no_directory = tmp_path / "file"
    no_directory.touch()
    text = tmp_path / "text"
    text.write_text("Once upon a time. " * 20)
    evaluation = ["eval", "codec", str(demo_directory), "--text", str(text)]
    for arguments in (
        [*evaluation, "--csv", str(no_directory / "a.csv")],
        [*evaluation, "--plot", str(no_directory / "a.png")],
        ["calibrate", str(demo_directory), "--text", str(text), "-o", str(no_directory / "a")],
        ["image", "a hill", "-o", str(no_directory / "a.png")],
        ["image", "a hill", "-o", str(tmp_path / "a.png"), "--save-noise", str(no_directory / "a")],
        ["demo", "-o", str(no_directory / "a.png")],
    ):
        done = run_midspan(*arguments)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()  # no progress bar has begun
        assert line.startswith(f"Error: {no_directory}/a")
        assert "cannot be written" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "text"]


@pytest.mark.long
def test_the_demo_drafts_as_ask_does(tmp_path: Path) -> None:
    said = run_midspan("demo", "-o", str(tmp_path / "a.png")).stdout
    (trips,) = [line for line in said.splitlines() if line.startswith("round trips")]
    each = re.search(r"([0-9.]+) tokens each", trips)
    assert each is not None
    assert float(each[1]) > 1.5
    assert "tokens equal those of an undisturbed run" in said
    assert "the picture equals that of an undisturbed run" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(pool: LocalPool) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            midspan_command("status", "--broker", pool.edge_endpoint),
            stdout=full, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert line == "Error: the output cannot be written: No space left on device"


def test_a_calibrated_codec_for_images_is_not_told_to_use_an_option_that_is_not_there() -> None:
    line = error_line("image", "a hill", "--codec", "compact")
    assert "codec 'compact' is calibrated on a language model and does not go with images" in line


def test_zero_tokens_are_not_blamed_on_the_text(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Once upon a time.")
    for command in (["calibrate", "m"], ["eval", "codec", "m"]):
        assert "'--tokens': 0" in error_line(*command, "--text", str(text), "--tokens", "0")
    for command in ("chaos", "demo"):
        assert "'--max-new-tokens': 0" in error_line(command, "-n", "0")


@pytest.mark.parametrize("command", ["broker", "up"])
def test_a_bare_port_is_no_address(command: str) -> None:
    line = error_line(command, "--edge-endpoint", "7301")
    assert line == "Error: --edge-endpoint has value '7301'; expected tcp://HOST:PORT"


def test_options_that_do_nothing_are_said(pool: LocalPool) -> None:
    ask = ["ask", "hi", "--broker", pool.edge_endpoint, "-n", "1"]
    done = run_midspan(*ask, "--top-k", "5", "--seed", "0")
    assert "warning: --top-k and --seed do nothing at temperature 0" in done.stderr
    assert "warning" not in run_midspan(*ask).stderr
    assert "warning" not in run_midspan(*ask, "--top-k", "5", "-t", "1").stderr
    assert "--stop is empty" in error_line(*ask, "--stop", "")


def test_a_negative_prompt_without_guidance_is_said_to_do_nothing() -> None:
    image = ["image", "a hill", "--negative", "snow", "--broker", "tcp://127.0.0.1:1"]
    words = "warning: --negative does nothing with --guidance 1;"
    assert words in run_midspan(*image, "--guidance", "1").stderr
    assert "warning" not in run_midspan(*image).stderr


def test_image_reads_its_prompt_from_stdin_as_ask_does() -> None:
    assert "the prompt is empty" in error_line("image", "-", stdin=b" \n")
    assert "stdin is not UTF-8" in error_line("image", "-", stdin=b"\xff")
