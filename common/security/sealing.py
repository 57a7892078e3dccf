"""Seal a session's key for the workers of a pool, so that the broker in between cannot read it.

The workers share a Curve25519 pair, the pool key; edges know its public half. Sealing draws a pair
for once, agrees on a secret with the pool key (X25519, HKDF-SHA256) and encrypts with AES-256-GCM:
    ephemeral public key (32 bytes) | ciphertext and tag (48 bytes)
The secret is used once, so the nonce is zero.
"""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from zmq.utils import z85

from common.errors import ProtocolError, SettingsError
from common.security.keys import KeyPair

KEY_BYTES = 32
NONCE = bytes(12)


def draw_key() -> bytes:
    """A fresh AES-256 key."""
    return secrets.token_bytes(KEY_BYTES)


def seal(key: bytes, pool_public: bytes) -> bytes:
    """Encrypt `key` to the pool key `pool_public` (Z85): 80 bytes.

    Raises SettingsError if that is no public key.
    """
    once = X25519PrivateKey.generate()
    ours = once.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    theirs = z85.decode(pool_public)
    try:
        shared = once.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError as error:
        raise SettingsError(f"{pool_public.decode()} is no public key of a pool") from error
    return ours + AESGCM(_derive(shared, ours + theirs)).encrypt(NONCE, key, None)


def open_sealed(sealed: bytes, pool: KeyPair) -> bytes:
    """The key that `seal` was given. Raises ProtocolError if it was sealed for another pool key."""
    private = X25519PrivateKey.from_private_bytes(z85.decode(pool.secret))
    theirs, box = sealed[:KEY_BYTES], sealed[KEY_BYTES:]
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(theirs))
        salt = theirs + z85.decode(pool.public)
        key = AESGCM(_derive(shared, salt)).decrypt(NONCE, box, None)
    except (InvalidTag, ValueError) as error:
        raise ProtocolError(
            "the session's sealed key does not open with this worker's --pool-key; "
            "the edge must be given the public half of the same pool key"
        ) from error
    if len(key) != KEY_BYTES:
        raise ProtocolError(f"the session's key has {len(key)} bytes; expected {KEY_BYTES}")
    return key


def _derive(shared: bytes, salt: bytes) -> bytes:
    kdf = HKDF(hashes.SHA256(), KEY_BYTES, salt=salt, info=b"midspan kv key")
    return kdf.derive(shared)
