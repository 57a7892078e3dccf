"""`midspan ask` beside a running `midspan serve`: the same text, without a model of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fastapi import FastAPI
from forks import ROOT, error_line, run_midspan
from pools import PROMPTS

from common.errors import MidspanError
from deploy.child import Child, midspan_command
from deploy.cli import midspan
from deploy.pool import LocalPool, PoolSettings
from edge_agent.commands.codec_options import CodecChoice
from edge_agent.commands.connection_options import Connection
from edge_agent.commands.draft_options import DraftChoice
from edge_agent.commands.question import Means, Question, describe_source
from edge_agent.commands.served_answer import NotServed, ServedAnswer, make_request
from edge_agent.server.announcement import (
    SERVES,
    Announcement,
    announced,
    describe_process,
    list_running,
)
from edge_agent.server.gate import Drain
from edge_agent.server.running import DrainingServer, bind
from edge_agent.text.sampling import SamplingSettings

SAMPLED = ["-t", "0.9", "--top-k", "40", "--top-p", "0.95", "--repetition-penalty", "1.1",
           "--seed", "11"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of a user who has no other serve running."""
    directory = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(directory))
        yield directory


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1)) as running:
        yield running


def start_serve(pool: LocalPool, directory: Path, *options: str) -> tuple[Child, str]:
    command = midspan_command(
        "serve", "--port", "0", "--threads", "1", "--broker", pool.edge_endpoint, *options
    )
    child = Child("serve", command, directory)
    try:
        return child, child.wait_for("serving ").rpartition(" at ")[2]
    except BaseException:
        child.stop()
        raise


@pytest.fixture(scope="module")
def serve(pool: LocalPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    child, url = start_serve(pool, tmp_path_factory.mktemp("serve"))
    yield url
    child.stop()


def ask(pool: LocalPool, *options: str) -> dict[str, Any]:
    done = run_midspan(
        "ask", PROMPTS[0], "--broker", pool.edge_endpoint, "--threads", "1", "--json", *options
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize(
    "options",
    [["-n", "30"], ["-n", "300"], [*SAMPLED, "-n", "40"], [*SAMPLED, "--stop", "the"]],
)
def test_a_serve_prints_what_an_engine_of_its_own_would(
    pool: LocalPool, serve: str, options: list[str]
) -> None:
    served, own = ask(pool, *options), ask(pool, *options, "--no-serve")
    assert served["stats"].pop("served_by") == serve
    assert "served_by" not in own["stats"]
    assert (served["text"], served["token_ids"]) == (own["text"], own["token_ids"])
    assert set(served["stats"]) == set(own["stats"])
    same = ["prompt_tokens", "new_tokens", "finish_reason"]
    if "--stop" not in options:  # how much was computed behind it depends on what was guessed
        same.append("tokens_by_worker")
    assert [served["stats"][name] for name in same] == [own["stats"][name] for name in same]


def test_a_text_is_streamed_with_what_it_cost(pool: LocalPool, serve: str) -> None:
    options = ["ask", PROMPTS[1], "--broker", pool.edge_endpoint, "-n", "12", "--stats"]
    served, own = run_midspan(*options), run_midspan(*options, "--no-serve")
    assert served.stdout == own.stdout
    assert "12 new after" in served.stderr
    assert re.search(f"^served by +{serve}$", served.stderr, re.MULTILINE)


def test_neither_torch_nor_transformers_is_imported(pool: LocalPool, serve: str) -> None:
    script = f"""
import sys
from deploy.cli import midspan
midspan(["ask", "Once", "--broker", {pool.edge_endpoint!r}, "-n", "3"], standalone_mode=False)
sys.exit(bool({{"torch", "transformers", "numpy", "fastapi"}} & set(sys.modules)))
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_a_serve_is_found_without_the_address_of_its_pool(serve: str) -> None:
    done = run_midspan("ask", "Once", "-n", "3", "--json")
    assert json.loads(done.stdout)["stats"]["served_by"] == serve


def test_what_no_model_could_take_is_said_in_the_same_words(pool: LocalPool, serve: str) -> None:
    command = ["ask", "once " * 600, "--broker", pool.edge_endpoint]
    line = error_line(*command)
    assert "tokens; stories-llama has a context of 512" in line
    assert line == error_line(*command, "--no-serve")


def test_of_two_serves_the_one_that_fits_is_asked(
    pool: LocalPool, serve: str, tmp_path: Path
) -> None:
    exact, url = start_serve(pool, tmp_path, "--codec", "fp32")
    try:
        assert ask(pool, "-n", "3", "--codec", "fp32")["stats"]["served_by"] == url
        assert ask(pool, "-n", "3")["stats"]["served_by"] == serve
        assert "served_by" not in ask(pool, "-n", "3", "--codec", "fp16")["stats"]
    finally:
        exact.stop()
    assert [each.url for each in list_running()] == [serve]


def test_a_serve_with_an_api_key_is_asked_with_it(pool: LocalPool, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sesame\n")
    options = ["--codec", "bf16", "--api-key-file", str(keys), "--host", "0.0.0.0"]
    child, url = start_serve(pool, tmp_path, *options)
    try:
        asked = ask(pool, "-n", "3", "--codec", "bf16")["stats"]["served_by"]
        assert asked == url.replace("0.0.0.0", "127.0.0.1")
        (file,) = SERVES.expanduser().glob(f"{child.pid}.json")
        assert file.stat().st_mode & 0o777 == 0o600
        for directory in (file.parent, file.parent.parent):
            assert directory.stat().st_mode & 0o777 == 0o700
    finally:
        child.stop()
    assert not file.exists()


def test_a_serve_that_was_killed_is_not_waited_for(pool: LocalPool, tmp_path: Path) -> None:
    child, _ = start_serve(pool, tmp_path, "--codec", "fp16")
    child.kill()
    (file,) = SERVES.expanduser().glob(f"{child.pid}.json")
    assert "served_by" not in ask(pool, "-n", "3", "--codec", "fp16")["stats"]
    assert not file.exists()


def test_a_serve_that_hangs_is_not_waited_for(pool: LocalPool, tmp_path: Path) -> None:
    child, _ = start_serve(pool, tmp_path, "--codec", "fp16", "--timeout", "100000")
    try:
        child.signal(signal.SIGSTOP)
        assert "served_by" not in ask(pool, "-n", "3", "--codec", "fp16")["stats"]
    finally:
        child.signal(signal.SIGCONT)
        child.stop()


def test_neither_prompt_nor_key_goes_to_somebody_else_who_has_the_port(
    demo_directory: Path,
) -> None:
    said = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            link, _ = listener.accept()
            with link:
                while data := link.recv(4096):
                    said.extend(data)
                    link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        other = threading.Thread(target=answer)
        other.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        announcement = replace(announce(means(demo_directory)), url=url, api_key="sesame")
        with pytest.raises(NotServed, match="takes no questions"):
            ServedAnswer(announcement, Question("a secret", 5, SamplingSettings(), ()))
        other.join()
    assert b"/health" in said
    assert b"secret" not in said
    assert b"sesame" not in said


@pytest.mark.parametrize("url", ["", "http://[", "http://127.0.0.1:99999/v1", "http://a b:1/v1"])
def test_an_address_that_is_none_is_not_asked(demo_directory: Path, url: str) -> None:
    announcement = replace(announce(means(demo_directory)), url=url)
    with pytest.raises(NotServed):
        ServedAnswer(announcement, Question("hi", 5, SamplingSettings(), ()))


def test_what_a_serve_says_of_itself_goes_before_its_port_does() -> None:
    listener = bind("127.0.0.1", 0)
    address = listener.getsockname()
    holders: list[bool] = []

    def on_end() -> None:
        with contextlib.closing(socket.create_connection(address)):
            holders.append(True)

    drain = Drain(is_asked=True)
    DrainingServer(FastAPI(), drain, on_end=on_end).run([listener])
    assert holders == [True]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_where_no_broker_answers_the_reason_of_the_serve_is_said_too(demo_directory: Path) -> None:
    broker = "tcp://127.0.0.1:9"
    asked = means(demo_directory, connection=Connection((broker,), None, None))
    with announced(announce(asked)):
        line = error_line("ask", "hi", "--broker", broker)
    assert f"no broker answers at {broker}" in line
    assert "the serve at http://127.0.0.1:1/v1 does not answer, either: " in line
    assert "Connection refused" in line


def test_a_serve_that_ends_in_the_middle_is_named(pool: LocalPool, tmp_path: Path) -> None:
    child, url = start_serve(pool, tmp_path, "--codec", "fp16")
    worker = next(iter(pool.workers.values()))
    try:
        (found,) = [each for each in list_running() if each.url == url]
        answer = ServedAnswer(found, Question(PROMPTS[0], 400, SamplingSettings(), ()))
        pieces = answer.stream()
        assert next(pieces) is not None
        worker.signal(signal.SIGSTOP)  # or all of it might be on its way already
        child.kill()
        with pytest.raises(MidspanError, match="ended in the middle of the answer"):
            list(pieces)
    finally:
        worker.signal(signal.SIGCONT)
        child.stop()


def test_an_answer_that_ctrl_c_ends_has_cost_something_too(
    pool: LocalPool, serve: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ServedAnswer.stream

    def stream(answer: ServedAnswer) -> Iterator[str]:
        for piece in whole(answer):
            yield piece
            if len(answer.token_ids) == 6:
                raise KeyboardInterrupt

    monkeypatch.setattr(ServedAnswer, "stream", stream)
    command = ["ask", PROMPTS[0], "--broker", pool.edge_endpoint, "--stats"]
    done = CliRunner().invoke(midspan, command)
    assert done.exit_code == 1
    assert "6 new, then it was cut off" in done.stderr
    assert re.search("^tokens by worker +w1 6$", done.stderr, re.MULTILINE)
    assert done.stdout.endswith("\n")


def means(directory: Path, **changes: Any) -> Means:
    connection = Connection(("tcp://127.0.0.1:5555",), None, None)
    plain = Means(
        directory, None, "float32", CodecChoice("int8"), connection, None, 60.0, None, frozenset()
    )
    return replace(plain, **changes)


def announce(asked: Means) -> Announcement:
    source = describe_source(asked.directory, asked.dtype, asked.codecs)
    return Announcement(
        "http://127.0.0.1:1/v1", "stories-llama", "2-6", source, asked.describe_route(), None,
        describe_process(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"span_text": "2-6"}, True),
        ({"span_text": "2:6"}, True),
        ({"span_text": "1-7"}, False),
        ({"dtype": "float16"}, False),
        ({"codecs": CodecChoice("int8", codec_decode="fp16")}, False),
        ({"codecs": CodecChoice("fp16", "int8", "int8,int8")}, True),
        ({"codecs": CodecChoice("int8", calibration=Path("elsewhere"))}, False),
        ({"timeout_s": 7.0}, True),  # by default
        ({"timeout_s": 7.0, "given": frozenset({"timeout_s"})}, False),
        ({"pool_key": b"k" * 40}, True),
        ({"pool_key": b"k" * 40, "given": frozenset({"pool_key"})}, False),
        ({"connection": Connection(("tcp://10.0.0.1:1",), None, None)}, True),
        ({"connection": Connection(("tcp://10.0.0.1:1",), None, None),
          "given": frozenset({"brokers"})}, False),
        ({"given": frozenset({"brokers", "timeout_s"})}, True),
        ({"tokenizer": Path("tok.bin")}, False),
        ({"exact": True}, False),
        ({"drafts": DraftChoice()}, True),
        ({"drafts": DraftChoice("off")}, False),
    ],
)  # fmt: skip
def test_only_what_was_asked_for_explicitly_must_be_the_serves(
    demo_directory: Path, changes: dict[str, Any], fits: bool
) -> None:
    announcement = announce(means(demo_directory))
    assert means(demo_directory, **changes).fit(announcement) is fits


def test_another_model_and_changed_weights_do_not_fit(demo_directory: Path, tmp_path: Path) -> None:
    announcement = announce(means(demo_directory))
    assert not means(tmp_path).fit(announcement)
    assert not means(tmp_path / "none").fit(announcement)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    before = announce(means(tmp_path))
    assert means(tmp_path).fit(before)
    weights.write_bytes(b"12")
    assert not means(tmp_path).fit(before)


def test_a_model_that_was_calibrated_anew_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for place, chosen in (
        (tmp_path / "model" / "calibration" / "2-6", None),
        (tmp_path / "elsewhere", tmp_path / "elsewhere"),
    ):
        asked = means(tmp_path / "model", codecs=CodecChoice("compact", calibration=chosen))
        place.mkdir(parents=True)
        file = place / "calibration.safetensors"
        file.write_bytes(b"1")
        before = announce(asked)
        assert asked.fit(before)
        file.write_bytes(b"12")
        assert not asked.fit(before)


def test_a_request_says_all_that_the_server_could_decide_otherwise() -> None:
    drawing = SamplingSettings(0.5, 3, 0.9, 0.1, 0.8, 1.2, 0.3, 0.4, seed=4)
    assert make_request(Question("Once", 5, drawing, ("a", "b")), "tiny") == {
        "model": "tiny", "prompt": "Once", "max_tokens": 5, "temperature": 0.5, "top_k": 3,
        "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": 0.4, "seed": 4, "stop": ["a", "b"],
        "stream": True, "midspan": True,
    }  # fmt: skip


def test_what_a_request_cannot_say_is_not_asked_of_a_serve() -> None:
    for drawing, can in (
        (SamplingSettings(), True),
        (SamplingSettings(2.0, seed=5), True),
        (SamplingSettings(2.1), False),
        (SamplingSettings(1.0, seed=-5), False),
        (SamplingSettings(1.0, top_p=1e-7), False),
        (SamplingSettings(1.0, presence_penalty=2.0, frequency_penalty=-2.0), True),
        (SamplingSettings(1.0, presence_penalty=2.1), False),
        (SamplingSettings(1.0, frequency_penalty=-2.1), False),
    ):
        assert Question("hi", 1, drawing, ()).can_be_served() is can
    assert not Question("hi", 1, SamplingSettings(), (), "Be kind.").can_be_served()


def test_files_of_others_and_of_ended_processes_are_passed_over(
    demo_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ours = announce(means(demo_directory))
    with announced(ours):
        assert list_running() == [ours]
        file = SERVES.expanduser() / f"{os.getpid()}.json"
        file.chmod(0o644)
        assert list_running() == []
        file.chmod(0o600)
        text = file.read_text()
        pid = f'"pid":{os.getpid()}'
        for odd in (
            "{", "", "null", text.replace(pid, '"pid":-1'), text.replace(pid, '"pid":0'),
            text.replace(pid, '"pid":99999999999999999999'), f'{text[:-1]},"x":{"[" * 60_000}',
        ):  # fmt: skip
            file.write_text(odd)
            assert list_running() == []
    assert list_running() == []
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for changes in ({"pid": ended.pid}, {"started": "1"}, {"host": "elsewhere"}):
        with announced(replace(ours, process=replace(ours.process, **changes))):
            assert list_running() == []


def test_a_home_that_cannot_be_written_does_not_keep_a_serve_from_running(
    demo_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with announced(announce(means(demo_directory))):
        assert list_running() == []
