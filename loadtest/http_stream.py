"""Read one streamed answer of an HTTP/1.1 server: a request, a status, server-sent events.

A connection for each answer, and no more than that takes: what a client does between two events is
in every gap that is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from common.errors import SettingsError

MAX_LINE = 1 << 20
DATA = b"data:"


@dataclass(frozen=True, slots=True)
class Address:
    """Where an endpoint is: http://HOST:PORT/PATH, or https."""

    host: str
    port: int
    path: str
    is_secure: bool

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_url(text: str) -> Address:
    """Raises SettingsError."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise SettingsError(f"--url is {text[:80]!r}; expected http://HOST:PORT/v1")
    is_secure = parts.scheme == "https"
    path = parts.path.rstrip("/")
    return Address(parts.hostname, port or (443 if is_secure else 80), path, is_secure)


@dataclass(slots=True)
class Response:
    """A status, and what comes after it."""

    status: int
    reader: asyncio.StreamReader
    is_chunked: bool

    async def lines(self) -> AsyncIterator[bytes]:
        """The body, line by line, without their ends."""
        rest = b""
        async for piece in self._pieces():
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                yield line.rstrip(b"\r")
        if rest:
            yield rest

    async def events(self) -> AsyncIterator[bytes]:
        """The data of each server-sent event."""
        async for line in self.lines():
            if line.startswith(DATA):
                yield line[len(DATA) :].strip()

    async def read(self) -> bytes:
        """The whole body, for an error's message."""
        return b"\n".join([line async for line in self.lines()])

    async def _pieces(self) -> AsyncIterator[bytes]:
        if not self.is_chunked:
            while piece := await self.reader.read(1 << 16):
                yield piece
            return
        while size := int((await self.reader.readline()).partition(b";")[0], 16):
            yield await self.reader.readexactly(size)
            await self.reader.readline()


@contextlib.asynccontextmanager
async def post(
    address: Address, path: str, body: bytes, api_key: str | None
) -> AsyncIterator[Response]:
    """Send a JSON body. Raises OSError, EOFError or ValueError when there is no sense in it."""
    reader, writer = await asyncio.open_connection(
        address.host, address.port, ssl=address.is_secure or None, limit=MAX_LINE
    )
    try:
        head = [
            f"POST {address.path}{path} HTTP/1.1", f"Host: {address.authority}",
            "Content-Type: application/json", f"Content-Length: {len(body)}",
            "Accept: text/event-stream", "Connection: close",
        ]  # fmt: skip
        if api_key is not None:
            head.append(f"Authorization: Bearer {api_key}")
        writer.write("\r\n".join([*head, "", ""]).encode() + body)
        status = int((await reader.readline()).split(b" ", 2)[1])
        headers = [line async for line in _read_headers(reader)]
        is_chunked = any(
            name == b"transfer-encoding" and b"chunked" in value for name, value in headers
        )
        yield Response(status, reader, is_chunked)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _read_headers(reader: asyncio.StreamReader) -> AsyncIterator[tuple[bytes, bytes]]:
    while line := (await reader.readline()).strip():
        name, _, value = line.partition(b":")
        yield name.strip().lower(), value.strip().lower()
