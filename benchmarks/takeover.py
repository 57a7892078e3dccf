"""What a takeover costs: a worker that has nothing of a session goes on from what Redis has of it.

    python benchmarks/takeover.py [--json]

Two real workers, a broker and a Redis of their own; the model has about 56 M random parameters and
is made on the spot, with a KV row of 8 KB (4 layers, 4 KV heads of 64, float32). In each round a
session gets a prompt and some tokens from one worker; then that one is stopped (SIGSTOP), and the
time is taken until the edge has its next token. What this is beyond a token of a warm worker is
the takeover. Its baseline follows in the same round: the session's KV is deleted everywhere, so
that the next token has the worker recompute the session from the edge's log. All three come after
a pause of the same kind, in which a broker sees that a worker is gone and caches go cold.

Once with rows as they are (a checksum each), once encrypted at rest. Medians over the rounds; the
first one only warms up.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import redis
import torch
from overhead import make_model

from cloud_worker.loop.batcher import make_session_key
from cloud_worker.state.redis_store import record_key
from common.console.processes import freeze_loaded_objects, set_up_torch
from common.security.keys import create_key, read_pair
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings

WARM_TOKENS = 3
PAUSE_S = 0.4
LIMIT_S = 20.0
CODEC = "int8"


def wait_until(is_so: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < give_up_at, "the pool does not get where the benchmark needs it"
        time.sleep(0.005)


def ready_workers(client: BrokerClient) -> int:
    return sum(worker["state"] == "ready" for worker in client.status()["workers"])


def time_token(stream: Generator[int, None, None]) -> float:
    """Milliseconds until the next token."""
    begun_at = time.perf_counter()
    next(stream)
    return (time.perf_counter() - begun_at) * 1e3


class Bench:
    """A pool of two workers and what looks on."""

    def __init__(self, pool: LocalPool, ends: ModelEnds, rows: int) -> None:
        self.pool = pool
        self.ends = ends
        self.rows = rows
        self.raw = redis.Redis.from_url(pool.redis_url)
        self.client = pool.connect()

    def committed(self, session: Session) -> int:
        return int(self.raw.hget(self.record_of(session), "position") or 0)

    def record_of(self, session: Session) -> str:
        part = str(self.ends.cut.middle)
        return record_key(make_session_key(session.session_id, "", part))

    def time_after_pause(self, stream: Generator[int, None, None], workers: int = 2) -> float:
        """Milliseconds until the next token, when so many workers have been there for a while."""
        over_at = time.monotonic() + PAUSE_S
        wait_until(lambda: ready_workers(self.client) == workers and time.monotonic() > over_at)
        return time_token(stream)

    def run_round(self, pool_key: bytes | None) -> dict[str, float]:
        """Milliseconds of a warm token, and of a takeover and of recomputing beyond that."""
        session = Session(self.ends, self.client, uniform_settings(CODEC), pool_key=pool_key)
        prompt_ids = torch.randint(3, 900, (self.rows - WARM_TOKENS - 1,)).tolist()
        stream = session.generate(prompt_ids, self.rows, SamplingSettings(), keep_open=True)
        next(stream)
        wait_until(lambda: self.committed(session) == len(prompt_ids))
        time_token(stream)
        warm_ms = statistics.median(self.time_after_pause(stream) for _ in range(WARM_TOKENS))
        wait_until(lambda: self.committed(session) == self.rows)
        warm_id = session.last_worker_id
        child = self.pool.workers[warm_id]
        child.signal(signal.SIGSTOP)
        takeover_ms = self.time_after_pause(stream, workers=1)
        assert session.last_worker_id != warm_id
        assert session.stats.rows_replayed == 0, "the rows did not come from Redis"
        child.signal(signal.SIGCONT)
        wait_until(lambda: ready_workers(self.client) == 2)
        session.end()
        wait_until(lambda: not self.raw.exists(self.record_of(session)))
        recompute_ms = self.time_after_pause(stream)
        assert session.stats.rows_replayed == self.rows + 1, "the rows did not come from the edge"
        session.end()
        return {
            "warm_ms": warm_ms,
            "takeover_ms": takeover_ms - warm_ms,
            "recompute_ms": recompute_ms - warm_ms,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1900)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    set_up_torch(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        model, keys = Path(made) / "model", Path(made) / "keys"
        make_model(model)
        create_key(keys, "pool")
        secret = keys / "pool.key_secret"
        settings = PoolSettings(
            workers=2, model=str(model), threads=options.threads,
            worker_options=["--pool-key", str(secret)],
        )  # fmt: skip
        with LocalPool(settings) as pool:
            ends = load_ends(model)
            freeze_loaded_objects()
            bench = Bench(pool, ends, options.rows)
            taken: dict[str, list[dict[str, float]]] = {"": [], "encrypted_": []}
            for _ in range(options.rounds + 1):
                for name, rounds in taken.items():
                    rounds.append(bench.run_round(read_pair(secret).public if name else None))
            bench.client.close()
    result: dict[str, float] = {"rows": options.rows, "row_bytes": 8192, "rounds": options.rounds}
    for name, (_, *rounds) in taken.items():
        medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        slowest = max(r["takeover_ms"] for r in rounds)
        result |= {name + key: round(value, 2) for key, value in medians.items()}
        result[name + "slowest_takeover_ms"] = round(slowest, 2)
        times = medians["recompute_ms"] / medians["takeover_ms"]
        result[name + "times_faster"] = round(times, 1)
    if options.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:32} {value}")


if __name__ == "__main__":
    main()
