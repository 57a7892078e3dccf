"""Rows as they lie in the store: each sealed by itself, so that a reader knows it for its own.

A store can lose a part of a session, hand back zeros where a part was, or be written to by others.
So no row is believed for where it lies. One of two seals goes with each row, at a fixed size, so
that chunks and offsets in the store stay as they are:

    Checksum   row | XXH3 (8 bytes) of the row, seeded with its session and position: finds what is
               damaged, lost or moved, at some 50 GB/s; anyone can compute it
    KvCipher   nonce (12 bytes) | ciphertext | tag (16 bytes): AES-256-GCM with the session's key,
               bound to session, generation and position, so that whoever runs the store can
               neither read rows nor put older ones back

A row has a fresh random nonce: it may be computed twice with other last bits, and a nonce must not
see two texts. A cipher binds rows to their generation, so a cut-back has a session's rows stored
anew; checksummed rows below the fork stay as they are.
"""

from __future__ import annotations

import os
from typing import Protocol, TypeAlias

import numpy as np
import xxhash
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE_BYTES, TAG_BYTES, SUM_BYTES = 12, 16, 8


ByteRows: TypeAlias = "np.ndarray[tuple[int, int], np.dtype[np.uint8]]"  # (rows, row bytes)


class ForgedRows(Exception):
    """A row was not sealed for this session and position. `whole` are the rows before it."""

    def __init__(self, position: int, whole: bytes = b"") -> None:
        super().__init__(f"row {position} in the store is damaged or not this session's")
        self.whole = whole


class RowSeal(Protocol):
    """Seals rows on their way into the store, and opens them on their way back."""

    name: str  # part of the shape that the store compares
    overhead: int  # bytes that a row is longer in the store
    outlives_generation: bool  # whether rows below a fork hold in the next generation as they lie

    def seal(self, rows: bytes, start: int, row_bytes: int, generation: int) -> bytes:
        """Rows from position `start` on, each `row_bytes` long, to `overhead` more each."""
        ...

    def open_rows(self, stored: memoryview, start: int, generation: int, into: ByteRows) -> int:
        """The reverse, for rows that were sealed in `generation`: put them `into` their place.

        As many as that has room for. Returns how many were right before the first that was not.
        """
        ...


def unseal(seal: RowSeal, stored: bytes, start: int, row_bytes: int, generation: int) -> bytes:
    """Rows of `row_bytes` from position `start` on, as they were. Raises ForgedRows."""
    rows = np.empty((len(stored) // (row_bytes + seal.overhead), row_bytes), np.uint8)
    whole = seal.open_rows(memoryview(stored), start, generation, rows)
    if whole < len(rows):
        raise ForgedRows(start + whole, rows[:whole].tobytes())
    return rows.tobytes()


def unseal_blob(seal: RowSeal, stored: bytes, generation: int) -> bytes:
    """One row of whatever length, at position `generation`. Raises ForgedRows."""
    if len(stored) <= seal.overhead:
        raise ForgedRows(generation)
    return unseal(seal, stored, generation, len(stored) - seal.overhead, 0)


class Checksum:
    """Finds rows that are damaged, of another session, or of another place in it."""

    name = "checked"
    overhead = SUM_BYTES
    outlives_generation = True

    def __init__(self, session_key: bytes) -> None:
        self._seed = xxhash.xxh3_64_intdigest(session_key)

    def seal(self, rows: bytes, start: int, row_bytes: int, generation: int) -> bytes:
        view, count = memoryview(rows), len(rows) // row_bytes
        if count == 1:
            return rows + self._sum(view, start)
        parts: list[bytes | memoryview] = []
        for index in range(count):
            row = view[index * row_bytes : (index + 1) * row_bytes]
            parts += (row, self._sum(row, start + index))
        return b"".join(parts)

    def open_rows(self, stored: memoryview, start: int, generation: int, into: ByteRows) -> int:
        count, row_bytes = into.shape
        size = row_bytes + SUM_BYTES
        table = np.frombuffer(stored, np.uint8, count * size).reshape(count, size)
        sums = np.ascontiguousarray(table[:, row_bytes:]).view(">u8")[:, 0].tolist()
        whole, seed, digest = 0, self._seed + start, xxhash.xxh3_64_intdigest
        for checksum in sums:
            at = whole * size
            if digest(stored[at : at + row_bytes], (seed + whole) % 2**64) != checksum:
                break
            whole += 1
        into[:whole] = table[:whole, :row_bytes]
        return whole

    def _sum(self, row: memoryview, position: int) -> bytes:
        return xxhash.xxh3_64_digest(row, seed=(self._seed + position) % 2**64)


class KvCipher:
    """Encrypts and decrypts the rows of one session."""

    name = "encrypted"
    overhead = NONCE_BYTES + TAG_BYTES
    outlives_generation = False

    def __init__(self, key: bytes, session_key: bytes) -> None:
        self._aead = AESGCM(key)
        self._session_key = session_key

    def seal(self, rows: bytes, start: int, row_bytes: int, generation: int) -> bytes:
        count = len(rows) // row_bytes
        nonces = os.urandom(NONCE_BYTES * count)
        parts = []
        for index in range(count):
            nonce = nonces[index * NONCE_BYTES : (index + 1) * NONCE_BYTES]
            row = rows[index * row_bytes : (index + 1) * row_bytes]
            parts += [nonce, self._aead.encrypt(nonce, row, self._bind(start + index, generation))]
        return b"".join(parts)

    def open_rows(self, stored: memoryview, start: int, generation: int, into: ByteRows) -> int:
        count, row_bytes = into.shape
        size = row_bytes + self.overhead
        for index in range(count):
            at = index * size
            nonce, box = stored[at : at + NONCE_BYTES], stored[at + NONCE_BYTES : at + size]
            try:
                row = self._aead.decrypt(nonce, box, self._bind(start + index, generation))
            except InvalidTag:
                return index
            into[index] = np.frombuffer(row, np.uint8)
        return count

    def _bind(self, position: int, generation: int) -> bytes:
        return self._session_key + generation.to_bytes(8, "little") + position.to_bytes(8, "little")
