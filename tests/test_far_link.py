"""The far link takes the time that a link takes: half a round trip each way, and its bytes."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from chaos.far_link import FarLink


@pytest.fixture
def echo() -> str:
    """A server that sends back what it is sent."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        end, _ = server.accept()
        while piece := end.recv(1 << 16):
            end.sendall(piece)
        end.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"tcp://127.0.0.1:{server.getsockname()[1]}"


def test_what_is_sent_comes_back_as_it_was_and_no_sooner_than_it_can(echo: str) -> None:
    link = FarLink(echo, rtt_s=0.1, bytes_per_s=1e6)
    host, port = link.endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as near:
        for sent in (b"one byte", bytes(range(256)) * 400):
            begun_at = time.monotonic()
            threading.Thread(target=near.sendall, args=(sent,)).start()
            got = b""
            while len(got) < len(sent):
                got += near.recv(1 << 16)
            assert got == sent
            assert time.monotonic() - begun_at >= 0.1 + len(sent) / 1e6
    link.close()


def test_an_end_of_one_side_ends_the_other(echo: str) -> None:
    link = FarLink(echo, rtt_s=0.01, bytes_per_s=1e6)
    host, port = link.endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as near:
        near.sendall(b"last words")
        near.shutdown(socket.SHUT_WR)
        got = b""
        while piece := near.recv(1 << 16):
            got += piece
        assert got == b"last words"
    link.close()
