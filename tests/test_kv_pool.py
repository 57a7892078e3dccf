"""KV in a pool's slots: nobody's rows are another's, and memory is used again."""

from __future__ import annotations

import mmap
import random
from pathlib import Path

import torch
from waiting import wait_until

from common.spans.kv_pool import PIECE_BYTES, SlotPool
from common.spans.kv_rows import MIN_CAPACITY, KvRows, make_layout, slot_bytes

LAYOUT = make_layout([((2, 8), (2, 8))], torch.float32)
SLOT = slot_bytes(LAYOUT)


def make_pool(slots: int, reserve_slots: int = 0) -> SlotPool:
    return SlotPool(SLOT, slots * SLOT, reserve_slots * SLOT)


def is_pooled(kv: KvRows, pool: SlotPool) -> bool:
    at = kv.buffer.data_ptr() - pool._bytes.data_ptr()
    return 0 <= at < len(pool._bytes)


def test_sessions_that_come_grow_and_go_keep_their_own_rows() -> None:
    pool, rng = make_pool(40), random.Random(0)
    sessions: list[tuple[int, KvRows]] = []
    pooled = 0
    for mark in range(2000):
        if sessions and rng.random() < 0.5:
            mark, kv = sessions.pop(rng.randrange(len(sessions)))
        else:
            kv = KvRows(LAYOUT, pool=pool)
        assert bool((kv.buffer[: kv.length] == mark).all())
        if rng.random() < 0.3:
            kv.release()
            continue
        rows = kv.length + rng.randrange(200)
        kv.reserve(rows)
        kv.buffer[kv.length :].fill_(mark)
        kv.length = rows
        pooled += is_pooled(kv, pool)
        sessions.append((mark, kv))
    assert all(bool((kv.buffer[: kv.length] == mark).all()) for mark, kv in sessions)
    assert 0 < pooled < 2000  # the pool was full now and then
    for _, kv in sessions:
        kv.release()
    assert pool.take(40) is not None  # all of it is free, in one piece


def test_a_session_grows_in_its_place_while_nobody_is_behind_it() -> None:
    pool = make_pool(16)
    kv = KvRows(LAYOUT, pool=pool)
    kv.reserve(1)
    place = kv.buffer.data_ptr()
    kv.reserve(4 * MIN_CAPACITY)
    assert (kv.buffer.data_ptr(), kv.capacity) == (place, 4 * MIN_CAPACITY)
    other = KvRows(LAYOUT, pool=pool)
    other.reserve(1)
    kv.reserve(5 * MIN_CAPACITY)
    assert kv.buffer.data_ptr() != place
    assert is_pooled(kv, pool)


def test_what_a_session_leaves_is_where_the_next_one_begins() -> None:
    pool = make_pool(16)
    first, second = KvRows(LAYOUT, pool=pool), KvRows(LAYOUT, pool=pool)
    first.reserve(MIN_CAPACITY)
    place = first.buffer.data_ptr()
    first.release()
    assert (first.length, first.capacity_bytes) == (0, 0)
    second.reserve(MIN_CAPACITY)
    assert second.buffer.data_ptr() == place
    assert pool.touched_bytes == SLOT


def test_a_full_pool_is_no_reason_to_refuse_a_session() -> None:
    pool = make_pool(2)
    kv = KvRows(LAYOUT, pool=pool)
    kv.reserve(3 * MIN_CAPACITY)
    assert kv.capacity == 4 * MIN_CAPACITY
    assert not is_pooled(kv, pool)


def test_touched_memory_waits_for_the_next_session() -> None:
    pool = make_pool(100, reserve_slots=10)

    def wait_for(slots: int) -> None:
        wait_until(lambda: not pool._refilling)
        assert slots * SLOT <= pool.touched_bytes < slots * SLOT + PIECE_BYTES

    wait_for(10)
    slots = pool.take(60)
    assert slots is not None
    wait_for(70)
    pool.give_back(slots)
    assert pool.take(65) is not None
    wait_for(75)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE


def test_memory_that_others_need_is_given_back_to_the_system() -> None:
    pool = make_pool(4000)
    slots = pool.take(1000)
    kept = pool.take(100)
    assert slots is not None
    assert kept is not None
    pool.memory(kept).fill_(7)
    more = pool.take(2000)
    assert more is not None
    pool.memory(more).fill_(9)
    pool.give_back(more)
    before = resident_bytes()
    pool.limit(500 * SLOT)
    assert before - resident_bytes() > 1800 * SLOT
    assert pool.touched_bytes == 1100 * SLOT  # of which all is in use or before that
    assert bool((pool.memory(kept) == 7).all())
    again = pool.take(2000)
    assert again is not None
    assert not bool(pool.memory(again).any())  # new pages
    assert pool.touched_bytes == 3100 * SLOT


def test_no_more_is_touched_in_advance_than_the_limit() -> None:
    pool = make_pool(100, reserve_slots=50)
    pool.limit(20 * SLOT)
    wait_until(lambda: not pool._refilling)
    assert pool.touched_bytes == 20 * SLOT


def test_a_pool_without_room_has_no_slots() -> None:
    assert SlotPool(SLOT, 0, 0).take(1) is None
