"""Layers that keep a state of the whole text: from which positions a session may go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
import zmq
from msgspec import structs
from pools import GREEDY, count_records
from test_takeover import Server

from cloud_worker.loop.batcher import Task
from cloud_worker.state.memory_store import MemoryKvStore
from cloud_worker.state.redis_store import RedisKvStore
from common.errors import CheckpointError
from common.protocol.messages import Need, StepReply
from common.security.keys import KeyPair
from common.security.sealing import draw_key, seal
from common.spans.attention import Keeping, PackedCache, Segment
from common.spans.cut import Cut, Span
from common.spans.kv_rows import KvRows, make_layout
from common.spans.states import CONVOLUTION, RECURRENT, State, StatePass, States, layout_of
from common.spans.twin_check import check_twin
from common.weights.checkpoint import Checkpoint
from common.weights.configuration import read_config
from common.weights.loading import load_span
from common.weights.needs import measure_needs
from deploy.embedded_redis import EmbeddedRedis
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from evaluation.small_models import write_small

NAME = (0, RECURRENT, 0)
FAMILY = "qwen3_next"  # three layers with a state, then one with attention
ROWS = 70  # of a prompt, which leaves two states in the store


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def whole(directory: Path) -> Any:
    torch.manual_seed(0)
    return write_small(FAMILY, directory)


@pytest.fixture(scope="module")
def ends(directory: Path, whole: Any) -> ModelEnds:
    return load_ends(directory)


@pytest.fixture(scope="module")
def pool(directory: Path, whole: Any) -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2, model=str(directory))) as running:
        yield running


def draw_ids(count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 120, (count,), generator=generator).tolist()


@torch.inference_mode()
def reference(whole: Any, ids: Sequence[int], count: int) -> list[int]:
    """The likeliest tokens, each computed from the whole text without any cache."""
    text = list(ids)
    for _ in range(count):
        text.append(
            int(whole(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax())
        )
    return text[len(ids) :]


def filled(positions: Sequence[int], rows: Sequence[int]) -> States:
    """States after steps of so many rows, whose values are their positions."""
    states = States(layout_of({NAME: torch.zeros(2)}))
    for end, count in zip(positions, rows, strict=True):
        states.begin(count)
        states.advance(end, {NAME: torch.full((2,), float(end))})
    return states


@pytest.mark.parametrize(
    ("position", "reached"), [(23, 23), (22, 22), (21, 20), (20, 20), (19, 12), (12, 12), (11, 0)]
)
def test_a_cut_back_ends_at_the_newest_state_that_is_not_beyond_it(
    position: int, reached: int
) -> None:
    states = filled([12, 20, 21, 22, 23], [12, 8, 1, 1, 1])
    assert states.cut_back(position) == states.position == reached
    assert states.current.values.keys() == ({NAME} if reached else set())


def test_what_is_held_does_not_grow_with_the_text() -> None:
    states = filled(range(4, 400, 4), [4] * 99)
    assert states.held_bytes == 4 * 2 * 4


def test_rows_end_where_the_state_does() -> None:
    kv = KvRows(make_layout([((1, 2), (1, 2))], torch.float32), states=filled([12, 13], [12, 1]))
    kv.length = 13
    assert kv.goes_on_at(13)
    kv.cut_back(5)
    assert (kv.length, kv.goes_on_at(0), kv.goes_on_at(5)) == (0, True, False)


def test_no_pass_begins_with_a_state_of_another_position() -> None:
    kv = KvRows(make_layout([((1, 2), (1, 2))], torch.float32), states=filled([12], [12]))
    kv.length = 12
    with pytest.raises(ValueError, match="from row 11 on meets a state of 12 rows"):
        PackedCache([Segment(kv, 11, 1)], Keeping())


def test_a_pass_that_fails_leaves_the_state_as_it_was() -> None:
    kv = KvRows(make_layout([], torch.float32), states=filled([12], [12]))
    assert kv.states is not None
    cache = PackedCache([Segment(kv, 12, 1)], Keeping())
    found = cache.get_recurrent_state(0)
    assert found is not None
    found.add_(1)  # as the library's layers do
    assert torch.equal(kv.states.current.values[NAME], torch.full((2,), 12.0))


def test_a_convolution_sees_zeros_before_a_text_and_then_what_was_before() -> None:
    kv = KvRows(make_layout([], torch.float32))
    cache = PackedCache([Segment(kv, 0, 2)], Keeping())
    columns = torch.tensor([[[1.0, 2.0]]])
    assert cache.update_conv_state(columns, 0, conv_kernel_size=3).tolist() == [[[0.0, 1.0, 2.0]]]
    more = cache.update_conv_state(columns + 2, 0)
    assert more.tolist() == [[[0.0, 1.0, 2.0, 3.0, 4.0]]]
    kept = cache.get_conv_state(0)
    assert kept is not None
    assert kept.tolist() == [[[2.0, 3.0, 4.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_comes_back_from_its_bytes(dtype: torch.dtype) -> None:
    values = {NAME: torch.randn(2, 3), (1, CONVOLUTION, 0): torch.randn(4).to(dtype)}
    states = States(layout_of(values))
    back = states.unpack(states.pack(State(7, values)))
    assert back is not None
    assert back.position == 7
    assert all(torch.equal(back.values[name], value) for name, value in values.items())


def test_a_state_of_another_layout_or_length_is_none() -> None:
    values = {NAME: torch.zeros(2)}
    blob = States(layout_of(values)).pack(State(7, values))
    other = States(layout_of({NAME: torch.zeros(2, dtype=torch.int32)}))
    assert other.unpack(blob) is None
    assert States(layout_of(values)).unpack(blob[:-1]) is None
    assert States(layout_of(values)).unpack(b"") is None


@pytest.fixture
def servers(directory: Path, whole: Any, redis_server: EmbeddedRedis) -> list[Server]:
    """Two workers' services over one store."""
    redis.Redis.from_url(redis_server.url).flushall()
    return [
        Server(directory, RedisKvStore(redis_server.url, timeout_s=10), f"w{n}") for n in (1, 2)
    ]


def feed(server: Server, ends: Sequence[int]) -> None:
    """Compute and store steps that end at these rows."""
    start = 0
    for number, end in enumerate(ends):
        assert isinstance(server.compute(server.task(number, start, end - start))[0], StepReply)
        server.commit_all()
        start = end


def test_a_takeover_goes_on_from_the_state_in_the_store(servers: list[Server]) -> None:
    first, second = servers
    feed(first, [ROWS])
    task = first.task(1, ROWS, 1)
    reply, body = second.compute(task)
    assert isinstance(reply, StepReply)
    assert reply.committed == ROWS
    assert second.service.stats["rows_pulled"] == ROWS
    assert body == first.compute(task)[1]
    assert second.kv_bytes() == first.kv_bytes()


def test_rows_beyond_the_last_state_in_the_store_are_asked_for(servers: list[Server]) -> None:
    first, second = servers
    feed(first, [ROWS, ROWS + 1, ROWS + 2])
    need, _ = second.compute(first.task(3, ROWS + 2, 1))
    assert isinstance(need, Need)
    assert need.have == ROWS
    for number, row in ((4, ROWS), (5, ROWS + 1)):
        second.compute(second.task(number, row, 1))
    task = first.task(6, ROWS + 2, 1)
    assert second.compute(task)[1] == first.compute(task)[1]


def test_a_damaged_state_is_no_state(servers: list[Server], redis_server: EmbeddedRedis) -> None:
    first, second = servers
    feed(first, [ROWS])
    raw = redis.Redis.from_url(redis_server.url)
    damaged = [key for key in raw.keys("midspan:*") if raw.type(key) == b"string"]
    for key in damaged:
        raw.setrange(key, 100, b"other")
    need, _ = second.compute(first.task(1, ROWS, 1))
    assert isinstance(need, Need)
    assert need.have == 0


def test_the_end_of_a_session_takes_its_state_out_of_the_store(
    servers: list[Server], redis_server: EmbeddedRedis
) -> None:
    feed(servers[0], [ROWS])
    raw = redis.Redis.from_url(redis_server.url)
    assert count_records(raw) == 2  # rows and a state
    servers[0].service.on_end(servers[0].task(1, ROWS, 1).session_key)
    servers[0].turn_until(lambda: not count_records(raw))


def test_a_step_before_the_oldest_state_has_all_computed_again(directory: Path, whole: Any) -> None:
    server = Server(directory, MemoryKvStore(), "w1")
    for number in range(4):
        server.compute(server.task(number, 20 * number, 20))
    need, _ = server.compute(server.task(4, 15, 1))
    assert isinstance(need, Need)
    assert need.have == 0


def test_the_worker_is_killed_again_and_again(
    pool: LocalPool, client: BrokerClient, ends: ModelEnds, whole: Any
) -> None:
    session = Session(ends, client, uniform_settings("fp32", prefill_rows=16))
    ids, tokens = draw_ids(40), []
    for token in session.generate(ids, 24, GREEDY):
        tokens.append(token)
        if len(tokens) in (3, 14):
            pool.kill_worker(session.last_worker_id)
            pool.start_worker()
    assert tokens == reference(whole, ids, 24)


@pytest.mark.parametrize("shared", [0, 10, 39, 40, 45, 51])
def test_a_session_is_cut_back_to_what_texts_share(
    client: BrokerClient, ends: ModelEnds, whole: Any, shared: int
) -> None:
    session = Session(ends, client, uniform_settings("fp32", prefill_rows=16))
    ids = draw_ids(40)
    written = list(session.generate(ids, 12, GREEDY, keep_open=True))
    other = (ids + written)[:shared] + draw_ids(3, seed=shared)
    assert list(session.generate(other, 6, GREEDY)) == reference(whole, other, 6)


def test_spans_in_a_row_each_have_their_state(
    pool: LocalPool, client: BrokerClient, ends: ModelEnds, whole: Any
) -> None:
    route = (Span(1, 2), Span(2, 3))
    first, last = (pool.start_worker(span=str(span)) for span in route)
    pool.wait_for_workers(4)
    session = Session(ends, client, uniform_settings("fp32", prefill_rows=16, route=route))
    ids, tokens = draw_ids(40), []
    for token in session.generate(ids, 24, GREEDY):
        tokens.append(token)
        if len(tokens) == 6:
            pool.kill_worker(first)
            first = pool.start_worker(span=str(route[0]))
    assert tokens == reference(whole, ids, 24)
    for name in (first, last):
        pool.kill_worker(name)


def test_an_encrypted_state_is_taken_over_and_tells_nothing(
    servers: list[Server], redis_server: EmbeddedRedis
) -> None:
    pair = KeyPair(*zmq.curve_keypair())
    sealed = seal(draw_key(), pair.public)
    first, second = servers
    for server in servers:
        server.service._pool_key = pair

    def closed(server: Server, step: int, start: int, rows: int) -> Task:
        task = server.task(step, start, rows)
        task.opening = structs.replace(task.text_opening, sealed_key=sealed)
        return task

    first.compute(closed(first, 0, 0, ROWS))
    first.commit_all()
    raw = redis.Redis.from_url(redis_server.url)
    (stage,) = first.service._stages
    assert stage.kv.states is not None
    plain = stage.kv.states.pack(stage.kv.states.current)
    stored = [raw.get(key) for key in raw.keys("midspan:*") if raw.type(key) == b"string"]
    assert stored
    assert not any(plain[64:96] in blob for blob in stored)
    task = closed(second, 1, ROWS, 1)
    assert second.compute(task)[1] == first.compute(task)[1]
    assert second.service.stats["rows_asked"] == 0


@pytest.mark.parametrize("family", [FAMILY, "mamba2"])
def test_check_says_what_a_sessions_state_takes(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_small(family, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    needs = measure_needs(checkpoint, torch.float32).cut(Cut(1, 3))
    middle = load_span(checkpoint, Span(1, 3))
    assert needs.middle.state_bytes == middle.states_layout.state_bytes > 0
    assert needs.middle.kv_bytes == middle.layout.row_bytes


def test_a_span_without_any_rows_is_taken_over(tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_small("mamba2", tmp_path)
    store = MemoryKvStore()
    first, second = (Server(tmp_path, store, name) for name in ("w1", "w2"))
    feed(first, [ROWS])
    task = first.task(1, ROWS, 1)
    reply, body = second.compute(task)
    assert isinstance(reply, StepReply)
    assert (reply.committed, second.service.stats["rows_asked"]) == (ROWS, 0)
    assert body == first.compute(task)[1]


def test_the_guard_sees_a_state_that_a_later_step_has_changed(
    directory: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_twin(read_config(Checkpoint(directory)), tmp_path)

    def share(self: StatePass, states: States | None, start: int) -> None:
        self.values = dict(states.current.values) if states is not None else {}

    monkeypatch.setattr(StatePass, "__init__", share)
    with pytest.raises(CheckpointError, match="would be computed wrongly"):
        check_twin(read_config(Checkpoint(directory)), tmp_path / "other")


def test_states_that_the_library_takes_up_for_single_rows_only_get_single_rows(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    whole = write_small("jamba", tmp_path)
    ids = torch.tensor([draw_ids(16)])
    with torch.inference_mode():
        rows = whole.model(input_ids=ids, output_hidden_states=True).hidden_states
    checkpoint = Checkpoint(tmp_path)
    middle = load_span(checkpoint, Span(1, 5))
    kv = middle.new_kv()
    middle.run(rows[1][0][:7], [Segment(kv, 0, 7)])
    got = middle.run(rows[1][0][7:], [Segment(kv, 7, 9)])
    assert middle.goes_by_row
    torch.testing.assert_close(got, rows[5][0][7:], atol=1e-4, rtol=1e-4)
    kv.cut_back(14)
    assert kv.length == 7  # where the step began
