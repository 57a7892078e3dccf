"""Layers that take turns in memory compute what layers that stay do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pools import PROMPTS, generate, reference_tokens
from random_models import save_random_model
from test_span_model import CONFIGS, WINDOWED
from test_takeover import Answers
from test_text_lora import low_rank, pair, save_lora
from waiting import wait_until

from cloud_worker.cli import worker
from cloud_worker.serving import ServingSettings, load_text_service
from cloud_worker.state.memory_store import MemoryKvStore
from cloud_worker.state.stage_cache import CacheBudget
from cloud_worker.text.service import TextService
from common.adapters.peft import adapt_text_model
from common.errors import CheckpointError, ProcessFailed, SettingsError
from common.spans.attention import Segment
from common.spans.cut import Span
from common.spans.layer_stream import LayerStream, choose_streamed
from common.spans.span_model import SpanModel
from common.weights.checkpoint import Checkpoint
from common.weights.demo_model import DEMO_IMAGE_MODEL
from common.weights.loading import load_span
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import load_ends
from edge_agent.text.session import Session
from edge_agent.text.tokenizer import TextTokenizer

KINDS = ["llama", "gpt2", "mixtral", "deepseek-v3", "falcon-multi-query", "gpt-oss-sinks"]
ROWS = torch.randn(9, 32, generator=torch.Generator().manual_seed(3))
RESIDENT = 3  # of six layers


def run(model: SpanModel, rows: torch.Tensor = ROWS) -> list[torch.Tensor]:
    """A prompt, then one row."""
    kv = model.new_kv()
    pieces = [(0, rows[:-1]), (len(rows) - 1, rows[-1:])]
    return [model.run(piece, [Segment(kv, start, len(piece))]) for start, piece in pieces]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(CONFIGS["llama"], tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("name", KINDS)
def test_layers_that_take_turns_give_what_layers_in_memory_give(name: str, tmp_path: Path) -> None:
    directory = save_random_model((CONFIGS | WINDOWED)[name], tmp_path)
    resident = load_span(Checkpoint(directory), Span(0, 6))
    streamed = load_span(Checkpoint(directory), Span(0, 6), resident=RESIDENT)
    for _ in range(2):
        assert equal(run(streamed), run(resident))


def test_weights_of_another_type_are_converted_at_each_turn(tmp_path: Path) -> None:
    directory = save_random_model(CONFIGS["llama"], tmp_path)
    streamed = load_span(Checkpoint(directory), Span(1, 6), torch.bfloat16, resident=2)
    assert equal(
        run(streamed, ROWS.bfloat16()),
        run(load_span(Checkpoint(directory), Span(1, 6), torch.bfloat16), ROWS.bfloat16()),
    )


def test_what_an_adapter_changes_is_changed_at_each_turn(llama: Path, tmp_path: Path) -> None:
    query = "model.layers.2.self_attn.q_proj"
    choice = save_lora(tmp_path, pair(query, low_rank(32, 32)))
    plain, changed, streamed = Checkpoint(llama), Checkpoint(llama), Checkpoint(llama)
    for checkpoint in (changed, streamed):
        adapt_text_model(checkpoint, [choice])
    rows = run(load_span(streamed, Span(0, 6), resident=2))
    assert equal(rows, run(load_span(changed, Span(0, 6))))
    assert not equal(rows, run(load_span(plain, Span(0, 6))))


def test_the_head_and_the_tail_can_be_streamed_too(llama: Path) -> None:
    tails = [
        load_span(Checkpoint(llama), Span(1, 6), part="tail", resident=resident)
        for resident in (None, 2)
    ]
    logits = [tail.logits(ROWS, Segment(tail.new_kv(), 0, 9), last=9) for tail in tails]
    assert torch.equal(*logits)


def test_only_so_many_layers_have_weights_at_once(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    give_back = LayerStream._give_back

    def look(stream: LayerStream, reading: object) -> None:
        parameters = model._causal_lm.model.layers.named_parameters()
        seen.append(len({name.split(".")[0] for name, p in parameters if p.numel()}))
        give_back(stream, reading)  # type: ignore[arg-type]

    model = load_span(Checkpoint(llama), Span(0, 6), resident=4)
    monkeypatch.setattr(LayerStream, "_give_back", look)
    run(model)
    assert set(seen) == {2}  # two stay, and the one that was just used has given its own back


@pytest.mark.parametrize(
    ("layers", "resident", "streamed"),
    [(6, 6, []), (6, 9, []), (6, 5, [0, 2, 4]), (6, 2, [0, 1, 2, 3, 4, 5]), (3, 2, [0, 1, 2])],
)
def test_all_layers_take_turns_but_those_that_there_is_memory_for(
    layers: int, resident: int, streamed: list[int]
) -> None:
    assert choose_streamed(layers, resident) == streamed


def test_less_than_two_layers_in_memory_are_refused(llama: Path) -> None:
    with pytest.raises(SettingsError, match=r"1 layers in memory are too few; expected at least 2"):
        load_span(Checkpoint(llama), Span(0, 6), resident=1)


def test_files_that_are_no_safetensors_are_refused(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    torch.save(load_file(llama / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is not a safetensors file"):
        load_span(Checkpoint(tmp_path), Span(0, 6), resident=2)


def test_a_pass_that_cannot_read_its_layers_fails_and_the_next_goes_on(tmp_path: Path) -> None:
    directory = save_random_model(CONFIGS["llama"], tmp_path)
    model = load_span(Checkpoint(directory), Span(0, 6), resident=2)
    before, path = run(model), directory / "model.safetensors"
    whole, was = path.read_bytes(), path.stat()
    os.truncate(path, len(whole) // 2)
    words = r"model.safetensors has (become shorter than it was|been written to since)"
    with pytest.raises(CheckpointError, match=words):
        run(model)
    path.write_bytes(whole)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert equal(run(model), before)


def test_weights_that_were_written_over_are_not_computed_with(tmp_path: Path) -> None:
    directory = save_random_model(CONFIGS["llama"], tmp_path)
    model = load_span(Checkpoint(directory), Span(0, 6), resident=2)
    path = directory / "model.safetensors"
    others = bytearray(path.read_bytes())
    others[-4000:] = bytes(4000)
    with path.open("r+b") as file:
        file.write(others)
    with pytest.raises(CheckpointError, match=r"has been written to since it was opened"):
        run(model)


class CountedReader:
    """A layer of one number, which cannot be read while it is `away`."""

    size = 4

    def __init__(self, value: int) -> None:
        self.value = value
        self.away = False
        self.reads = 0

    def views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight": memory.view(torch.float32)}

    def read_into(self, memory: torch.Tensor) -> None:
        self.reads += 1
        if self.away:
            raise CheckpointError("away")
        memory.view(torch.float32).fill_(self.value)


def stream_of(readers: list[CountedReader]) -> LayerStream:
    return LayerStream(dict(enumerate(readers)), "cpu", lambda size: torch.empty(size).byte())


def take(stream: LayerStream, index: int) -> float:
    """The number of a layer."""
    reading = stream._take(index)
    value = reading.slot.memory.view(torch.float32).item()
    stream._give_back(reading)
    return value


def test_a_pass_that_ended_half_way_does_not_shift_the_next() -> None:
    readers = [CountedReader(value) for value in range(5)]
    stream = stream_of(readers)
    assert [take(stream, index) for index in (0, 1)] == [0, 1]
    wait_until(lambda: readers[3].reads == 1)
    assert [take(stream, index) for index in (0, 1, 2, 3, 4, 0)] == [0, 1, 2, 3, 4, 0]


def test_what_could_not_be_read_ahead_is_read_when_it_is_wanted() -> None:
    readers = [CountedReader(value) for value in range(3)]
    stream = stream_of(readers)
    assert take(stream, 0) == 0
    readers[0].away = True
    assert [take(stream, index) for index in (1, 2)] == [1, 2]
    wait_until(lambda: readers[0].reads == 2)
    readers[0].away = False
    assert take(stream, 0) == 0


def test_a_worker_streams_as_many_layers_as_it_is_told(demo_directory: Path) -> None:
    settings = ServingSettings(resident_layers=3)
    make = load_text_service(
        demo_directory, "1-7", None, MemoryKvStore(), settings, CacheBudget(1 << 20)
    )
    service = make(Answers("w"))
    assert isinstance(service, TextService)
    assert len(service._executor.model.stream or ()) == 5


@pytest.fixture(scope="module")
def streaming_pool() -> Iterator[LocalPool]:
    options = ["--stream-layers", "2"]
    with LocalPool(PoolSettings(workers=2, span="0-8", worker_options=options)) as pool:
        yield pool


def test_a_pool_that_streams_writes_what_the_whole_model_writes_though_a_worker_dies(
    streaming_pool: LocalPool,
    demo_directory: Path,
    whole_model: torch.nn.Module,
) -> None:
    tokenizer = TextTokenizer(demo_directory)

    def kill(count: int, session: Session) -> None:
        if count == 8:
            assert session.last_worker_id is not None
            streaming_pool.kill_worker(session.last_worker_id)

    tokens, _ = generate(
        streaming_pool, load_ends(demo_directory, "0-8"), tokenizer.encode(PROMPTS[0]), 24,
        on_token=kill,
    )  # fmt: skip
    assert tokens == reference_tokens(whole_model, tokenizer, PROMPTS[:1], 24)[0]


def test_a_worker_that_can_no_longer_read_its_weights_leaves_and_no_token_is_wrong(
    demo_directory: Path, whole_model: torch.nn.Module, tmp_path: Path
) -> None:
    model = shutil.copytree(demo_directory, tmp_path / "model")
    settings = PoolSettings(
        workers=1, span="0-8", model=str(model), worker_options=["--stream-layers", "2"]
    )
    tokenizer = TextTokenizer(demo_directory)

    def tear(count: int, session: Session) -> None:
        if count == 8:
            assert session.last_worker_id == "w1"
            pool.settings = replace(settings, model=str(demo_directory), worker_options=[])
            pool.start_worker()
            pool.wait_for_workers(2)
            os.truncate(model / "model.safetensors", 4096)

    with LocalPool(settings) as pool:
        tokens, _ = generate(
            pool, load_ends(demo_directory, "0-8"), tokenizer.encode(PROMPTS[0]), 24, on_token=tear
        )
        assert tokens == reference_tokens(whole_model, tokenizer, PROMPTS[:1], 24)[0]
        torn = pool.workers["w1"]
        wait_until(lambda: not torn.is_running())
        assert "model.safetensors has become shorter" in torn.last_words()
        with pytest.raises(ProcessFailed):
            torn.check()
        assert pool.workers["w2"].is_running()


def test_streaming_layers_of_images_alone_is_refused() -> None:
    result = CliRunner().invoke(
        worker, ["--image-model", DEMO_IMAGE_MODEL, "--stream-layers", "2", "--threads", "1"]
    )
    assert isinstance(result.exception, SettingsError)
    assert "--stream-layers is for language models" in str(result.exception)
