"""Text and images have equal shares of a worker's time, whatever their batches take."""

from __future__ import annotations

import dataclasses

from msgspec import structs

from cloud_worker.loop.batcher import Batcher, Task
from cloud_worker.loop.time_shares import RETURN_S, TimeShares
from common.protocol.messages import Opening, Part, Step

TEXT_S, IMAGE_S, THINKING_S = 0.004, 0.080, 0.008


def test_a_session_that_comes_back_at_once_has_half_of_the_time() -> None:
    """One text session that thinks between its steps, beside images that are always ready."""
    shares = TimeShares(["text", "image"])
    now, text_ready_at = 0.0, 0.0
    used = {"text": 0.0, "image": 0.0}
    tokens = 0
    while now < 10.0:
        ready = {"image"} | ({"text"} if now >= text_ready_at else set())
        kind = shares.pick(ready, now)
        if kind is None:
            now += 0.001  # it is waited for
            continue
        seconds = TEXT_S if kind == "text" else IMAGE_S
        now += seconds
        used[kind] += seconds
        shares.charge(kind, seconds, now)
        if kind == "text":
            tokens += 1
            text_ready_at = now + THINKING_S
    assert 4.5 < used["image"] < 5.5
    assert tokens > 0.4 * 10.0 / (TEXT_S + THINKING_S)  # alone it would have 1 / 12 ms


def test_whoever_does_not_come_back_is_not_waited_for_long() -> None:
    shares = TimeShares(["text", "image"])
    assert shares.pick({"image"}, 0.0) == "image"
    shares.charge("image", IMAGE_S, 0.08)
    assert shares.pick({"text", "image"}, 0.08) == "text"
    shares.charge("text", TEXT_S, 0.084)
    assert shares.pick({"image"}, 0.085) == "image"  # text has had its share
    shares.charge("image", IMAGE_S, 0.165)
    assert shares.pick({"image"}, 0.165) is None  # now text is owed time
    assert shares.pick({"image"}, 0.165 + RETURN_S) == "image"
    shares.charge("image", IMAGE_S, 0.3)
    assert shares.pick({"image"}, 0.3) == "image"


def test_idle_time_is_no_credit() -> None:
    shares = TimeShares(["text", "image"])
    now = 0.0
    for _ in range(100):
        assert shares.pick({"image"}, now) == "image"
        now += IMAGE_S
        shares.charge("image", IMAGE_S, now)
    order = []
    for _ in range(60):  # text comes, and is always ready from now on
        kind = shares.pick({"text", "image"}, now)
        assert kind is not None
        order.append(kind)
        seconds = TEXT_S if kind == "text" else IMAGE_S
        now += seconds
        shares.charge(kind, seconds, now)
    assert order.count("image") >= 2  # not shut out until text has made up for eight seconds


def test_alone_nobody_waits() -> None:
    shares = TimeShares(["image"])
    assert shares.pick({"image"}, 0.0) == "image"
    shares.charge("image", IMAGE_S, IMAGE_S)
    assert shares.pick({"image"}, IMAGE_S) == "image"
    assert shares.pick(set(), 1.0) is None


STEP = Step(b"a" * 16, 0, 0, 0, 0, [Part(0, [1], 32)], 1, 0, 1000)


def task(session: str, edge: int) -> Task:
    step = structs.replace(STEP, session_id=session.encode() * 16)
    return Task(step, Opening("m", ["0-2"], 8, ["fp32"], ""), b"", 1, 0, 0, 0.0, edge=edge)


def sessions(batch: list[Task]) -> str:
    return "".join(chr(t.step.session_id[0]) for t in batch)


def test_a_batch_takes_edges_in_turn() -> None:
    batcher = Batcher(max_rows=9, max_steps=3)
    for session in "abcde":
        batcher.add(task(session, edge=1))
    batcher.add(task("z", edge=2))
    assert [sessions(batcher.pick()) for _ in range(2)] == ["azb", "cde"]


def test_a_step_that_is_sent_again_keeps_its_place() -> None:
    batcher = Batcher(max_rows=9, max_steps=1)
    for session in "ab":
        batcher.add(task(session, edge=1))
    again = dataclasses.replace(task("a", edge=1), attempt=2)
    assert batcher.renew(again)
    assert batcher.pick() == [again]
    assert not batcher.renew(again)
    assert sessions(batcher.pick()) == "b"
