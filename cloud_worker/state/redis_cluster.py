"""Which Redis server has a key: the one there is, or a cluster's master for the key's slot.

A cluster's view of itself (which node is master of which slots) is asked for in a thread: when a
connection is lost, when a node says that a slot has moved, and every few seconds. Until another
node has taken the place of one that died, what lies there cannot be stored or loaded, which a
worker takes as it takes a Redis that is away; sessions elsewhere notice nothing.

Cluster specification: https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
"""

from __future__ import annotations

import contextlib
import logging
import random
import select
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import redis
from redis.crc import key_slot

from cloud_worker.state.redis_link import RedisLink, without_password
from common.errors import SettingsError, StoreUnavailable

log = logging.getLogger("midspan.store")

LOOK_AGAIN_S = 5.0
LOOK_SOON_S = 0.1  # while a master is away
SLOTS_ELSEWHERE = ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "READONLY", "MASTERDOWN")


class Servers(Protocol):
    """One Redis server, or several that share the keys."""

    @property
    def identity(self) -> str: ...

    @property
    def eviction_policy(self) -> str: ...

    def link_to(self, key: str) -> RedisLink:
        """The connection to the server that has a key, or one that is down."""
        ...

    def poll(self, expects_load: bool) -> Servers:
        """Send and read what can be now. What the servers are from now on."""
        ...

    def fileno(self) -> int | None: ...

    def is_sending(self) -> bool: ...

    def is_up(self) -> bool: ...

    def close(self) -> None: ...


def open_servers(url: str, timeout_s: float, must_answer: bool) -> Servers:
    """What is behind a Redis URL, in which several addresses may stand: those of a cluster's nodes.

    Raises SettingsError for a bad URL, StoreUnavailable if it must answer and none does.
    """
    seeds = split_addresses(url)
    error: redis.RedisError = redis.ConnectionError("no address")
    for seed in seeds:
        link = RedisLink(seed, timeout_s, log_refusal)
        try:
            link.connect()
        except redis.RedisError as failed:
            error = failed
            continue
        if is_cluster_node(link):
            link.close()
            return Cluster(seeds, timeout_s)
        if len(seeds) > 1:
            raise SettingsError(
                f"--redis-url has {len(seeds)} addresses, as of a cluster's nodes; "
                f"{link.name} is no cluster's"
            )
        return OneServer(link)
    why = f"Redis at {without_password(url)} cannot be reached: {error}"
    if must_answer or isinstance(error, redis.AuthenticationError):
        raise StoreUnavailable(f"{why}; start it, or name another with --redis-url") from error
    log.warning("%s; serving without it until it can", why)
    if len(seeds) > 1:
        return Cluster(seeds, timeout_s)
    link.begin_to_connect()
    return OneServer(link)


def split_addresses(url: str) -> list[str]:
    """redis://user:password@a:1,b:2/0 is one URL for each address. Raises SettingsError."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise SettingsError(f"--redis-url {without_password(url)} is no URL: {error}") from error
    user, at, addresses = parts.netloc.rpartition("@")
    if "," not in addresses:
        return [url]
    if "" in addresses.split(","):
        raise SettingsError(f"--redis-url {without_password(url)} has nothing between two commas")
    return [
        urlunsplit(parts._replace(netloc=f"{user}{at}{address}"))
        for address in addresses.split(",")
    ]


def is_cluster_node(link: RedisLink) -> bool:
    """Whether a server has said so."""
    return link.facts.get("cluster_enabled") == "1"


def log_refusal(reason: str) -> None:
    log.warning("Redis refused a command: %s", reason)


class OneServer:
    """One server, over one connection. It may turn out to be a cluster's when it first answers."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    @property
    def identity(self) -> str:
        return self._link.facts.get("run_id", "")[:16]

    @property
    def eviction_policy(self) -> str:
        return self._link.facts.get("maxmemory_policy", "")

    def link_to(self, key: str) -> RedisLink:
        return self._link

    def poll(self, expects_load: bool) -> Servers:
        self._link.poll(expects_load)
        if not is_cluster_node(self._link):
            return self
        self._link.close()
        return Cluster([self._link.url], self._link.timeout_s)

    def fileno(self) -> int | None:
        return self._link.fileno()

    def is_sending(self) -> bool:
        return self._link.is_sending()

    def is_up(self) -> bool:
        return self._link.is_up()

    def close(self) -> None:
        self._link.close()


@dataclass(frozen=True, slots=True)
class View:
    """What a node says of its cluster: the URL of each slot range's master, and of all nodes."""

    ranges: tuple[tuple[int, int, str], ...]  # first slot, last slot, master
    nodes: frozenset[str]
    identity: str

    @property
    def masters(self) -> frozenset[str]:
        return frozenset(master for _, _, master in self.ranges)

    def master_of(self, slot: int) -> str | None:
        """Nobody may have it."""
        for first, last, master in self.ranges:
            if first <= slot <= last:
                return master
        return None


def ask_view(url: str, timeout_s: float) -> View:
    """What the node behind a URL says. Raises redis.RedisError or OSError."""
    pool = redis.ConnectionPool.from_url(
        url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, protocol=2
    )
    connection: Any = pool.make_connection()  # not typed
    try:
        connection.connect()
        connection.send_command("CLUSTER", "SLOTS")
        return read_view(url, connection.read_response())
    finally:
        connection.disconnect()


def read_view(url: str, answer: list[Any]) -> View:
    """An answer to CLUSTER SLOTS: [first, last, master, replica …], nodes as [host, port, id …]."""
    nodes = {bytes(node[2]).decode(): _node_url(url, node) for part in answer for node in part[2:]}
    ranges = [(part[0], part[1], _node_url(url, part[2])) for part in answer]
    return View(tuple(sorted(ranges)), frozenset(nodes.values()), min(nodes, default="")[:16])


def _node_url(url: str, node: list[Any]) -> str:
    """Reached as the node that was asked, at another address. It may not know its own host."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    host = bytes(node[0] or b"").decode() or parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return urlunsplit(parts._replace(netloc=f"{user}{at}{host}:{node[1]}"))


class Cluster:
    """The masters of a Redis Cluster, over a connection each."""

    def __init__(self, seeds: Sequence[str], timeout_s: float) -> None:
        self._seeds = seeds
        self._timeout_s = timeout_s
        self._links: dict[str, RedisLink] = {}
        self._nowhere = RedisLink(seeds[0], timeout_s)  # never connected
        self._view = View((), frozenset(), "")
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[RedisLink, int, int]] = {}
        self._closed = False
        self._look_now = threading.Event()
        self._seen: View | None = self._look()  # handed over by the thread, from now on
        self._adopt_view(at_once=True)
        threading.Thread(target=self._keep_looking, daemon=True).start()

    @property
    def identity(self) -> str:
        return self._view.identity

    @property
    def eviction_policy(self) -> str:
        """The first that may drop keys, if one does."""
        policies = [link.facts.get("maxmemory_policy", "") for link in self._links.values()]
        return next((policy for policy in policies if policy != "noeviction"), "noeviction")

    def link_to(self, key: str) -> RedisLink:
        master = self._view.master_of(key_slot(key.encode()))
        return self._links[master] if master is not None else self._nowhere

    def poll(self, expects_load: bool) -> Servers:
        self._adopt_view()
        for link in self._links.values():
            link.poll(expects_load)
            if not link.is_up():
                self._look_now.set()
        return self

    def fileno(self) -> int | None:
        """Of all connections, whether they are to be read or written."""
        self._watch_links()
        return self._epoll.fileno()

    def is_sending(self) -> bool:
        return False  # the descriptor tells of that, too

    def is_up(self) -> bool:
        """Whether a part of the sessions can be stored."""
        return any(link.is_up() for link in self._links.values())

    def close(self) -> None:
        self._closed = True
        self._look_now.set()
        for link in self._links.values():
            link.close()
        self._epoll.close()

    # --- who has what

    def _keep_looking(self) -> None:
        while not self._closed:
            self._look_now.wait(LOOK_AGAIN_S)
            self._look_now.clear()
            if not self._closed and (view := self._look()) is not None:
                self._seen = view
            time.sleep(LOOK_SOON_S)

    def _look(self) -> View | None:
        """What the first node says that answers: any of them, as one may be cut off from others."""
        for url in self._addresses():
            with contextlib.suppress(redis.RedisError, OSError):
                view = ask_view(url, self._timeout_s)
                if view.ranges:
                    return view
        return None

    def _addresses(self) -> Iterator[str]:
        known = list(self._view.nodes)
        random.shuffle(known)
        yield from known
        yield from self._seeds

    def _adopt_view(self, at_once: bool = False) -> None:
        view, self._seen = self._seen, None
        if view is None or view == self._view:
            return
        self._view = view
        for url in self._links.keys() - view.masters:
            self._links.pop(url).close()
        for url in view.masters - self._links.keys():
            self._links[url] = link = RedisLink(url, self._timeout_s, self._on_refusal)
            connect_link(link, at_once)

    def _on_refusal(self, reason: str) -> None:
        if reason.startswith(SLOTS_ELSEWHERE):
            self._look_now.set()
        elif not reason.startswith("EXECABORT"):  # for a reason that was told
            log_refusal(reason)

    # --- the descriptor

    def _watch_links(self) -> None:
        wanted = {
            fd: (link, link.connections, _events_of(link))
            for link in self._links.values()
            if (fd := link.fileno()) is not None
        }
        for fd, watched in self._watched.items():
            if wanted.get(fd) != watched:
                with contextlib.suppress(OSError):  # a closed one is not watched any more
                    self._epoll.unregister(fd)
        for fd, watch in wanted.items():
            if self._watched.get(fd) != watch:
                self._epoll.register(fd, watch[2])
        self._watched = wanted


def connect_link(link: RedisLink, at_once: bool) -> None:
    """Now if it must be and can be, else in a thread."""
    if at_once:
        with contextlib.suppress(redis.RedisError):
            link.connect()
            return
    link.begin_to_connect()


def _events_of(link: RedisLink) -> int:
    return select.EPOLLIN | (select.EPOLLOUT if link.is_sending() else 0)
