"""A small HTTP server beside a loop: /metrics for Prometheus, /health and /ready for probes.

The loop publishes what it knows once a second, as text; the server's thread hands out the last of
that and touches nothing of the loop's.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from common.errors import SettingsError

log = logging.getLogger("midspan.metrics")

EVERY_S = 1.0
CLIENT_S = 5.0  # how long a client may let us wait for its next byte
MAX_CLIENTS = 16  # at once; a thread and a file each
STUCK_S = 60.0  # a loop that has published nothing for so long does not turn any more
TEXT = "text/plain; charset=utf-8"


class _Families:
    """A registry's collector that has its families already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> list[Metric]:
        return self._families


class MetricsPage:
    """Serves at `address`, HOST:PORT or a port of loopback, until `close`.

    Raises SettingsError for what is no address, or one that is taken.
    """

    def __init__(self, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        host, port = parse_address(address)
        self._clock = clock
        self._text = b""
        self._why_not_ready = "it has not begun yet"
        self._published_at = clock()
        self._due_at = 0.0
        page = self

        class Handler(BaseHTTPRequestHandler):
            timeout = CLIENT_S

            def do_GET(self) -> None:
                status, kind, body = page.answer(self.path)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Not worth a line each."""

        try:
            self._server = _Server((host, port), Handler)
        except OSError as error:
            raise SettingsError(f"--metrics {address} cannot be bound: {error.strerror}") from error
        self.address = f"{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="midspan-metrics", daemon=True
        )
        self._thread.start()

    def is_due(self) -> bool:
        """Whether it is time to publish again."""
        return self._clock() >= self._due_at

    def publish(self, families: Iterable[Metric], why_not_ready: str = "") -> None:
        """What the page says from now on; `why_not_ready` is empty for who is."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(families))
        self._text = generate_latest(registry)
        self._why_not_ready = why_not_ready
        self._published_at = self._clock()
        self._due_at = self._published_at + EVERY_S

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, content type and body for a path."""
        path = path.partition("?")[0]
        silent_s = self._clock() - self._published_at
        if path == "/metrics":
            return 200, CONTENT_TYPE_LATEST, self._text
        if path not in ("/health", "/ready"):
            return 404, TEXT, b"here are /metrics, /health and /ready\n"
        if silent_s > STUCK_S:
            return 503, TEXT, f"its loop has not turned for {silent_s:.0f} s\n".encode()
        if path == "/ready" and self._why_not_ready:
            return 503, TEXT, f"{self._why_not_ready}\n".encode()
        return 200, TEXT, b"ok\n"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """A thread for each client, for so many at once; others are hung up on."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._places = threading.Semaphore(MAX_CLIENTS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # there is no thread
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is not worth a traceback."""
        log.debug("a client of the metrics page failed", exc_info=True)


def parse_address(address: str) -> tuple[str, int]:
    """HOST:PORT, or a port of loopback. Raises SettingsError."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise SettingsError(f"--metrics {address} is no address; expected PORT or HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)
