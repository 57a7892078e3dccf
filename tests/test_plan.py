"""`midspan plan`: what it proposes fits, covers every model once, and is what its workers take."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from pools import GREEDY
from random_models import save_random_model
from transformers import LlamaConfig
from waiting import wait_until

from common.errors import SettingsError
from common.spans.cut import Span
from deploy.child import Child, midspan_command
from deploy.cli import midspan
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.engine import Engine
from edge_agent.text.ends import load_ends
from edge_agent.text.session_settings import uniform_settings
from evaluation.placement import Layers, Placement, place
from evaluation.plan import read_sizes

GB = 10**9


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(midspan, ["plan", *arguments])


def layers(model: str, count: int, each: int, first: int = 4) -> Layers:
    return Layers(model, first, [each] * count)


def test_a_model_that_fits_stays_whole_where_it_leaves_least_room() -> None:
    assert place([layers("m", 10, GB)], [24 * GB, 12 * GB, 8 * GB], GB) == [
        Placement(1, "m", Span(4, 14), 10 * GB)
    ]


def test_three_models_of_seven_billion_fit_on_two_cards_of_24_gb() -> None:
    """28 of 32 layers each, of 405 MB in bfloat16, and 60 MB of KV for 4,096 tokens."""
    models = [layers(name, 28, 465_000_000, first=2) for name in ("a", "b", "c")]
    placed = place(models, [24 * GB, 24 * GB], GB // 2)
    spans = {name: [p.span for p in placed if p.model == name] for name in "abc"}
    assert spans["a"] == spans["b"] == [Span(2, 30)]
    assert sorted(spans["c"])[0].first == 2
    assert [span.last for span in spans["c"]][-1] == 30
    assert len(spans["c"]) == 2


def test_what_does_not_fit_is_said_with_what_is_lacking() -> None:
    with pytest.raises(SettingsError, match=r"m does not fit: .* from 13 on take 1\.00 GB more"):
        place([layers("m", 10, GB)], [6 * GB, 5 * GB], GB)


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=12), min_size=1, max_size=4),
    st.lists(st.integers(0, 400), min_size=1, max_size=4),
)
def test_no_device_is_overfull_and_every_layer_has_one_place(
    models: list[list[int]], room: list[int]
) -> None:
    wanted = [Layers(str(i), i, each) for i, each in enumerate(models)]
    try:
        placed = place(wanted, room, worker_bytes=7)
    except SettingsError:
        return
    for index, size in enumerate(room):
        assert sum(p.layer_bytes + 7 for p in placed if p.device == index) <= size
    for model in wanted:
        spans = sorted(p.span for p in placed if p.model == model.model)
        covered = [layer for span in spans for layer in range(span.first, span.last)]
        assert covered == list(range(model.first, model.first + len(model.bytes_each)))
        assert sum(p.layer_bytes for p in placed if p.model == model.model) == model.total


def test_sizes_are_read_as_people_write_them() -> None:
    assert read_sizes("24GB, 1.5 gib,512MiB") == [24 * GB, 3 << 29, 512 << 20]


@pytest.mark.parametrize("text", ["", "24", "24GB,", "lots", "-1GB", "24XB"])
def test_a_size_that_is_none_is_named(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--devices '.*' is no size"):
        read_sizes(text)


def test_the_commands_are_printed_and_what_is_left(demo_directory: Path) -> None:
    done = plan(str(demo_directory), "--devices", "355MB,352MB", "--kv-tokens", "1024")
    assert done.exit_code == 0, done.output
    assert "# on device 1" in done.output
    command = f"midspan worker --model {demo_directory} --span 2-5 --dtype float32 --cache-mb 2"
    assert command in done.output.splitlines()
    assert "Left free: " in done.output


@pytest.mark.long
@pytest.mark.usefixtures("unforked")
def test_the_workers_take_what_was_promised(tmp_path: Path) -> None:
    """A model of 340 MB in two spans, and all of the KV that was planned for."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=4096,
    )  # fmt: skip
    directory = save_random_model(config, tmp_path / "model")
    tokens = 2048
    options = [str(directory), "--devices", "600MB,600MB", "--kv-tokens", str(tokens)]
    facts = json.loads(plan(*options, "--span", "1-7", "--json").output)
    assert [w["device"] for w in facts["workers"]] == [0, 1]
    with LocalPool(PoolSettings(workers=0)) as pool:
        workers = [start(worker["command"], pool, tmp_path) for worker in facts["workers"]]
        try:
            client = pool.connect()
            wait_until(lambda: len(client.status()["workers"]) == 2)
            client.close()
            write(pool, directory, tokens)
            for worker, child in zip(facts["workers"], workers, strict=True):
                assert resident_bytes(child) == pytest.approx(worker["bytes"], rel=0.1)
        finally:
            for child in workers:
                child.stop()


def start(command: str, pool: LocalPool, directory: Path) -> Child:
    _, *arguments = shlex.split(command)
    more = ["--broker", pool.worker_endpoint, "--redis-url", pool.redis_url, "--threads", "1"]
    return Child("worker", midspan_command(*arguments, *more), directory)


def write(pool: LocalPool, directory: Path, tokens: int) -> None:
    """Sessions that keep so many tokens warm together."""
    ends = load_ends(directory, "1-7")
    with Engine(ends, [pool.edge_endpoint], uniform_settings("fp32")) as engine:
        talks = [engine.open() for _ in range(4)]
        ids: list[list[int]] = torch.randint(0, 512, (4, tokens // 4 - 2)).tolist()
        streams = [talk.submit(prompt, 2, GREEDY) for talk, prompt in zip(talks, ids, strict=True)]
        for stream in streams:
            list(stream)


def resident_bytes(child: Child) -> int:
    status: dict[str, Any] = dict(
        line.split(":", 1) for line in Path(f"/proc/{child.pid}/status").read_text().splitlines()
    )
    return int(status["VmRSS"].split()[0]) * 1024
