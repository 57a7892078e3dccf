"""What encrypting KV at rest costs: commits and takeovers with it against those without.

    python benchmarks/encryption.py

Commits rows to a real Redis and loads them back, both ways in one run, in alternation.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import tempfile
import time
from pathlib import Path

from cloud_worker.state.redis_store import RedisKvStore
from cloud_worker.state.row_seals import Checksum, KvCipher, RowSeal, unseal
from cloud_worker.state.store import Commit, Load, Loaded, chunk_rows
from deploy.embedded_redis import EmbeddedRedis

SEALS = ("plain", "checked", "AES")
ROWS = {"one decode token": 1, "a prompt of 512 tokens": 512}
ROW_BYTES = {"2 KB (demo model)": 2048, "64 KB (16 layers of a 7B model, GQA)": 65536}


def wait(store: RedisKvStore) -> bytes:
    while True:
        for event in store.poll():
            return event.rows if isinstance(event, Loaded) else b""


def commit_all(store: RedisKvStore, key: bytes, rows: bytes, count: int, stored: int) -> None:
    per_chunk = chunk_rows(stored)
    for start in range(0, count, per_chunk):
        end = min(count, start + per_chunk)
        piece = rows[start * stored : end * stored]
        store.begin_commit(Commit(key, "bench", 0, 0, 0, "w", start, end, start > 0, piece, stored))
        wait(store)


def make_seal(kind: str, key: bytes) -> RowSeal | None:
    if kind == "plain":
        return None
    return Checksum(key) if kind == "checked" else KvCipher(secrets.token_bytes(32), key)


def measure(store: RedisKvStore, row_bytes: int, count: int, kind: str) -> tuple[float, float]:
    """Seconds of one commit and of one takeover."""
    rows = secrets.token_bytes(row_bytes * count)
    key = secrets.token_bytes(16)
    seal = make_seal(kind, key)
    stored = row_bytes + (seal.overhead if seal is not None else 0)
    begun_at = time.perf_counter()
    body = seal.seal(rows, 0, row_bytes, 0) if seal is not None else rows
    commit_all(store, key, body, count, stored)
    committed_at = time.perf_counter()
    store.begin_load(Load(key, "bench", 0, 0, 0, count, stored))
    loaded = wait(store)
    back = unseal(seal, loaded, 0, row_bytes, 0) if seal is not None else loaded
    done_at = time.perf_counter()
    assert back == rows
    store.begin_delete(key)
    return committed_at - begun_at, done_at - committed_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as directory:
        server = EmbeddedRedis(Path(directory))
        store = RedisKvStore(server.url, timeout_s=10)
        print(
            f"{'row':40} {'rows':24} {'what':10} "
            + " ".join(f"{k + ' ms':>11}" for k in SEALS)
            + "   ratios to plain"
        )
        for row_name, row_bytes in ROW_BYTES.items():
            for rows_name, count in ROWS.items():
                taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in SEALS}
                for _ in range(repeats):
                    for kind in SEALS:
                        taken[kind].append(measure(store, row_bytes, count, kind))
                for index, what in enumerate(("commit", "takeover")):
                    times = [
                        statistics.median(pair[index] for pair in taken[kind]) * 1e3
                        for kind in SEALS
                    ]
                    print(
                        f"{row_name:40} {rows_name:24} {what:10} "
                        + " ".join(f"{time_ms:11.3f}" for time_ms in times)
                        + "   "
                        + ", ".join(f"{time_ms / times[0]:.2f}" for time_ms in times[1:])
                    )
        store.close()
        server.stop()


if __name__ == "__main__":
    main()
