"""Seal a session's key for the workers of a pool, so that the broker in between cannot read it.

The workers share a Curve25519 pair, the pool key; edges know its public half. What is sealed is a
sealed box of NaCl (https://doc.libsodium.org/public-key_cryptography/sealed_boxes):
    ephemeral public key (32 bytes) | tag and ciphertext (48 bytes)
"""

from __future__ import annotations

import secrets

from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox
from zmq.utils import z85

from common.errors import ProtocolError, SettingsError
from common.security.keys import KeyPair

KEY_BYTES = 32


def draw_key() -> bytes:
    """A fresh AES-256 key."""
    return secrets.token_bytes(KEY_BYTES)


def seal(key: bytes, pool_public: bytes) -> bytes:
    """Encrypt `key` to the pool key `pool_public` (Z85): 80 bytes.

    Raises SettingsError if that is no public key: a point of low order, with which anyone could
    open what was sealed.
    """
    try:
        return SealedBox(PublicKey(z85.decode(pool_public))).encrypt(key)
    except CryptoError as error:
        raise SettingsError(f"{pool_public.decode()} is no public key of a pool") from error


def open_sealed(sealed: bytes, pool: KeyPair) -> bytes:
    """The key that `seal` was given. Raises ProtocolError if it was sealed for another pool key."""
    try:
        key = SealedBox(PrivateKey(z85.decode(pool.secret))).decrypt(sealed)
    except CryptoError as error:
        raise ProtocolError(
            "the session's sealed key does not open with this worker's --pool-key; "
            "the edge must be given the public half of the same pool key"
        ) from error
    if len(key) != KEY_BYTES:
        raise ProtocolError(f"the session's key has {len(key)} bytes; expected {KEY_BYTES}")
    return key
