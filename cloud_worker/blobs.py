"""Whole blobs in a KvStore: a row of bytes each, written in pieces of a chunk.

What an image session leaves in the store are blobs: its conditioning, and its latents after a step.
A blob has a generation. A newer one replaces an older one as a whole, and a writer of an older one
is refused, by the fence that guards KV rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cloud_worker.kv_cipher import ForgedRows, KvCipher
from cloud_worker.store import (
    CHUNK_BYTES,
    Commit,
    CommitFailed,
    CommitRefused,
    Committed,
    KvStore,
    Load,
    Loaded,
    StoreEvent,
)

LARGEST = 256 << 20


@dataclass(slots=True)
class _Save:
    blob: bytes
    generation: int
    step: int
    written: int = 0


class Blobs:
    """Saves and loads blobs by key. `writer` names this worker to the fence."""

    def __init__(self, store: KvStore, shape: str, writer: str) -> None:
        self._store = store
        self._shape = shape
        self._writer = writer
        self._saves: dict[bytes, _Save] = {}
        self._loads: dict[bytes, tuple[int, KvCipher | None, Callable[[bytes], None]]] = {}

    def is_settled(self) -> bool:
        """Whether nothing is on its way into the store."""
        return not self._saves

    def save(
        self, key: bytes, generation: int, step: int, blob: bytes, cipher: KvCipher | None
    ) -> None:
        """Begin to write a blob; an older one that is still being written is dropped."""
        if not self._store.is_up():
            return
        if cipher is not None:
            blob = cipher.encrypt(blob, generation, len(blob))
        self._saves[key] = _Save(blob, generation, step)
        self._write_next(key)

    def load(
        self, key: bytes, generation: int, cipher: KvCipher | None, then: Callable[[bytes], None]
    ) -> None:
        """Begin to read a blob; `then` gets it, or b"" if the store does not have it."""
        self._loads[key] = (generation, cipher, then)
        self._store.begin_load(Load(key, self._shape, generation, 0, 0, LARGEST, 1))

    def forget(self, key: bytes) -> None:
        """Delete a blob, and drop what was begun with it."""
        self._saves.pop(key, None)
        self._loads.pop(key, None)
        self._store.begin_delete(key)

    def on_event(self, event: StoreEvent) -> None:
        """Something the store did; perhaps for others."""
        if isinstance(event, Loaded):
            self._on_loaded(event)
            return
        save = self._saves.get(event.session_key)
        if save is None or save.generation != event.generation:
            return
        if isinstance(event, Committed) and event.position < len(save.blob):
            save.written = event.position
            self._write_next(event.session_key)
        elif isinstance(event, Committed | CommitRefused | CommitFailed):
            del self._saves[event.session_key]  # done, overtaken, or for the edge to send again

    def _write_next(self, key: bytes) -> None:
        save = self._saves[key]
        start, end = save.written, min(save.written + CHUNK_BYTES, len(save.blob))
        self._store.begin_commit(
            Commit(
                key, self._shape, save.generation, 0, save.step, self._writer, start, end,
                start > 0, save.blob[start:end], 1,
            )
        )  # fmt: skip

    def _on_loaded(self, event: Loaded) -> None:
        wanted = self._loads.get(event.session_key)
        if wanted is None or wanted[0] != event.generation:
            return
        generation, cipher, then = self._loads.pop(event.session_key)
        blob = event.rows
        if cipher is not None and blob:
            try:
                blob = cipher.decrypt_one(blob, generation)
            except ForgedRows:
                blob = b""
        then(blob)
