"""The worker's pure parts: warm cache, batcher, KV rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from msgspec import structs

from cloud_worker.loop.batcher import Batcher, Task
from cloud_worker.state.row_seals import Checksum
from cloud_worker.state.stage_cache import CacheBudget, StageCache
from cloud_worker.text.stage import TextStage
from common.protocol.messages import Opening, Part, Step
from common.spans.kv_rows import ByteRows, KvRows, make_layout

LAYOUT = make_layout([((2, 4), (2, 4)), ((1, 8), (1, 8))], torch.float32)
OPENING = Opening("m", ["0-2"], 8, ["fp32"], "")
STEP = Step(b"a" * 16, 0, 0, 0, 0, [Part(0, [1], 32)], 1, 0, 1000)


def task(session: str, rows: int = 1) -> Task:
    step = structs.replace(STEP, session_id=session.encode() * 16, parts=[Part(0, [rows], 32)])
    return Task(step, OPENING, b"", 1, 0, 0, 0.0)


def sessions(batch: list[Task]) -> str:
    return "".join(chr(t.step.session_id[0]) for t in batch)


def test_a_batch_takes_steps_in_order_up_to_its_rows() -> None:
    batcher = Batcher(max_rows=4, max_steps=9)
    for name, rows in (("a", 2), ("b", 3), ("c", 2)):
        batcher.add(task(name, rows))
    assert [sessions(batcher.pick()) for _ in range(3)] == ["ac", "b", ""]


def test_a_step_larger_than_a_batch_has_one_of_its_own() -> None:
    batcher = Batcher(max_rows=4, max_steps=9)
    batcher.add(task("a", 100))
    batcher.add(task("b", 1))
    assert [sessions(batcher.pick()) for _ in range(2)] == ["a", "b"]


def test_a_session_is_in_a_batch_once() -> None:
    batcher = Batcher(max_rows=9, max_steps=9)
    for name in "aab":
        batcher.add(task(name))
    assert [sessions(batcher.pick()) for _ in range(2)] == ["ab", "a"]


def test_a_batch_has_at_most_so_many_steps() -> None:
    batcher = Batcher(max_rows=9, max_steps=2)
    for name in "abc":
        batcher.add(task(name))
    assert [sessions(batcher.pick()) for _ in range(2)] == ["ab", "c"]


def test_a_session_that_is_over_leaves_the_queue() -> None:
    batcher = Batcher(max_rows=9, max_steps=9)
    for name in "ab":
        batcher.add(task(name))
    batcher.drop_session(task("a").session_key)
    assert sessions(batcher.pick()) == "b"


def make_cache(limit_rows: int) -> StageCache[TextStage]:
    return StageCache(CacheBudget(limit_rows * LAYOUT.row_bytes), frozenset)


def make_stage(key: bytes = b"key", generation: int = 0) -> TextStage:
    return TextStage(key, Checksum(key), KvRows(LAYOUT), generation, 0)


def use(cache: StageCache[TextStage], name: str) -> None:
    key = task(name).session_key
    stage = cache.use(key, lambda: make_stage(key))
    stage.kv.reserve(64)


def names(cache: StageCache[TextStage]) -> str:
    return "".join(chr(stage.key[0]) for stage in cache)


def test_the_cache_drops_the_least_recently_used_that_is_not_busy() -> None:
    budget = CacheBudget(128 * LAYOUT.row_bytes)
    cache = StageCache[TextStage](budget, lambda: {task("b").session_key})
    for name in "abca":
        use(cache, name)
    assert budget.evict() == 1
    assert names(cache) == "ba"


def test_of_several_caches_the_session_goes_that_was_used_longest_ago() -> None:
    budget = CacheBudget(3 * 64 * LAYOUT.row_bytes)
    first, second = (StageCache[TextStage](budget, frozenset) for _ in range(2))
    for cache, name in ((first, "a"), (second, "b"), (first, "c"), (second, "d"), (first, "a")):
        use(cache, name)
    assert budget.evict() == 1
    assert (names(first), names(second)) == ("ca", "d")
    use(second, "e")
    assert budget.evict(keep={task("c").session_key}) == 1
    assert (names(first), names(second)) == ("ca", "e")


def test_one_cache_may_have_all_of_the_room_that_no_other_needs() -> None:
    budget = CacheBudget(4 * 64 * LAYOUT.row_bytes)
    first, second = (StageCache[TextStage](budget, frozenset) for _ in range(2))
    for name in "abcd":
        use(first, name)
    assert (budget.evict(), names(first), names(second)) == (0, "abcd", "")


@pytest.mark.parametrize(
    ("generation", "fork", "position", "keeps"),
    [(0, 0, 8, 8), (0, 0, 5, 5), (1, 6, 8, 6), (1, 6, 4, 4), (2, 6, 8, 0)],
)
def test_a_session_keeps_the_rows_that_are_valid_for_a_step(
    generation: int, fork: int, position: int, keeps: int
) -> None:
    session = make_stage()
    session.kv.reserve(8)
    session.kv.length = session.committed = session.final = 8
    step = structs.replace(STEP, generation=generation, fork=fork, position=position)
    assert session.adjust_to(step)
    assert (session.kv.length, session.committed, session.generation) == (keeps, keeps, generation)


@pytest.mark.parametrize(
    ("number", "generation", "position", "keeps"),
    [(4, 0, 7, 7), (4, 0, 4, 4), (3, 0, 7, 7), (5, 0, 7, 5), (5, 0, 4, 4), (4, 1, 7, 5)],
)
def test_drafts_are_worth_something_to_the_next_step_only(
    number: int, generation: int, position: int, keeps: int
) -> None:
    session = make_stage()
    session.kv.reserve(8)
    session.kv.length, session.final, session.committed, session.last_step = 8, 5, 5, 3
    step = structs.replace(STEP, step=number, generation=generation, fork=8, position=position)
    assert session.adjust_to(step)
    assert (session.kv.length, session.final) == (keeps, keeps)
    assert session.committed == min(keeps, 5)


def test_a_step_of_an_older_generation_is_out_of_date() -> None:
    session = make_stage(generation=3)
    assert not session.adjust_to(structs.replace(STEP, generation=2))


def test_kv_rows_keep_each_layer_apart_and_survive_growing() -> None:
    kv = KvRows(LAYOUT)
    torch.manual_seed(0)
    keys = [torch.randn(1, 2, 5, 4), torch.randn(1, 1, 5, 8)]
    values = [torch.randn(1, 2, 5, 4), torch.randn(1, 1, 5, 8)]
    kv.reserve(5)
    for view, *parts in zip(kv.write_views(0, 5), keys, values, strict=True):
        view.copy_(torch.cat([part[0].transpose(0, 1).flatten(1) for part in parts], dim=1))
    kv.length = 5
    kv.reserve(1000)
    got = kv.read_views(5)
    for layer in range(2):
        assert torch.equal(got[2 * layer], keys[layer])
        assert torch.equal(got[2 * layer + 1], values[layer])


def test_kv_rows_go_out_as_bytes_and_come_back() -> None:
    kv, other = KvRows(LAYOUT), KvRows(LAYOUT)
    kv.reserve(6)
    kv.buffer.normal_()
    for start, end in ((0, 2), (2, 6)):
        rows = np.frombuffer(kv.read_bytes(start, end), np.uint8).reshape(end - start, -1)

        def read(into: ByteRows, rows: ByteRows = rows) -> int:
            into[:] = rows
            return len(rows)

        assert other.take_rows(start, end - start, read) == end - start
    assert torch.equal(other.buffer[:6], kv.buffer[:6])
