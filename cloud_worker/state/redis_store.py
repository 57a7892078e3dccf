"""A KvStore in Redis: Lua scripts over connections that are never waited for.

A load that is slower than its edge would be ends with the rows that have come, and what comes of it
later is dropped: the edge sends the rest.

Keys of a session share the hash tag {SESSION}, so that they lie on one server of a cluster:
    midspan:{SESSION}:record    shape, generation, step, writer, position, chunks, account
    midspan:{SESSION}:kv:N      chunk N, about 1 MB of rows at fixed offsets
    midspan:account:ACCOUNT     bytes and expiry of each session of an edge
SESSION is the SHA-1 of the session's key, and every script wants the key itself: a worker that was
never given a session cannot name the key, though it may see the names of Redis's keys.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from cloud_worker.state.redis_cluster import Servers, open_servers
from cloud_worker.state.share import Grants
from cloud_worker.state.store import (
    Commit,
    CommitFailed,
    CommitRefused,
    Committed,
    Load,
    Loaded,
    Part,
    StoreEvent,
    chunk_rows,
    counted_bytes,
    usable_rows,
)
from common.settings import SESSION_TTL_S

log = logging.getLogger("midspan.store")

LOADS_IN_FLIGHT = 2
LOAD_LIMIT_S = 1.0  # what a load may take, and more as long as it is faster than
LOAD_BYTES_PER_S = 16e6  # which is 120 rows of 128 KB (8 billion parameters): as edges replay them
NO_BOUND = 1 << 52


@dataclass(slots=True)
class _Loading:
    """A load under way, chunk by chunk."""

    load: Load
    next_row: int  # first row not asked for yet
    end: int  # shrinks to what turns out to be valid
    begun_at: float
    parts: list[bytes] = field(default_factory=list)  # unless somebody takes them
    loaded_bytes: int = 0
    in_flight: int = 0
    generation_seen: int | None = None
    finished: bool = False

    @property
    def give_up_at(self) -> float:
        """When it is slower than its edge would be, unless another part comes."""
        return self.begun_at + LOAD_LIMIT_S + self.loaded_bytes / LOAD_BYTES_PER_S


class RedisKvStore:
    """Raises SettingsError for a bad URL, StoreUnavailable if Redis is not there at first.

    Unless it need not be (`must_answer`): then it is looked for from then on.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = 0.5,
        ttl_s: float = SESSION_TTL_S,
        must_answer: bool = True,
        share_bytes: int = NO_BOUND,
    ) -> None:
        self._share_bytes = share_bytes
        self._ttl_ms = round(ttl_s * 1000)
        self._events: list[StoreEvent] = []
        self._loads: list[_Loading] = []
        self._grants = Grants(ttl_s)
        self._ungranted: dict[bytes, Commit] = {}  # commits that wait for their share, by session
        self._servers: Servers = open_servers(url, timeout_s, must_answer)

    @property
    def identity(self) -> str:
        return self._servers.identity

    @property
    def eviction_policy(self) -> str:
        return self._servers.eviction_policy

    # --- what the worker asks for

    def begin_commit(self, commit: Commit) -> None:
        if self._grants.covers(commit):
            self._send_commit(commit)
        else:
            self._ask_share(commit)

    def begin_load(self, load: Load) -> None:
        loading = _Loading(load, load.start, load.end, time.monotonic())
        self._loads.append(loading)
        for _ in range(LOADS_IN_FLIGHT):
            self._load_next_part(loading)

    def begin_delete(self, session_key: bytes) -> None:
        self._ungranted.pop(session_key, None)
        account, record = self._grants.take_back(session_key), record_key(session_key)
        if account:
            self._release(account_key(account), session_key)
        self._servers.link_to(record).call(
            lambda counts_for: self._release("" if account else _text(counts_for), session_key),
            lambda reason: None,
            "delete", 1, record, session_key,
        )  # fmt: skip

    def poll(self) -> list[StoreEvent]:
        self._servers = self._servers.poll(bool(self._loads))
        self._give_up_slow_loads()
        events, self._events = self._events, []
        return events

    def fileno(self) -> int | None:
        return self._servers.fileno()

    def is_sending(self) -> bool:
        return self._servers.is_sending()

    def is_up(self) -> bool:
        return self._servers.is_up()

    def close(self) -> None:
        self._servers.close()

    # --- commits, and the share of an edge

    def _send_commit(self, commit: Commit) -> None:
        rows_per_chunk = chunk_rows(commit.row_bytes)
        chunk, row_in_chunk = divmod(commit.start, rows_per_chunk)
        assert (commit.end - 1) // rows_per_chunk == chunk, "a commit lies within one chunk"
        record, written = record_key(commit.session_key), chunk_key(commit.session_key, chunk)
        others = [chunk_key(commit.session_key, other) for other in range(chunk)]
        self._servers.link_to(record).call(
            lambda answer: self._on_committed(commit, answer),
            lambda reason: self._on_commit_failed(commit, reason),
            "commit", 2 + len(others), record, written, *others,
            commit.shape, commit.generation, commit.fork, commit.step, commit.writer,
            commit.start, commit.end, int(commit.continues), row_in_chunk * commit.row_bytes,
            self._ttl_ms, commit.rows, commit.session_key,
            account_key(commit.account) if commit.account else "",
        )  # fmt: skip

    def _ask_share(self, commit: Commit) -> None:
        self._ungranted[commit.session_key] = commit
        account = account_key(commit.account)
        self._servers.link_to(account).call(
            lambda answer: self._on_share(commit, _text(answer) == "granted"),
            lambda reason: self._on_commit_failed(commit, reason),
            "grant", 1, account, _name(commit.session_key), counted_bytes(commit), self._ttl_ms,
            self._share_bytes,
        )  # fmt: skip

    def _on_share(self, commit: Commit, is_granted: bool) -> None:
        if self._ungranted.get(commit.session_key) is not commit:
            return  # the session was deleted meanwhile
        del self._ungranted[commit.session_key]
        if is_granted:
            self._grants.add(commit)
            self._send_commit(commit)
            return
        self._events.append(
            CommitRefused(commit.session_key, commit.generation, "over", commit.start)
        )

    def _on_committed(self, commit: Commit, answer: Any) -> None:
        code, position = str(answer[0], "ascii"), int(answer[1])
        if code == "committed":
            event: StoreEvent = Committed(commit.session_key, commit.generation, position)
        else:
            event = CommitRefused(commit.session_key, commit.generation, code, position)
        self._events.append(event)

    def _on_commit_failed(self, commit: Commit, reason: str) -> None:
        self._ungranted.pop(commit.session_key, None)
        self._events.append(CommitFailed(commit.session_key, commit.generation, reason))

    def _release(self, account: str, session_key: bytes) -> None:
        """What was deleted counts no more."""
        if account:
            self._servers.link_to(account).call(
                lambda answer: None, lambda reason: None,
                "release", 1, account, _name(session_key),
            )  # fmt: skip

    # --- loads

    def _load_next_part(self, loading: _Loading) -> None:
        load = loading.load
        if loading.finished:
            return
        if loading.next_row >= loading.end:
            if loading.in_flight == 0:
                self._finish_load(loading)
            return
        rows_per_chunk = chunk_rows(load.row_bytes)
        chunk, first = divmod(loading.next_row, rows_per_chunk)
        rows = min(rows_per_chunk - first, loading.end - loading.next_row)
        start = loading.next_row
        loading.next_row += rows
        loading.in_flight += 1
        record = record_key(load.session_key)
        self._servers.link_to(record).call_with(
            lambda answer: self._on_part(loading, start, rows, answer),
            lambda reason: self._on_part(loading, start, rows, None),
            "load", (1, record, load.session_key),
            ("GETRANGE", chunk_key(load.session_key, chunk),
             first * load.row_bytes, (first + rows) * load.row_bytes - 1),
        )  # fmt: skip

    def _on_part(self, loading: _Loading, start: int, rows: int, answer: Any) -> None:
        load = loading.load
        loading.in_flight -= 1
        if loading.finished:
            return  # given up
        valid = 0
        record, chunk = answer if answer is not None else ([], None)
        if record and bytes(record[0]) == load.shape.encode():
            valid = usable_rows(record[1], record[2], load.generation, load.fork)
            if loading.generation_seen not in (None, record[1]):
                valid = 0  # the record changed hands between two parts
            loading.generation_seen = record[1]
        loading.end = min(loading.end, max(start, valid))
        usable = min(rows, loading.end - start)
        if usable > 0:
            part = chunk[: usable * load.row_bytes]
            if len(part) < usable * load.row_bytes:  # an evicted or foreign chunk
                loading.end = start
            else:
                self._hand_over(loading, start, part)
        self._load_next_part(loading)

    def _hand_over(self, loading: _Loading, start: int, rows: memoryview) -> None:
        loading.loaded_bytes += len(rows)
        take = loading.load.take
        if take is None:
            loading.parts.append(bytes(rows))
            return
        assert loading.generation_seen is not None
        if not take(Part(start, rows, loading.end, loading.generation_seen)):
            loading.end = start

    def _give_up_slow_loads(self) -> None:
        now = time.monotonic()
        for loading in [loading for loading in self._loads if now > loading.give_up_at]:
            log.info("Redis is slow: a load is given up after %.1f s", now - loading.begun_at)
            self._finish_load(loading, given_up=True)

    def _finish_load(self, loading: _Loading, given_up: bool = False) -> None:
        load = loading.load
        loading.finished = True
        self._loads.remove(loading)
        rows = b"".join(loading.parts)[: max(0, loading.end - load.start) * load.row_bytes]
        loading.parts.clear()
        written_in = load.generation if loading.generation_seen is None else loading.generation_seen
        self._events.append(
            Loaded(load.session_key, load.generation, load.start, rows, written_in, given_up)
        )


def _text(answer: Any) -> str:
    return bytes(answer).decode()


def _name(session_key: bytes) -> str:
    return hashlib.sha1(session_key, usedforsecurity=False).hexdigest()


def _home(session_key: bytes) -> str:
    return f"midspan:{{{_name(session_key)}}}:"


def record_key(session_key: bytes) -> str:
    """The key of a session's record."""
    return _home(session_key) + "record"


def chunk_key(session_key: bytes, chunk: int) -> str:
    """The key of a chunk of a session's rows."""
    return f"{_home(session_key)}kv:{chunk}"


def account_key(account: str) -> str:
    """The key of what an edge's sessions count."""
    return f"midspan:account:{hashlib.sha1(account.encode(), usedforsecurity=False).hexdigest()}"
