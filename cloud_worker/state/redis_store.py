"""A KvStore in Redis: three Lua scripts over one pipelined connection that is never waited for.

Requests are written to the connection as they come and answers are read when they are there, in
order, so a load always sees the commits before it and the worker's loop needs no thread for it.
What the connection does not take at once waits here and goes out piece by piece, and an answer
that has come in part waits for its rest, so that a slow server holds nobody up. A load that is
slower than its edge would be ends with the rows that have come, and what comes of it later is
dropped: the edge sends the rest. A connection on which nothing moves for `timeout_s`, in either
direction, is condemned: everything pending fails, and a thread connects anew while the worker goes
on without a store. When there is nothing to do the server is asked once a second whether it is
there.

Keys of a session share the hash tag {SESSION}; those of accounts lie elsewhere, so that a cluster
of Redis will not do:
    midspan:{SESSION}:record    shape, generation, step, writer, position, chunks
    midspan:{SESSION}:kv:N      chunk N, about 1 MB of rows at fixed offsets
    midspan:account:ACCOUNT     bytes and expiry of each session of an edge
SESSION is the SHA-1 of the session's key, and every script wants the key itself: a worker that was
never given a session cannot name the key, though it may see the names of Redis's keys.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import redis

from cloud_worker.state.answers import INCOMPLETE, AnswerReader, Refusal
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
from common.errors import SettingsError, StoreUnavailable
from common.settings import SESSION_TTL_S

log = logging.getLogger("midspan.store")

LOADS_IN_FLIGHT = 2
LOAD_LINGER_S = 0.002  # how long a turn waits for more of a load that is coming in
LOAD_GAP_MS = 1
RECONNECT_S = 0.5
PING_S = 1.0
LOAD_LIMIT_S = 1.0  # what a load may take, and more as long as it is faster than
LOAD_BYTES_PER_S = 16e6  # which is 120 rows of 128 KB (8 billion parameters): as edges replay them
MAX_UNSENT_BYTES = 64 << 20
NO_BOUND = 1 << 52
SEND_BUFFER_BYTES = 128 << 10  # of the system: what is in there moves unseen
SLOWEST_BYTES_PER_S = 100_000.0
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError)
CONNECT_ANEW = ("NOSCRIPT", "LOADING", "NOAUTH")  # the connection is no good as it is


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


@dataclass(frozen=True, slots=True)
class _Pending:
    """A request that was sent: what to do with its answer, or with the lack of one."""

    on_answer: Callable[[Any], None]
    on_failure: Callable[[str], None]
    size: int  # bytes


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
        self.url = url
        self._share_bytes = share_bytes
        self._timeout_s = timeout_s
        self._ttl_ms = round(ttl_s * 1000)
        self._events: list[StoreEvent] = []
        self._pending: deque[_Pending] = deque()
        self._loads: list[_Loading] = []
        self._answers = AnswerReader()  # of this connection: what has come, whole or in part
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._moved_at = time.monotonic()  # when bytes last went either way
        self._sha: dict[str, str] = {}
        try:
            self._pool = redis.ConnectionPool.from_url(
                url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, protocol=2
            )
        except ValueError as error:
            raise SettingsError(
                f"--redis-url {_without_password(url)} is no Redis URL: {error}"
            ) from error
        # redis-py's connections are not typed
        self._connection: Any = None
        self._fresh: Any = None  # handed over by the connecting thread
        self._connecting: threading.Thread | None = None
        self._closed = False
        self.identity, self.eviction_policy = "", ""
        try:
            self._connection = self._connect()
        except redis.RedisError as error:
            why = f"Redis at {_without_password(url)} cannot be reached: {error}"
            if must_answer or isinstance(error, redis.AuthenticationError):
                raise StoreUnavailable(
                    f"{why}; start it, or name another with --redis-url"
                ) from error
            log.warning("%s; serving without it until it can", why)
            self._begin_to_connect()

    # --- what the worker asks for

    def begin_commit(self, commit: Commit) -> None:
        rows_per_chunk = chunk_rows(commit.row_bytes)
        chunk, row_in_chunk = divmod(commit.start, rows_per_chunk)
        assert (commit.end - 1) // rows_per_chunk == chunk, "a commit lies within one chunk"
        written = chunk_key(commit.session_key, chunk)
        others = [chunk_key(commit.session_key, other) for other in range(chunk)]
        self._send(
            lambda answer: self._on_committed(commit, answer),
            lambda reason: self._events.append(
                CommitFailed(commit.session_key, commit.generation, reason)
            ),
            "commit", 2 + len(others), record_key(commit.session_key), written, *others,
            commit.shape, commit.generation, commit.fork, commit.step, commit.writer,
            commit.start, commit.end, int(commit.continues), row_in_chunk * commit.row_bytes,
            self._ttl_ms, commit.rows, commit.session_key, commit.account, counted_bytes(commit),
            self._share_bytes,
        )  # fmt: skip

    def begin_load(self, load: Load) -> None:
        loading = _Loading(load, load.start, load.end, time.monotonic())
        self._loads.append(loading)
        for _ in range(LOADS_IN_FLIGHT):
            self._load_next_part(loading)

    def begin_delete(self, session_key: bytes) -> None:
        self._send(
            lambda answer: None,
            lambda reason: None,
            "delete", 1, record_key(session_key), session_key,
        )  # fmt: skip

    def poll(self) -> list[StoreEvent]:
        self._adopt_fresh_connection()
        connection = self._connection
        if connection is not None:
            try:
                self._flush(connection)
                self._read_answers(connection)
                self._give_up_slow_loads()
                idle_s = time.monotonic() - self._moved_at
                if self._pending and idle_s > self._timeout_s + self._unseen_s():
                    raise redis.TimeoutError(f"no answer within {idle_s:.1f} s")
                if not self._pending and idle_s > PING_S:
                    self._request(lambda answer: None, lambda reason: None, "PING")
            except (redis.RedisError, OSError) as error:
                self._drop_connection(error)
        events, self._events = self._events, []
        return events

    def fileno(self) -> int | None:
        # redis-py has no public way to poll a connection together with other sockets
        link = getattr(self._connection, "_sock", None)
        return link.fileno() if link is not None else None

    def is_sending(self) -> bool:
        return bool(self._unsent)

    def is_up(self) -> bool:
        self._adopt_fresh_connection()
        return self._connection is not None

    def close(self) -> None:
        self._closed = True
        if self._connection is not None:
            self._connection.disconnect()
        self._pool.disconnect()

    # --- the connection

    def _connect(self) -> Any:
        connection: Any = self._pool.make_connection()
        connection.connect()
        connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        for name in ("commit", "load", "delete"):
            connection.send_command("SCRIPT", "LOAD", read_script(name))
            self._sha[name] = connection.read_response().decode()
        self._read_about(connection)
        connection._sock.setblocking(False)
        return connection

    def _read_about(self, connection: Any) -> None:
        """Which server this is, and whether it may drop what it was given."""
        connection.send_command("INFO")
        try:
            about = connection.read_response().decode(errors="replace")
        except redis.ResponseError:  # an ACL may not allow it
            self.identity, self.eviction_policy = "", ""
            return
        facts = dict(line.partition(":")[::2] for line in about.splitlines())
        self.identity = facts.get("run_id", "")[:16]
        self.eviction_policy = facts.get("maxmemory_policy", "")
        if self.eviction_policy not in ("", "noeviction"):
            log.warning(
                "Redis at %s has maxmemory-policy %s: it may drop the KV of live sessions, which "
                "is then computed again from the edge; set noeviction",
                _without_password(self.url), self.eviction_policy,
            )  # fmt: skip

    def _send(
        self, on_answer: Callable[[Any], None], on_failure: Callable[[str], None], *request: Any
    ) -> None:
        self._adopt_fresh_connection()
        if self._connection is None:
            on_failure("Redis is not connected")
            return
        if self._unsent_bytes > MAX_UNSENT_BYTES:
            on_failure(f"Redis is slow: {self._unsent_bytes} bytes wait to be sent to it")
            return
        name, *arguments = request
        self._request(on_answer, on_failure, "EVALSHA", self._sha[name], *arguments)

    def _read_with_record(
        self,
        on_answer: Callable[[Any], None],
        on_failure: Callable[[str], None],
        session_key: bytes,
        command: tuple[Any, ...],
    ) -> None:
        """A command and the session's record at the same instant: both their answers."""
        self._adopt_fresh_connection()
        if self._connection is None:
            on_failure("Redis is not connected")
            return

        def on_both(answer: Any) -> None:
            refused = [part for part in answer or [] if isinstance(part, Refusal)]
            if refused:
                self._on_refusal(refused[0], on_failure)
            else:
                on_answer(answer)

        self._requests(
            [("MULTI",), ("EVALSHA", self._sha["load"], 1, record_key(session_key), session_key),
             command, ("EXEC",)],
            on_both, on_failure,
        )  # fmt: skip

    def _request(
        self, on_answer: Callable[[Any], None], on_failure: Callable[[str], None], *command: Any
    ) -> None:
        self._requests([command], on_answer, on_failure)

    def _requests(
        self,
        commands: Sequence[tuple[Any, ...]],
        on_answer: Callable[[Any], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """Send commands together; what matters is the answer to the last."""
        connection = self._connection
        if not self._pending:
            self._moved_at = time.monotonic()
        parts = connection.pack_commands(commands)
        size = sum(len(part) for part in parts)
        self._unsent += [memoryview(part) for part in parts]
        self._unsent_bytes += size
        ignored = _Pending(lambda answer: None, lambda reason: None, 0)
        self._pending += [ignored] * (len(commands) - 1)
        self._pending.append(_Pending(on_answer, on_failure, size))
        try:
            self._flush(connection)
        except (redis.RedisError, OSError) as error:
            self._drop_connection(error)

    def _unseen_s(self) -> float:
        """How long what was handed to the system may be on its way without our seeing it."""
        sent_bytes = sum(request.size for request in self._pending) - self._unsent_bytes
        return min(max(0, sent_bytes), 2 * SEND_BUFFER_BYTES) / SLOWEST_BYTES_PER_S

    def _flush(self, connection: Any) -> None:
        """Send what the connection takes now, and keep the rest."""
        if not self._unsent:
            return
        link = connection._sock  # redis-py has no public way to send without waiting
        with contextlib.suppress(*WOULD_BLOCK):
            while self._unsent:
                piece = self._unsent[0]
                sent = link.send(piece)
                self._unsent_bytes -= sent
                self._moved_at = time.monotonic()
                if sent < len(piece):
                    self._unsent[0] = piece[sent:]
                else:
                    self._unsent.popleft()

    def _read_answers(self, connection: Any) -> None:
        """Take what has come, and handle the answers that are whole.

        While a load comes in it is waited for a little, as the server's next write is due: a turn
        of the worker's loop for each would take longer than the bytes.
        """
        link = connection._sock  # redis-py waits for the rest of an answer once it has begun
        linger_until = 0.0
        while True:
            try:
                received = self._answers.receive(link)
            except WOULD_BLOCK:
                if not self._loads or time.monotonic() >= linger_until:
                    return
                if not _is_readable(link, LOAD_GAP_MS):
                    return
                continue
            if not received:
                raise redis.ConnectionError("the server ended the connection")
            self._moved_at = time.monotonic()
            linger_until = linger_until or self._moved_at + LOAD_LINGER_S
            self._handle_answers()

    def _handle_answers(self) -> None:
        while self._pending and (answer := self._answers.next_answer()) is not INCOMPLETE:
            request = self._pending.popleft()
            if isinstance(answer, Refusal):
                self._on_refusal(answer, request.on_failure)
            else:
                request.on_answer(answer)

    def _on_refusal(self, refusal: Refusal, on_failure: Callable[[str], None]) -> None:
        on_failure(refusal.reason)
        if refusal.reason.startswith(CONNECT_ANEW):
            raise redis.ConnectionError(refusal.reason)
        log.warning("Redis refused a command: %s", refusal.reason)

    def _drop_connection(self, error: Exception) -> None:
        log.warning(
            "Redis at %s is lost (%s); going on without it", _without_password(self.url), error
        )
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None
        pending, self._pending = self._pending, deque()
        self._unsent.clear()
        self._unsent_bytes = 0
        for request in pending:
            request.on_failure(str(error))
        self._begin_to_connect()

    def _begin_to_connect(self) -> None:
        if self._connecting is None and not self._closed:
            self._connecting = threading.Thread(target=self._reconnect, daemon=True)
            self._connecting.start()

    def _reconnect(self) -> None:
        while not self._closed:
            try:
                self._fresh = self._connect()
            except (redis.RedisError, OSError):
                time.sleep(RECONNECT_S)
            else:
                return

    def _adopt_fresh_connection(self) -> None:
        if self._fresh is not None:
            self._connection, self._fresh, self._connecting = self._fresh, None, None
            self._answers = AnswerReader()
            log.warning("Redis at %s is back", _without_password(self.url))

    # --- answers

    def _on_committed(self, commit: Commit, answer: Any) -> None:
        code, position = str(answer[0], "ascii"), int(answer[1])
        if code == "committed":
            event: StoreEvent = Committed(commit.session_key, commit.generation, position)
        else:
            event = CommitRefused(commit.session_key, commit.generation, code, position)
        self._events.append(event)

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
        self._read_with_record(
            lambda answer: self._on_part(loading, start, rows, answer),
            lambda reason: self._on_part(loading, start, rows, None),
            load.session_key,
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


def _is_readable(link: socket.socket, timeout_ms: int) -> bool:
    poller = select.poll()
    poller.register(link, select.POLLIN)
    return bool(poller.poll(timeout_ms))


def read_script(name: str) -> bytes:
    """The source of one of the Lua scripts beside this file."""
    return resources.files("cloud_worker.state").joinpath(f"{name}.lua").read_bytes()


def _home(session_key: bytes) -> str:
    return f"midspan:{{{hashlib.sha1(session_key, usedforsecurity=False).hexdigest()}}}:"


def record_key(session_key: bytes) -> str:
    """The key of a session's record."""
    return _home(session_key) + "record"


def chunk_key(session_key: bytes, chunk: int) -> str:
    """The key of a chunk of a session's rows."""
    return f"{_home(session_key)}kv:{chunk}"


def _without_password(url: str) -> str:
    """Scheme, host and port or path: neither user nor password nor options."""
    scheme, separator, rest = url.rpartition("://")
    place = rest.rpartition("@")[2].partition("?")[0]
    return f"{scheme}{separator}{place}"
