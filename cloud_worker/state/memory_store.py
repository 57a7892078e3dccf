"""A KvStore in memory: for a worker on its own, and the Redis store's twin in tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from cloud_worker.state.store import (
    Commit,
    CommitRefused,
    Committed,
    Load,
    Loaded,
    Part,
    StoreEvent,
    counted_bytes,
    usable_rows,
)


@dataclass(slots=True)
class _Session:
    shape: str
    generation: int
    step: int
    writer: str
    position: int
    account: str
    counted: int  # bytes, for the account
    rows: bytearray = field(default_factory=bytearray)


class MemoryKvStore:
    """Keeps everything until it is deleted; several workers of one process may share it."""

    identity = "memory"
    eviction_policy = "noeviction"

    def __init__(self, share_bytes: int | None = None) -> None:
        self._share_bytes = share_bytes
        self._sessions: dict[bytes, _Session] = {}
        self._events: list[StoreEvent] = []

    def begin_commit(self, commit: Commit) -> None:
        self._events.append(self._commit(commit))

    def _commit(self, commit: Commit) -> StoreEvent:
        key = (commit.session_key, commit.generation)
        session = self._sessions.get(commit.session_key)
        valid = 0
        if session is not None:
            if session.generation > commit.generation:
                return CommitRefused(*key, "stale", session.position)
            if session.shape == commit.shape:
                valid = usable_rows(
                    session.generation, session.position, commit.generation, commit.fork
                )
        if session is not None and session.generation == commit.generation:
            if session.step > commit.step:
                return CommitRefused(*key, "stale", session.position)
            if session.step == commit.step:
                if session.position >= commit.end:
                    return Committed(*key, session.position)
                if commit.continues and session.writer != commit.writer:
                    return CommitRefused(*key, "stale", session.position)
        if commit.start > valid:
            return CommitRefused(*key, "gap", valid)
        counted = max(counted_bytes(commit), session.counted if session is not None else 0)
        if self._is_over(commit, counted):
            return CommitRefused(*key, "over", valid)
        rows = (
            session.rows if session is not None and session.shape == commit.shape else bytearray()
        )
        rows[commit.start * commit.row_bytes :] = commit.rows
        self._sessions[commit.session_key] = _Session(
            commit.shape, commit.generation, commit.step, commit.writer, commit.end,
            commit.account, counted, rows,
        )  # fmt: skip
        return Committed(*key, commit.end)

    def _is_over(self, commit: Commit, counted: int) -> bool:
        if self._share_bytes is None or not commit.account:
            return False
        known = self._sessions.get(commit.session_key)
        if known is not None and known.account == commit.account and known.counted == counted:
            return False
        others = sum(
            session.counted
            for key, session in self._sessions.items()
            if session.account == commit.account and key != commit.session_key
        )
        return others + counted > self._share_bytes

    def begin_load(self, load: Load) -> None:
        session = self._sessions.get(load.session_key)
        rows, written_in = b"", load.generation
        if session is not None and session.shape == load.shape:
            valid = usable_rows(session.generation, session.position, load.generation, load.fork)
            end = min(valid, load.end)
            written_in = session.generation
            rows = bytes(session.rows[load.start * load.row_bytes : end * load.row_bytes])
        if load.take is not None and rows:
            end = load.start + len(rows) // load.row_bytes
            load.take(Part(load.start, memoryview(rows), end, written_in))
            rows = b""
        self._events.append(Loaded(load.session_key, load.generation, load.start, rows, written_in))

    def begin_delete(self, session_key: bytes) -> None:
        self._sessions.pop(session_key, None)

    def poll(self) -> list[StoreEvent]:
        events, self._events = self._events, []
        return events

    def fileno(self) -> int | None:
        return None

    def is_sending(self) -> bool:
        return False

    def is_up(self) -> bool:
        return True

    def close(self) -> None:
        self._sessions.clear()
