"""An edge that is told no span asks for a part that the pool serves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from click.testing import CliRunner
from forks import error_line, run_midspan
from pools import PROMPTS, reference_tokens

from common.spans.cut import Span
from deploy.child import Child, midspan_command
from deploy.cli import midspan
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import load_ends
from edge_agent.text.served_parts import pick_part, pick_route
from edge_agent.text.tokenizer import TextTokenizer

COUNT = 6
PRINT = "fingerprint"


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    """One that serves no middle half."""
    with LocalPool(PoolSettings(workers=1, span="1-7")) as running:
        yield running


def report(*workers: list[str], state: str = "ready", model: str = PRINT) -> dict[str, Any]:
    return {
        "workers": [
            {"state": state, "services": [{"model": model, "part": part} for part in parts]}
            for parts in workers
        ]
    }


@pytest.mark.parametrize(
    ("served", "part"),
    [
        (report(), None),
        (report(["1-7"]), "1-7"),
        (report(["1-7"], ["2-6"], ["2-6"]), "2-6"),  # most workers
        (report(["2-6", "1-7"]), "1-7"),  # as many, so the widest
        (report(["1-5", "3-7", "0-4"]), "0-4"),  # as wide, so the first
        (report(["unet"], ["inner"], ["2-9"], ["6-2"], ["3-5"]), "3-5"),  # no spans of 8 layers
        (report(["2-4"], ["4-6"]), "2-6"),  # one after another
        (report(["2-4"], ["4-6"], ["5-8"], ["5-8"]), "2-6"),  # as many, so the widest
        (report(["1-7"], state="draining"), None),
        (report(["1-7"], model="another"), None),
    ],
)
def test_the_part_of_most_workers_is_picked(served: dict[str, Any], part: str | None) -> None:
    assert pick_part(served, PRINT, num_layers=8) == part


@pytest.mark.parametrize(
    ("served", "part"),
    [
        (report(["2-6"], ["2-6"], ["1-7"]), "1-7"),  # the only one that has 2 to 7
        (report(["2-7"], ["1-7"]), "1-7"),
        (report(["2-7"], ["2-7"], ["1-7"]), "2-7"),
        (report(["2-4"], ["4-7"]), "2-7"),
        (report(["3-7"], ["2-6"]), None),
    ],
)
def test_only_what_has_all_that_a_device_lacks_is_picked(
    served: dict[str, Any], part: str | None
) -> None:
    assert pick_part(served, PRINT, num_layers=8, missing=Span(2, 7)) == part


@pytest.mark.parametrize(
    ("served", "route"),
    [
        (report(["2-4"], ["4-6"], ["2-6"]), "2-6"),  # the fewest
        (report(["2-4"], ["4-6"], ["2-3"], ["3-6"], ["1-5"]), "2-3 3-6"),
        (report(["5-6"], ["2-4"], ["4-5"], ["1-7"]), "2-4 4-5 5-6"),
        (report(["2-4"], ["3-6"], ["5-6"]), ""),
        (report(), ""),
    ],
)
def test_the_fewest_spans_that_make_up_the_middle_are_its_route(
    served: dict[str, Any], route: str
) -> None:
    assert " ".join(map(str, pick_route(served, PRINT, Span(2, 6)))) == route


def test_ask_is_answered_by_a_pool_that_serves_another_part(
    pool: LocalPool, demo_directory: Path, whole_model: torch.nn.Module
) -> None:
    options = ["--broker", pool.edge_endpoint, "-n", str(COUNT), "--codec", "fp32", "--json"]
    done = run_midspan("ask", PROMPTS[0], *options)
    assert done.returncode == 0, done.stderr
    tokenizer = TextTokenizer(demo_directory)
    wanted = reference_tokens(whole_model, tokenizer, PROMPTS[:1], COUNT)
    assert [json.loads(done.stdout)["token_ids"]] == wanted


def test_chat_takes_the_part_that_is_served(pool: LocalPool) -> None:
    arguments = ["chat", "--threads", "1", "--broker", pool.edge_endpoint, "-n", "2"]
    done = CliRunner().invoke(midspan, arguments, input="/model\nOnce\n")
    assert "layers 1-7 in the pool" in done.output
    assert "error" not in done.output


@contextlib.contextmanager
def serve(directory: Path, broker: str) -> Iterator[str]:
    options = ["--port", "0", "--broker", broker]
    child = Child("serve", midspan_command("serve", *options), directory)
    try:
        yield child.wait_for("serving ").rpartition(" at ")[2].removesuffix("/v1")
    finally:
        child.stop()


def test_serve_takes_the_part_that_is_served(pool: LocalPool, tmp_path: Path) -> None:
    with serve(tmp_path, pool.edge_endpoint) as url:
        assert httpx.get(f"{url}/midspan/model").json()["cut"] == "1:7"
        assert httpx.get(f"{url}/ready", timeout=30).json()["status"] == "ready"


def test_serve_does_not_wait_for_a_broker_that_comes_later(tmp_path: Path) -> None:
    with serve(tmp_path, "tcp://127.0.0.1:9") as url:
        assert httpx.get(f"{url}/midspan/model").json()["cut"] == "2:6"


def test_a_span_that_was_given_is_kept(pool: LocalPool) -> None:
    line = error_line("ask", "hi", "--span", "2-6", "--broker", pool.edge_endpoint)
    assert "no worker serves 2-6" in line
    assert "being served: stories-llama 1-7" in line


def test_without_a_report_it_is_the_middle_half(demo_directory: Path) -> None:
    assert str(load_ends(demo_directory).cut.middle) == "2-6"
    assert str(load_ends(demo_directory, report=report(["1-7"])).cut.middle) == "2-6"
