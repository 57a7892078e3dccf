"""Writers race with different bytes for every step, and zombies come back with old ones.

Real replays are deterministic, so a lost fence would hide in them: whoever overwrites a row writes
the same bytes. Here every writer has its own, and mutants of the script show that the test would
see it.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable

import pytest

from cloud_worker.state import redis_link
from cloud_worker.state.redis_link import read_script
from cloud_worker.state.redis_store import RedisKvStore
from cloud_worker.state.store import Commit, Load, Loaded, StoreEvent
from deploy.embedded_redis import EmbeddedRedis

ROW_BYTES = 64
WRITERS = 4
STEPS = 1000
ROWS_OF_A_STEP = 2


def step_rows(writer: int, step: int, generation: int) -> bytes:
    """What this writer writes for a step: nobody else's bytes are the same."""
    row = bytes([writer, step % 251, step // 251, generation]) * (ROW_BYTES // 4)
    return row * ROWS_OF_A_STEP


class Race:
    """Counts what went wrong while writers raced for one session."""

    def __init__(self, url: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.stores = [RedisKvStore(url, timeout_s=5) for _ in range(WRITERS)]
        self.session_key = secrets.token_bytes(16)
        self.generation, self.fork = 0, 0
        self.expected: list[bytes] = []  # of every step, as first read
        self.wrong = 0

    def close(self) -> None:
        for store in self.stores:
            store.close()

    def begin_commit(self, writer: int, step: int, generation: int, fork: int) -> None:
        start = step * ROWS_OF_A_STEP
        self.stores[writer].begin_commit(
            Commit(
                self.session_key, "shape", generation, fork, self.steps_before(generation) + step,
                f"w{writer}", start, start + ROWS_OF_A_STEP, False,
                step_rows(writer, step, generation), ROW_BYTES,
            )
        )  # fmt: skip

    def steps_before(self, generation: int) -> int:
        """Step numbers only rise; a cut back makes positions fall."""
        return generation * 10_000

    def wait_all(self, counts: list[int]) -> list[StoreEvent]:
        events: list[StoreEvent] = []
        for store, count in zip(self.stores, counts, strict=True):
            got: list[StoreEvent] = []
            give_up_at = time.monotonic() + 10
            while len(got) < count:
                got += store.poll()
                assert time.monotonic() < give_up_at
            events += got
        return events

    def read_all(self) -> bytes:
        end = len(self.expected) * ROWS_OF_A_STEP + ROWS_OF_A_STEP
        load = Load(self.session_key, "shape", self.generation, self.fork, 0, end, ROW_BYTES)
        self.stores[0].begin_load(load)
        (event,) = self.wait_all([1] + [0] * (WRITERS - 1))
        assert isinstance(event, Loaded)
        return event.rows

    def disturb(self, writer: int, step: int, generation: int, fork: int) -> None:
        """One commit on its own that must leave what is there as it is."""
        self.begin_commit(writer, step, generation, fork)
        self.wait_all([int(index == writer) for index in range(WRITERS)])
        self.wrong += self.read_all() != b"".join(self.expected)

    def run_step(self) -> None:
        """All writers commit the next step, while zombies commit steps from before."""
        step = len(self.expected)
        first = self.fork // ROWS_OF_A_STEP  # rows below the fork are the same for all writers
        if step > first and self.rng.random() < 0.2:
            repeated = self.rng.randrange(WRITERS)
            self.disturb(repeated, step - 1, self.generation, self.fork)
        counts = [0] * WRITERS
        writers = self.rng.sample(range(WRITERS), WRITERS)
        for writer in writers:
            self.begin_commit(writer, step, self.generation, self.fork)
            counts[writer] += 1
            if step > first and self.rng.random() < 0.5:
                old = self.rng.randrange(max(first, step - 5), step)
                self.begin_commit(writer, old, self.generation, self.fork)
                counts[writer] += 1
            if self.generation and self.rng.random() < 0.3:
                old = self.rng.randrange(step + 1)
                self.begin_commit(writer, old, self.generation - 1, 0)
                counts[writer] += 1
        self.wait_all(counts)
        rows = self.read_all()
        size = ROWS_OF_A_STEP * ROW_BYTES
        newest = rows[step * size :]
        whole = [step_rows(writer, step, self.generation) for writer in range(WRITERS)]
        self.wrong += newest not in whole
        self.wrong += rows[: step * size] != b"".join(self.expected)
        self.expected = [rows[i * size : (i + 1) * size] for i in range(step + 1)]

    def cut_back(self) -> None:
        """The edge goes back a few steps and on from there, in a new generation."""
        keep = self.rng.randrange(len(self.expected) // 2, len(self.expected))
        self.generation += 1
        self.fork = keep * ROWS_OF_A_STEP
        del self.expected[keep:]
        hasty = self.rng.randrange(WRITERS)  # believes in rows beyond the fork
        self.disturb(hasty, keep + 1, self.generation, self.fork)


def race(url: str, seed: int = 1, cut_backs: bool = True) -> int:
    """How many reads were wrong in the first of STEPS raced steps that had any."""
    running = Race(url, seed)
    try:
        for index in range(STEPS):
            running.run_step()
            if running.wrong:
                break
            if cut_backs and index % 40 == 39:
                running.cut_back()
        return running.wrong
    finally:
        running.close()


def test_a_thousand_raced_steps_and_none_is_wrong(redis_server: EmbeddedRedis) -> None:
    assert race(redis_server.url) == 0


@pytest.mark.parametrize(
    "mutation",
    [
        ("if record_step > step then", "if false then"),
        ("if record_generation > generation then", "if false then"),
        ("if position >= last and held >= offset + #ARGV[11] then", "if false then"),
        ("valid = math.min(position, fork)", "valid = position"),
    ],
    ids=["older steps", "older generations", "repeated steps", "rows beyond the fork"],
)
def test_without_a_check_of_the_fence_the_race_goes_wrong(
    redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch, mutation: tuple[str, str]
) -> None:
    original: Callable[[str], bytes] = read_script

    def mutant(name: str) -> bytes:
        source = original(name).decode()
        if name == "commit":
            assert mutation[0] in source
            source = source.replace(*mutation)
        return source.encode()

    monkeypatch.setattr(redis_link, "read_script", mutant)
    assert race(redis_server.url) > 0
