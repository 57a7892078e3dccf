"""Broker and workers over HTTP: numbers that agree with what was done, health, and a dashboard."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pools import PROMPTS, generate
from prometheus_client.parser import text_string_to_metric_families

from common.errors import SettingsError
from common.metrics import page as page_module
from common.metrics.families import gauge, histograms
from common.metrics.histogram import Histogram
from common.metrics.page import STUCK_S, MetricsPage, parse_address
from deploy.child import Child
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.tokenizer import TextTokenizer

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 12
Samples = dict[str, float]


def get(address: str, path: str = "metrics") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}/{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def read(address: str) -> Samples:
    """Every sample by its name, those with the same name added up."""
    samples: Samples = {}
    for family in text_string_to_metric_families(get(address)[1]):
        for sample in family.samples:
            samples[sample.name] = samples.get(sample.name, 0.0) + sample.value
    return samples


def wait_for(address: str, is_so: Callable[[Samples], bool]) -> Samples:
    give_up_at = time.monotonic() + 10
    while not is_so(samples := read(address)):
        assert time.monotonic() < give_up_at, samples
        time.sleep(0.1)
    return samples


def address_of(child: Child | None) -> str:
    assert child is not None
    found = re.search(r"metrics at http://(\S+)/metrics", child.log_text())
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    options = ["--metrics", "0"]
    settings = PoolSettings(workers=1, broker_options=options, worker_options=options)
    with LocalPool(settings) as running:
        yield running


def test_the_numbers_are_those_of_what_was_done(pool: LocalPool, demo_ends: ModelEnds) -> None:
    prompt_ids = TextTokenizer(demo_ends.directory).encode(PROMPTS[0])
    tokens, session = generate(pool, demo_ends, prompt_ids, NEW_TOKENS)
    broker, worker = address_of(pool.broker), address_of(pool.workers["w1"])
    rows = len(prompt_ids) + len(tokens) - 1
    here = wait_for(worker, lambda samples: samples["midspan_worker_rows_total"] == rows)
    assert here["midspan_worker_steps_total"] == here["midspan_worker_batches_total"] == NEW_TOKENS
    assert here["midspan_worker_batch_steps_count"] == NEW_TOKENS
    assert here["midspan_worker_store_up"] == 1
    assert here["midspan_worker_takeovers_total"] == 0
    assert here["midspan_worker_body_bytes_in_total"] == 4 * rows * demo_ends.hidden
    there = wait_for(broker, lambda samples: samples["midspan_broker_answers_total"] == NEW_TOKENS)
    assert there["midspan_broker_queue_wait_seconds_count"] == NEW_TOKENS
    assert there["midspan_broker_workers"] == 1
    assert there["midspan_broker_bytes_total"] > session.stats.bytes_up
    wait_for(broker, lambda samples: samples["midspan_broker_sessions"] == 0)


def test_probes_say_what_is_the_case(pool: LocalPool) -> None:
    for child in (pool.broker, pool.workers["w1"]):
        address = address_of(child)
        wait_for(address, lambda samples: bool(samples))
        assert get(address, "health") == get(address, "ready?x=1") == (200, "ok\n")
        assert get(address, "secrets")[0] == 404


def test_a_worker_without_a_broker_is_healthy_and_not_ready() -> None:
    page = MetricsPage("0")
    assert page.answer("/ready") == (503, "text/plain; charset=utf-8", b"it has not begun yet\n")
    page.publish([], "no broker has taken it yet")
    assert get(page.address, "health")[0] == 200
    assert get(page.address, "ready") == (503, "no broker has taken it yet\n")
    page.close()


def test_a_loop_that_does_not_turn_is_not_healthy() -> None:
    now = 100.0
    page = MetricsPage("127.0.0.1:0", clock=lambda: now)
    page.publish([gauge("x", "An x.", 3.0)])
    assert not page.is_due()
    now += STUCK_S + 1
    assert page.is_due()
    assert page.answer("/health")[0] == page.answer("/ready")[0] == 503
    assert b"midspan_x 3.0" in page.answer("/metrics")[2]
    page.close()


def test_a_histogram_counts_what_is_at_most_each_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    family = histograms("h", "An h.", ("of",), {("a",): histogram})
    counted = {sample.labels.get("le"): sample.value for sample in family.samples}
    assert counted == {"1.0": 2, "2.0": 3, "+Inf": 4, None: 12.0}


@pytest.mark.parametrize("address", ["x", "80x", "host:", "1.2.3.4:99999", "-1", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match=r"--metrics .*expected PORT or HOST:PORT"):
        parse_address(address)


def test_an_address_that_is_taken_is_named() -> None:
    page = MetricsPage("0")
    with pytest.raises(SettingsError, match=f"--metrics {page.address} cannot be bound"):
        MetricsPage(page.address)
    page.close()


def test_the_dashboard_asks_for_numbers_that_there_are(pool: LocalPool) -> None:
    known: set[str] = set()
    for child in (pool.broker, pool.workers["w1"]):
        wait_for(address_of(child), lambda samples: bool(samples))
        known |= set(read(address_of(child)))
    dashboard = json.loads((ROOT / "deploy/grafana/midspan.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
        for name in re.findall(r"midspan_(?:broker|worker)_\w+", target["expr"])
    }
    assert len(asked) > 15
    assert asked <= known


def test_clients_that_never_finish_hold_no_more_than_their_places(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page_module, "MAX_CLIENTS", 2)
    page = MetricsPage("0")
    host, port = page.address.rsplit(":", 1)
    stuck = [socket.create_connection((host, int(port))) for _ in range(2)]
    for client in stuck:
        client.sendall(b"GET /hea")
    with pytest.raises((ConnectionError, urllib.error.URLError)):
        get(page.address, "health")
    for client in stuck:  # a reset, while the answer is being written
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    give_up_at = time.monotonic() + 10
    while True:
        with contextlib.suppress(OSError):
            assert get(page.address, "health") == (200, "ok\n")
            break
        assert time.monotonic() < give_up_at
    page.close()
    assert capfd.readouterr().err == ""


def test_a_client_that_says_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "CLIENT_S", 0.05)
    page = MetricsPage("0")
    host, port = page.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(b"GET /hea")
        assert client.recv(1) == b""
    page.close()
