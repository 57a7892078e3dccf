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

from cloud_worker.redis_store import RedisKvStore
from cloud_worker.row_seals import KvCipher
from cloud_worker.store import Commit, Load, Loaded, chunk_rows
from deploy.embedded_redis import EmbeddedRedis

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


def measure(
    store: RedisKvStore, row_bytes: int, count: int, encrypted: bool
) -> tuple[float, float]:
    """Seconds of one commit and of one takeover."""
    rows = secrets.token_bytes(row_bytes * count)
    key = secrets.token_bytes(16)
    cipher = KvCipher(secrets.token_bytes(32), key)
    stored = row_bytes + KvCipher.overhead * encrypted
    begun_at = time.perf_counter()
    body = cipher.encrypt(rows, 0, row_bytes) if encrypted else rows
    commit_all(store, key, body, count, stored)
    committed_at = time.perf_counter()
    store.begin_load(Load(key, "bench", 0, 0, 0, count, stored))
    loaded = wait(store)
    back = cipher.decrypt(loaded, 0, row_bytes) if encrypted else loaded
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
        print(f"{'row':40} {'rows':24} {'what':10} {'plain ms':>9} {'AES ms':>9} {'ratio':>6}")
        for row_name, row_bytes in ROW_BYTES.items():
            for rows_name, count in ROWS.items():
                taken: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
                for _ in range(repeats):
                    for encrypted in (False, True):
                        taken[encrypted].append(measure(store, row_bytes, count, encrypted))
                for index, what in enumerate(("commit", "takeover")):
                    plain, aes = (
                        statistics.median(times[index] for times in taken[encrypted]) * 1e3
                        for encrypted in (False, True)
                    )
                    print(
                        f"{row_name:40} {rows_name:24} {what:10} {plain:9.3f} {aes:9.3f} "
                        f"{aes / plain:6.2f}"
                    )
        store.close()
        server.stop()


if __name__ == "__main__":
    main()
