"""A real Redis Cluster on this machine: three masters with a replica each."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

import redis
from redis.crc import key_slot
from waiting import wait_until

from deploy.child import Child, guarded_command
from deploy.embedded_redis import LOOPBACK, find_redis_server

MASTERS = 3
SLOTS = 16384
BUS = 10_000  # a node's second port, above its first
NODE_TIMEOUT_MS = 1000


class Node:
    """One server; it comes back with what it knew of the cluster."""

    def __init__(self, directory: Path, index: int) -> None:
        self.port = choose_cluster_port()
        self.url = f"redis://{LOOPBACK}:{self.port}"
        self._directory = directory / f"node-{index}"
        self._directory.mkdir()
        self.child = self.start()
        self.client = redis.Redis.from_url(self.url)

    def start(self) -> Child:
        command = guarded_command(
            find_redis_server(), "--port", str(self.port), "--bind", LOOPBACK,
            "--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS),
            "--cluster-replica-validity-factor", "0",
            "--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction",
            "--dir", str(self._directory),
        )  # fmt: skip
        self.child = Child(self._directory.name, command, self._directory)
        self.child.wait_for("eady to accept connections")
        return self.child

    def ask(self, *words: object) -> Any:
        """CLUSTER, and these words; the answer as redis-py reads it."""
        return self.client.execute_command(  # type: ignore[no-untyped-call]
            "CLUSTER " + str(words[0]), *words[1:]
        )

    def is_healthy(self) -> bool:
        """Whether it says that all slots are served, and has all that its master has."""
        replication = self.client.info("replication")
        follows = replication.get("master_link_status", "up") == "up"  # type: ignore[union-attr]
        return follows and self.ask("INFO")["cluster_state"] == "ok"


class RedisCluster:
    """Starts on construction, and is whole then."""

    def __init__(self, directory: Path) -> None:
        self.nodes = [Node(directory, index) for index in range(2 * MASTERS)]
        first, *others = self.nodes
        for index, master in enumerate(self.nodes[:MASTERS]):
            slots = range(index * SLOTS // MASTERS, (index + 1) * SLOTS // MASTERS)
            master.ask("ADDSLOTS", *slots)
            master.ask("SET-CONFIG-EPOCH", index + 1)
        for other in others:
            other.ask("MEET", LOOPBACK, first.port)
        wait_until(lambda: all(self._knows_all(node) for node in self.nodes))
        for master, replica in zip(self.nodes[:MASTERS], self.nodes[MASTERS:], strict=True):
            replica.ask("REPLICATE", bytes(master.ask("MYID")).decode())
        wait_until(lambda: all(node.is_healthy() for node in self.nodes))

    @property
    def url(self) -> str:
        """Of two of its nodes."""
        hosts = ",".join(f"{LOOPBACK}:{node.port}" for node in self.nodes[:2])
        return f"redis://{hosts}/0"

    def _knows_all(self, node: Node) -> bool:
        known = node.ask("NODES").values()
        return len(known) == len(self.nodes) and all("handshake" not in n["flags"] for n in known)

    def master_of(self, key: str) -> Node:
        """Which of the nodes that live has a key."""
        slot = key_slot(key.encode())
        living = next(node for node in self.nodes if node.child.is_running())
        (port,) = (
            master[1] for first, last, master, *_ in living.ask("SLOTS") if first <= slot <= last
        )
        return next(node for node in self.nodes if node.port == port)

    def wait_until_healthy(self) -> None:
        """Until others have taken the places of those that were killed."""
        wait_until(lambda: all(node.is_healthy() for node in self.nodes if node.child.is_running()))

    def move_slot_of(self, key: str, to: Node) -> None:
        """What lies in it is lost on the way."""
        slot, name = key_slot(key.encode()), bytes(to.ask("MYID")).decode()
        source = self.master_of(key).client
        for lying in source.execute_command("CLUSTER GETKEYSINSLOT", slot, 1000):  # type: ignore[no-untyped-call]
            source.delete(lying)
        for node in (to, *self.nodes[:MASTERS]):
            node.ask("SETSLOT", slot, "NODE", name)

    def close(self) -> None:
        for node in self.nodes:
            node.client.close()
            node.child.stop()


def choose_cluster_port() -> int:
    """A port that is free together with the bus's above it."""
    while True:
        with socket.socket() as probe, socket.socket() as bus_probe:
            probe.bind((LOOPBACK, 0))
            port: int = probe.getsockname()[1]
            if port + BUS > 65_535:
                port -= BUS
            with contextlib.suppress(OSError):
                bus_probe.bind((LOOPBACK, port + BUS))
                return port
