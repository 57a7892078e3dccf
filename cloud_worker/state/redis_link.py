"""One pipelined connection to a Redis server, which is never waited for.

Requests are written to the connection as they come and answers are read when they are there, in
order, so a load always sees the commits before it and the worker's loop needs no thread for it.
What the connection does not take at once waits here and goes out piece by piece, and an answer
that has come in part waits for its rest, so that a slow server holds nobody up. A connection on
which nothing moves for `timeout_s`, in either direction, is condemned: everything pending fails,
and a thread connects anew while the worker goes on without a store. When there is nothing to do
the server is asked once a second whether it is there.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeAlias

import redis

from cloud_worker.state.answers import INCOMPLETE, AnswerReader, Refusal
from common.errors import SettingsError

log = logging.getLogger("midspan.store")

LOAD_LINGER_S = 0.002  # how long a turn waits for more of a load that is coming in
LOAD_GAP_MS = 1
RECONNECT_S = 0.5
PING_S = 1.0
MAX_UNSENT_BYTES = 64 << 20
SEND_BUFFER_BYTES = 128 << 10  # of the system: what is in there moves unseen
SLOWEST_BYTES_PER_S = 100_000.0
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError)
CONNECT_ANEW = ("NOSCRIPT", "LOADING", "NOAUTH")  # the connection is no good as it is
SCRIPTS = ("commit", "load", "delete", "grant", "release")

OnAnswer: TypeAlias = Callable[[Any], None]
OnFailure: TypeAlias = Callable[[str], None]
Command: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A request that was sent: what to do with its answer, or with the lack of one."""

    on_answer: OnAnswer
    on_failure: OnFailure
    size: int  # bytes


class RedisLink:
    """Connects with `connect`, or in a thread with `begin_to_connect`.

    `facts` is what the server said of itself when it was connected, if it may be asked.
    """

    def __init__(
        self, url: str, timeout_s: float, on_refusal: Callable[[str], None] = lambda reason: None
    ) -> None:
        """Raises SettingsError for a bad URL. `on_refusal` is told why a command was refused."""
        self.url = url
        self.name = without_password(url)
        self.facts: Mapping[str, str] = {}
        self.connections = 0  # how many there have been
        self.timeout_s = timeout_s
        self._on_refusal = on_refusal
        self._pending: deque[_Pending] = deque()
        self._answers: AnswerReader  # of this connection: what has come, whole or in part
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._moved_at = time.monotonic()  # when bytes last went either way
        self._sha: dict[str, str] = {}
        try:
            self._pool = redis.ConnectionPool.from_url(
                url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, protocol=2
            )
            self._pool.make_connection()  # complains of options now, if ever
        except (ValueError, TypeError) as error:
            raise SettingsError(f"--redis-url {self.name} is no Redis URL: {error}") from error
        # redis-py's connections are not typed
        self._connection: Any = None
        self._fresh: Any = None  # handed over by the connecting thread
        self._connecting: threading.Thread | None = None
        self._was_lost = False
        self._closed = False

    def connect(self) -> None:
        """Now, once. Raises redis.RedisError."""
        self._adopt(self._connect())

    def begin_to_connect(self) -> None:
        """Try until it works, in a thread."""
        if self._connecting is None and not self._closed:
            self._connecting = threading.Thread(target=self._reconnect, daemon=True)
            self._connecting.start()

    # --- what is asked of the server

    def call(
        self, on_answer: OnAnswer, on_failure: OnFailure, script: str, *arguments: Any
    ) -> None:
        """Run one of the Lua scripts: number of keys, keys, arguments."""
        if self._can_send(on_failure):
            command = ("EVALSHA", self._sha[script], *arguments)
            self._request([command], on_answer, on_failure)

    def call_with(
        self,
        on_answer: OnAnswer,
        on_failure: OnFailure,
        script: str,
        arguments: Command,
        command: Command,
    ) -> None:
        """A script and a command at the same instant: both their answers."""
        if not self._can_send(on_failure):
            return

        def on_both(answer: Any) -> None:
            refused = [part for part in answer or [] if isinstance(part, Refusal)]
            if refused:
                self._on_refused(refused[0], on_failure)
            else:
                on_answer(answer)

        scripted = ("EVALSHA", self._sha[script], *arguments)
        self._request([("MULTI",), scripted, command, ("EXEC",)], on_both, on_failure)

    def poll(self, expects_load: bool) -> None:
        """Send and read what can be sent and read now; with a load, wait a little for more."""
        self._adopt_fresh_connection()
        connection = self._connection
        if connection is None:
            return
        try:
            self._flush(connection)
            self._read_answers(connection, expects_load)
            idle_s = time.monotonic() - self._moved_at
            if self._pending and idle_s > self.timeout_s + self._unseen_s():
                raise redis.TimeoutError(f"no answer within {idle_s:.1f} s")
            if not self._pending and idle_s > PING_S:
                self._request([("PING",)], lambda answer: None, lambda reason: None)
        except (redis.RedisError, OSError) as error:
            self._drop_connection(error)

    def fileno(self) -> int | None:
        """The connection's descriptor, if there is one."""
        # redis-py has no public way to poll a connection together with other sockets
        link = getattr(self._connection, "_sock", None)
        return link.fileno() if link is not None else None

    def is_sending(self) -> bool:
        """Whether something waits until the connection takes it."""
        return bool(self._unsent)

    def is_up(self) -> bool:
        """Whether there is a connection."""
        self._adopt_fresh_connection()
        return self._connection is not None

    def close(self) -> None:
        """End the connection; whatever is pending fails."""
        self._closed = True
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None
        self._fail_pending("the connection was closed")
        self._pool.disconnect()

    # --- the connection

    def _connect(self) -> Any:
        connection: Any = self._pool.make_connection()
        connection.connect()
        connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        for name in SCRIPTS:
            connection.send_command("SCRIPT", "LOAD", read_script(name))
            self._sha[name] = connection.read_response().decode()
        self.facts = self._read_facts(connection)
        connection._sock.setblocking(False)
        return connection

    def _read_facts(self, connection: Any) -> Mapping[str, str]:
        """Which server this is, and whether it may drop what it was given."""
        connection.send_command("INFO")
        try:
            about = connection.read_response().decode(errors="replace")
        except redis.ResponseError:  # an ACL may not allow it
            return {}
        facts = dict(line.partition(":")[::2] for line in about.splitlines())
        policy = facts.get("maxmemory_policy", "")
        if policy not in ("", "noeviction"):
            log.warning(
                "Redis at %s has maxmemory-policy %s: it may drop the KV of live sessions, which "
                "is then computed again from the edge; set noeviction",
                self.name, policy,
            )  # fmt: skip
        return facts

    def _can_send(self, on_failure: OnFailure) -> bool:
        self._adopt_fresh_connection()
        if self._connection is None:
            on_failure("Redis is not connected")
            return False
        if self._unsent_bytes > MAX_UNSENT_BYTES:
            on_failure(f"Redis is slow: {self._unsent_bytes} bytes wait to be sent to it")
            return False
        return True

    def _request(
        self, commands: Sequence[Command], on_answer: OnAnswer, on_failure: OnFailure
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

    def _read_answers(self, connection: Any, expects_load: bool) -> None:
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
                if not expects_load or time.monotonic() >= linger_until:
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
                self._on_refused(answer, request.on_failure)
            else:
                request.on_answer(answer)

    def _on_refused(self, refusal: Refusal, on_failure: OnFailure) -> None:
        on_failure(refusal.reason)
        if refusal.reason.startswith(CONNECT_ANEW):
            raise redis.ConnectionError(refusal.reason)
        self._on_refusal(refusal.reason)

    def _drop_connection(self, error: Exception) -> None:
        log.warning("Redis at %s is lost (%s); going on without it", self.name, error)
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None
        self._was_lost = True
        self._unsent.clear()
        self._unsent_bytes = 0
        self._fail_pending(str(error))
        self.begin_to_connect()

    def _fail_pending(self, reason: str) -> None:
        pending, self._pending = self._pending, deque()
        for request in pending:
            request.on_failure(reason)

    def _reconnect(self) -> None:
        while not self._closed:
            try:
                connection = self._connect()
            except (redis.RedisError, OSError):
                time.sleep(RECONNECT_S)
            else:
                self._hand_over(connection)
                return

    def _hand_over(self, connection: Any) -> None:
        """From the thread; nobody takes it if the link was closed meanwhile."""
        if self._closed:
            connection.disconnect()
        else:
            self._fresh = connection

    def _adopt_fresh_connection(self) -> None:
        if self._fresh is not None:
            fresh, self._fresh, self._connecting = self._fresh, None, None
            self._adopt(fresh)
            log.warning("Redis at %s is %s", self.name, "back" if self._was_lost else "there")

    def _adopt(self, connection: Any) -> None:
        self._connection = connection
        self._answers = AnswerReader()
        self.connections += 1


def _is_readable(link: socket.socket, timeout_ms: int) -> bool:
    poller = select.poll()
    poller.register(link, select.POLLIN)
    return bool(poller.poll(timeout_ms))


def read_script(name: str) -> bytes:
    """The source of one of the Lua scripts beside this file."""
    return resources.files("cloud_worker.state").joinpath(f"{name}.lua").read_bytes()


def without_password(url: str) -> str:
    """Scheme, host and port or path: neither user nor password nor options."""
    scheme, separator, rest = url.rpartition("://")
    place = rest.rpartition("@")[2].partition("?")[0]
    return f"{scheme}{separator}{place}"
