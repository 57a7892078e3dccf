"""Groups of a fixed number of rows: shared only where a row's bits are the same in every place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from msgspec import structs
from random_models import save_random_model
from test_takeover import Server
from torch import Tensor, nn
from transformers import DeepseekV3Config, GPTNeoXConfig, LlamaConfig, MixtralConfig

from cloud_worker.loop.batcher import Batcher, Task
from cloud_worker.state.memory_store import MemoryKvStore
from cloud_worker.text.executor import TextExecutor
from common.protocol.messages import Opening, Part, Step
from common.spans.attention import Segment
from common.spans.cut import Span
from common.spans.fixed_groups import (
    PASS_ROWS,
    ROWS,
    Pass,
    agree,
    count_as_rows,
    draw_caches,
    draw_rows,
)
from common.spans.kv_rows import KvRows, make_layout
from common.spans.span_model import SpanModel
from common.weights.checkpoint import Checkpoint
from common.weights.loading import load_span

SIZE = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 128, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SHARING = {
    "llama": LlamaConfig(**SIZE, num_key_value_heads=2),
    "gpt-neox": GPTNeoXConfig(**SIZE),
}
EXPERTS = {
    "mixtral": MixtralConfig(
        **SIZE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek-v3": DeepseekV3Config(
        **SIZE, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
        kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6,
    ),
}  # fmt: skip


def load_middle(config: object, directory: Path) -> SpanModel:
    save_random_model(config, directory)  # type: ignore[arg-type]
    return load_span(Checkpoint(directory), Span(1, 2))


@pytest.mark.parametrize("family", SHARING)
def test_a_row_has_the_same_bits_in_every_company(family: str, tmp_path: Path) -> None:
    model = load_middle(SHARING[family], tmp_path)
    rows = torch.randn(20, model.hidden, generator=torch.Generator().manual_seed(2))
    passes: list[int] = []
    one_pass = model._pass

    def count(each: Pass) -> Tensor:
        passes.append(len(each.rows))
        return one_pass(each)

    model._pass = count  # type: ignore[method-assign]
    assert model.groups_agree
    passes.clear()
    found = []
    for sizes in ([1] * 20, [20], [3, 9, 8]):
        kv = model.new_kv()
        at, parts = 0, []
        for size in sizes:
            segment = Segment(kv, at, size, units=(1,) * size)
            parts.append(model.run(rows[at : at + size], [segment]))
            at += size
        found.append(torch.cat(parts))
    assert passes == [ROWS] * (20 + 3 + 4)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_share_no_group(family: str, tmp_path: Path) -> None:
    assert not load_middle(EXPERTS[family], tmp_path).groups_agree


class Layer(nn.Module):
    """One linear layer, and something that is done with all rows of a group."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.then = then

    def forward(self, rows: Tensor) -> Tensor:
        return self.then(self.linear(rows))


@pytest.mark.parametrize(
    ("then", "shares"),
    [
        (lambda rows: rows, True),
        (lambda rows: rows + torch.arange(ROWS)[:, None] * 1e-6, False),
        (lambda rows: rows + rows.mean(0) * 1e-6, False),
    ],
    ids=["rows by themselves", "by place", "by neighbours"],
)
@torch.inference_mode()
def test_whether_rows_depend_on_place_or_neighbours_is_found_out(
    then: Callable[[Tensor], Tensor], shares: bool
) -> None:
    layer = Layer(then)
    layout = make_layout([((1, 4), (1, 4))], torch.float32)
    caches = draw_caches(lambda: KvRows(layout), 64)
    values = draw_rows(8, torch.float32, 0)
    assert agree(layer, values, caches, lambda group: layer(group.rows)) is shares


@torch.inference_mode()
def test_layers_that_see_other_numbers_of_rows_share_no_group() -> None:
    layer = Layer(lambda rows: rows)
    caches = draw_caches(lambda: KvRows(make_layout([], torch.float32)), 64)
    values = draw_rows(8, torch.float32, 0)

    def run(group: Pass) -> Tensor:
        return torch.cat([layer(row[None]) for row in group.rows])

    assert not agree(layer, values, caches, run)


def exact_task(session: int, parts: list[int], exact: bool = True) -> Task:
    step = Step(
        session.to_bytes(16),
        0,
        0,
        0,
        0,
        [Part(0, [rows], rows * 256) for rows in parts],
        1,
        0,
        1000,
    )
    opening = Opening("m", ["1-2"], 64, ["fp32"], "", exact=exact)
    return Task(step, opening, b"", 1, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("llama", [8, 8, 4, 10]), ("mixtral", [*[1] * 20, 10])],
    ids=["llama", "mixtral"],
)
def test_a_batch_counts_exact_steps_by_their_passes(
    family: str, sizes: list[int], tmp_path: Path
) -> None:
    """A group is shared by eight single rows, and a step that is not exact counts its rows."""
    executor = TextExecutor(load_middle({**SHARING, **EXPERTS}[family], tmp_path), None)
    batcher = Batcher(32 * PASS_ROWS, 32, executor.count_rows)
    for session in range(20):
        batcher.add(exact_task(session, [1] * 32))
    found = [len(batcher.pick()) for _ in sizes[:-1]]
    for session in range(10):
        batcher.add(exact_task(session, [48, 3], exact=False))
    assert [*found, len(batcher.pick())] == sizes


def test_rows_that_were_encoded_together_take_no_less_than_a_pass() -> None:
    for groups_agree in (True, False):
        assert count_as_rows([40, 3], groups_agree) == 40 + PASS_ROWS
    assert count_as_rows([1] * ROWS, True) == count_as_rows([1], False) == PASS_ROWS


def test_the_batches_of_a_worker_are_counted_so(demo_directory: Path) -> None:
    server = Server(demo_directory, MemoryKvStore(), "w1")
    for session in range(10):
        task = server.task(0, 0, 32)
        parts = [Part(0, [1], len(task.body) // 32)] * 32
        step = structs.replace(task.step, session_id=session.to_bytes(16), parts=parts)
        opening = structs.replace(task.text_opening, exact=True)
        server.service.on_step(replace(task, step=step, opening=opening))
    server.service.run_batch()
    assert server.service.stats["steps"] == 8
