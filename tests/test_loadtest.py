"""`midspan loadtest` against real pools and endpoints: what is in the report has happened."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import error_line, run_midspan
from serving import MODEL, open_endpoint

from common.console.plots import require_matplotlib
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from loadtest.plot import draw_report

SHORT = ("--prompt-tokens", "4,20", "--tokens", "6")


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2, model="stories-llama")) as running:
        yield running


def run_load(*arguments: str, code: int = 0) -> dict[str, Any]:
    done = run_midspan("loadtest", *arguments, "--json")
    assert done.returncode == code, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_every_session_of_a_closed_loop_has_all_its_tokens(pool: LocalPool) -> None:
    report = run_load("--broker", pool.edge_endpoint, "--sessions", "12", *SHORT)
    assert (report["sessions"], report["failed"], report["tokens"]) == (12, 0, 72)
    assert report["itl_s"]["count"] == 12 * 5
    assert report["ttft_s"]["count"] == report["tpot_s"]["count"] == 12
    assert 0 < report["ttft_s"]["p50"] <= report["ttft_s"]["p99"] <= report["ttft_s"]["max"]
    assert report["bytes_up"] > 12 * 10 * 128  # int8 rows of prompts and tokens
    assert report["steps_per_batch"] >= 1
    assert report["broker"]["steps"] >= 72
    assert report["broker"]["cpu_us_per_step"] is None  # it is not ours
    assert report["workers"] == {"least": 2, "most": 2}
    assert report["load"]["mode"] == "closed loop"


def test_sessions_of_a_trace_come_when_it_says(pool: LocalPool, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"at": 0.5 * i, "prompt_tokens": 3, "tokens": 2 + i} for i in range(3)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    report = run_load("--broker", pool.edge_endpoint, "--trace", str(trace))
    assert report["tokens"] == 2 + 3 + 4
    assert report["seconds"] > 1.0  # the last was due then
    assert report["load"]["mode"] == "trace"


@pytest.mark.long
def test_a_pool_of_its_own_loses_workers_and_no_session(tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "load.png"
    done = run_midspan(
        "loadtest", "--rate", "4", "--duration", "12", "--warmup", "1", *SHORT, "--workers", "2",
        "--kill-every", "1", "--drain-every", "1.5", "--engines", "2", "--slo", "ttft=30",
        "--plot", str(plot), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["failed"] == 0
    assert report["sessions"] > 5
    assert report["kills"] >= 1
    assert report["drains"] >= 1
    assert {event["what"].split()[0] for event in report["events"]} == {"killed", "drained"}
    assert report["broker"]["cpu_us_per_step"] > 0
    assert report["goodput"]["share"] == 1.0
    assert report["takeovers"] >= 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_pictures_are_painted_on_the_same_pool_meanwhile() -> None:
    report = run_load("--images", "1", "--duration", "8", *SHORT)
    assert report["failed"] == 0
    assert report["images"]["failed"] == 0
    assert report["images"]["step_s"]["count"] >= 1
    assert "--images goes with" in error_line("loadtest", "--images", "1", "--synthetic", "1")


def test_a_plot_has_latencies_and_what_was_done_to_the_pool() -> None:
    require_matplotlib()
    from matplotlib import pyplot as plt

    piece = {"tokens_per_s": 5.0, "workers": 2, "queued": 0, "in_flight": 1}
    report = {
        "series": [{"at_s": at, **piece} for at in range(4)],
        "events": [
            {"at_s": 1.2, "what": "killed w1"},
            {"at_s": 2.0, "what": "drained w2"},
            {"at_s": 2.5, "what": "scaled: 1 -> 2 workers"},
        ],
    }
    figure = draw_report(report, {"time to first token": [0.1, 0.3, 0.2], "none": []}, "a title")
    left, right, steps, workers = figure.axes
    (line,) = left.lines
    assert list(line.get_xdata()) == [100.0, 200.0, 300.0]
    assert list(line.get_ydata()) == pytest.approx([1 / 3, 2 / 3, 1.0])
    labels = [text.get_text() for text in right.get_legend().get_texts()]
    assert labels == ["tokens/s", "worker killed", "worker drained"]
    assert [line.get_label() for line in steps.lines] == ["steps in flight", "steps queued"]
    assert [line.get_label() for line in workers.lines] == ["workers"]
    figure.canvas.draw()  # lays it out
    border = left.get_tightbbox().x1
    assert all(axes.get_tightbbox().x0 > border for axes in (right, steps, workers))
    assert all(count == int(count) for count in workers.get_yticks())
    plt.close(figure)


def test_what_people_read_has_the_figures_of_the_report(pool: LocalPool) -> None:
    done = run_midspan("loadtest", "--broker", pool.edge_endpoint, "--sessions", "3", *SHORT)
    assert done.returncode == 0, done.stderr
    assert "time to first token" in done.stdout
    assert "prompts of 4 to 20, answers of 6 tokens" in done.stdout
    assert "3 in " in done.stdout
    assert done.stderr == ""  # no live view where there is no terminal


def test_sessions_that_fail_are_counted_and_the_command_fails() -> None:
    with LocalPool(PoolSettings(workers=0)) as empty:
        done = run_midspan(
            "loadtest", "--broker", empty.edge_endpoint, "--sessions", "2", *SHORT, "--json"
        )
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert done.stderr == "Error: 2 of 2 sessions failed\n"
    assert report["failures"] == {"NoWorker": 2}
    assert "no worker serves" in report["reasons"][0]
    assert report["ttft_s"] is None


def test_an_endpoint_is_asked_over_http(pool: LocalPool, demo_ends: ModelEnds) -> None:
    with open_endpoint(pool, demo_ends) as endpoint:
        report = run_load(
            "--url", f"{endpoint.url}/v1", "--model", MODEL, "--sessions", "6", *SHORT
        )
        asked = endpoint.metric('midspan_tokens_total{kind="completion"}')
    assert (report["sessions"], report["failed"], report["tokens"]) == (6, 0, 36)
    assert report["ttft_s"]["count"] == 6
    assert report["takeovers"] is None  # nobody says
    assert asked == 36


def test_an_endpoint_that_refuses_is_a_failure_of_its_status(
    pool: LocalPool, demo_ends: ModelEnds
) -> None:
    with open_endpoint(pool, demo_ends) as endpoint:
        report = run_load(
            "--url", f"{endpoint.url}/v1", "--model", "gpt-9", "--sessions", "2", *SHORT, code=1
        )
    assert report["failures"] == {"HTTP 404": 2}
    assert "gpt-9" in report["reasons"][0]


def serve_bytes(pieces: list[bytes]) -> tuple[str, threading.Thread]:
    """A server of one connection that sends these pieces, whatever it is asked."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        link, _ = listener.accept()
        with link, listener:
            link.recv(1 << 16)
            for piece in pieces:
                link.sendall(piece)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1", thread


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
TEXT = b'data: {"choices": [{"text": "a"}]}\n\n'
END = b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize(
    "pieces",
    [
        [HEAD + b"\r\n", TEXT, TEXT, END],
        [
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
            *(b"%x;a=1\r\n%s\r\n" % (len(p), p) for p in (TEXT[:9], TEXT[9:] + TEXT, END)),
            b"0\r\n\r\n",
        ],
    ],
)  # fmt: skip
def test_events_are_read_however_they_are_cut_into_pieces(pieces: list[bytes]) -> None:
    url, server = serve_bytes(pieces)
    report = run_load(
        "--url", url, "--model", "m", "--sessions", "1", "--prompt-tokens", "4", "--tokens", "3"
    )
    server.join(10)
    assert report["tokens"] == 3  # as the server counts, in two pieces
    assert report["itl_s"]["count"] == 1


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([HEAD + b"\r\n", TEXT], "incomplete"),
        ([b"nonsense\r\n"], "IndexError"),
        ([HEAD + b"\r\n", b'data: {"error": {"message": "no"}}\n\n'], "error event"),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"ff\r\nabc"], "IncompleteReadError"),
    ],
)
def test_answers_without_sense_are_failures(pieces: list[bytes], kind: str) -> None:
    url, server = serve_bytes(pieces)
    report = run_load("--url", url, "--model", "m", "--sessions", "1", "--tokens", "3", code=1)
    server.join(10)
    assert report["failures"] == {kind: 1}


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("--url wants --model", ["--url", "http://127.0.0.1:9/v1"]),
        ("--url and --broker", ["--url", "http://a/v1", "--broker", "tcp://127.0.0.1:9"]),
        ("--url is 'ftp://a'", ["--url", "ftp://a", "--model", "m"]),
        ("for a pool of our own", ["--broker", "tcp://127.0.0.1:9", "--kill-every", "1"]),
        ("'--workers': 4..1: expected", ["--workers", "4..1"]),
        ("--workers would do nothing", ["--broker", "tcp://127.0.0.1:9", "--workers", "3"]),
        ("--codec would do nothing", ["--url", "http://a/v1", "--model", "m", "--codec", "int8"]),
        ("--tokens is '0'", ["--tokens", "0"]),
        ("--slo has 'x=1'", ["--slo", "x=1"]),
        ("cannot be written", ["--plot", "/dev/null/a.png"]),
        ("context of 512", ["--prompt-tokens", "500", "--tokens", "20"]),
        ("no broker answers at", ["--broker", "tcp://127.0.0.1:9"]),
    ],
)
def test_what_cannot_be_is_said_in_a_line(words: str, arguments: list[str]) -> None:
    assert words in error_line("loadtest", *arguments)
