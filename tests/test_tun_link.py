"""The link between two network namespaces: real TCP over it, no sooner than the link allows."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from chaos.tun_link import NEAR, TunLink, in_network_of, leave_network

SENT = bytes(range(256)) * 200


@pytest.fixture
def apart() -> Iterator[Callable[[Callable[[], object]], object]]:
    """Runs something in a thread whose network is another one than the tests'."""
    if os.geteuid() != 0 or not os.access("/dev/net/tun", os.W_OK):
        pytest.skip("needs root and /dev/net/tun")
    with ThreadPoolExecutor(1) as alone:
        error = alone.submit(leave_network).exception()
        if error is not None:
            pytest.skip(str(error))
        yield lambda work: alone.submit(work).result(60)


def echo(server: socket.socket) -> None:
    end, _ = server.accept()
    while piece := end.recv(1 << 16):
        end.sendall(piece)
    end.close()


def test_packets_come_as_they_were_sent_and_no_sooner_than_they_can(
    apart: Callable[[Callable[[], object]], object],
) -> None:
    def send_across() -> None:
        link = TunLink()
        server = socket.create_server((NEAR, 0))
        threading.Thread(target=echo, args=(server,), daemon=True).start()
        link.set(rtt_ms=40, mbit=8)
        with in_network_of(link.far_process):
            client = socket.create_connection(server.getsockname())
        for sent in (b"one byte", SENT):
            begun_at = time.monotonic()
            threading.Thread(target=client.sendall, args=(sent,), daemon=True).start()
            got = b""
            while len(got) < len(sent):
                got += client.recv(1 << 16)
            assert got == sent
            assert time.monotonic() - begun_at >= 0.04 + len(sent) / 1e6
        client.close()
        server.close()
        link.close()

    apart(send_across)


def test_the_other_side_is_not_reached_from_here(
    apart: Callable[[Callable[[], object]], object],
) -> None:
    def listen() -> tuple[socket.socket, TunLink]:
        link = TunLink()
        return socket.create_server((NEAR, 0)), link

    server, link = apart(listen)  # type: ignore[misc]
    with socket.socket() as outside:
        outside.settimeout(0.3)
        assert outside.connect_ex(server.getsockname()) != 0
    server.close()
    link.close()
