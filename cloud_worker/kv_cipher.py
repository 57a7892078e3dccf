"""KV rows at rest, encrypted with the session's key: AES-256-GCM, each row by itself.

A row keeps its fixed size, so chunks and offsets in the store stay as they are. Each has a fresh
random nonce (a row may be computed twice with other last bits, and a nonce must not see two texts)
and is bound to its session and position, so that rows cannot be moved about.
    nonce (12 bytes) | ciphertext | tag (16 bytes)
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE_BYTES, TAG_BYTES = 12, 16
ROW_OVERHEAD = NONCE_BYTES + TAG_BYTES


class ForgedRows(Exception):
    """Rows that were not encrypted with this key for this session and position."""


class KvCipher:
    """Encrypts and decrypts the rows of one session."""

    def __init__(self, key: bytes, session_key: bytes) -> None:
        self._aead = AESGCM(key)
        self._session_key = session_key

    def encrypt(self, rows: bytes, start: int, row_bytes: int) -> bytes:
        """Rows from position `start` on, each `row_bytes` long, to ROW_OVERHEAD more each."""
        count = len(rows) // row_bytes
        nonces = os.urandom(NONCE_BYTES * count)
        parts = []
        for index in range(count):
            nonce = nonces[index * NONCE_BYTES : (index + 1) * NONCE_BYTES]
            row = rows[index * row_bytes : (index + 1) * row_bytes]
            parts += [nonce, self._aead.encrypt(nonce, row, self._bind(start + index))]
        return b"".join(parts)

    def decrypt(self, stored: bytes, start: int, row_bytes: int) -> bytes:
        """The reverse. Raises ForgedRows."""
        size = row_bytes + ROW_OVERHEAD
        parts = []
        try:
            for index in range(len(stored) // size):
                at = index * size
                nonce, box = stored[at : at + NONCE_BYTES], stored[at + NONCE_BYTES : at + size]
                parts.append(self._aead.decrypt(nonce, box, self._bind(start + index)))
        except InvalidTag as error:
            raise ForgedRows(f"row {start + len(parts)}") from error
        return b"".join(parts)

    def decrypt_one(self, stored: bytes, position: int) -> bytes:
        """One row of whatever length. Raises ForgedRows."""
        if len(stored) < ROW_OVERHEAD:
            raise ForgedRows("too short")
        return self.decrypt(stored, position, len(stored) - ROW_OVERHEAD)

    def _bind(self, position: int) -> bytes:
        return self._session_key + position.to_bytes(8, "little")
