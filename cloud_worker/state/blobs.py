"""Whole blobs in a KvStore: a row of bytes each, written in pieces of a chunk.

What an image session leaves in the store are blobs: its conditioning, and its latents after a step.
So is the state of a text in layers that have one. A blob has a generation. A newer one replaces an
older one as a whole, and a writer of an older one is refused, by the fence that guards KV rows.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from cloud_worker.state.row_seals import Checksum, ForgedRows, RowSeal, unseal_blob
from cloud_worker.state.store import (
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
from common.errors import StoreUnavailable

LARGEST = 256 << 20
CHECK_LIMIT_S = 2.0
CONDITIONING_ITEM, LATENTS = "conditioning", "latents"
STATE = "state"  # of a text, in layers that keep one for all of it


@dataclass(slots=True)
class _Save:
    blob: bytes
    generation: int
    step: int
    account: str
    then: Callable[[], None] | None
    written: int = 0


class Blobs:
    """Saves and loads blobs by key. `writer` names this worker to the fence.

    Counts loads_given_up and commits_over_share in `stats`.
    """

    def __init__(self, store: KvStore, shape: str, writer: str, stats: dict[str, int]) -> None:
        self._store = store
        self._shape = shape
        self._writer = writer
        self._saves: dict[bytes, _Save] = {}
        self._loads: dict[bytes, tuple[int, RowSeal, Callable[[bytes], None]]] = {}
        self._stats = stats

    def is_settled(self) -> bool:
        """Whether nothing is on its way into the store."""
        return not self._saves

    def is_saving(self, key: bytes) -> bool:
        """Whether a blob of that key is on its way into the store."""
        return key in self._saves

    def save(
        self,
        key: bytes,
        generation: int,
        step: int,
        blob: bytes,
        seal: RowSeal,
        account: str = "",
        then: Callable[[], None] | None = None,
    ) -> None:
        """Begin to write a blob, unless that is under way; an older one is then dropped.

        `then` is called once all of it is there.
        """
        under_way = self._saves.get(key)
        if not self._store.is_up() or (under_way and under_way.generation == generation):
            return
        stored = seal.seal(blob, generation, len(blob), 0)
        self._saves[key] = _Save(stored, generation, step, account, then)
        self._write_next(key)

    def load(
        self, key: bytes, generation: int, seal: RowSeal, then: Callable[[bytes], None]
    ) -> None:
        """Begin to read a blob; `then` gets it, or b"" if the store does not have it."""
        self._loads[key] = (generation, seal, then)
        self._store.begin_load(Load(key, self._shape, generation, 0, 0, LARGEST, 1))

    def check(self, blob: bytes, is_over: Callable[[], bool]) -> None:
        """Save a blob, read it back and compare. Raises StoreUnavailable."""
        key, loaded = secrets.token_bytes(16), list[bytes]()
        seal = Checksum(key)
        self.save(key, 0, 0, blob, seal)
        give_up_at = time.monotonic() + CHECK_LIMIT_S
        while not loaded and time.monotonic() < give_up_at and not is_over():
            if self.is_settled() and key not in self._loads:
                self.load(key, 0, seal, loaded.append)
            for event in self._store.poll():
                self.on_event(event)
            time.sleep(0.002)
        self.forget(key)
        if loaded != [blob]:
            if not self._store.is_up():
                raise StoreUnavailable("it does not answer")
            raise StoreUnavailable("the store does not give back what it was given")

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
            is_over = isinstance(event, CommitRefused) and event.code == "over"
            self._stats["commits_over_share"] += is_over
            del self._saves[event.session_key]  # done, overtaken, or for the edge to send again
            if isinstance(event, Committed) and save.then is not None:
                save.then()

    def _write_next(self, key: bytes) -> None:
        save = self._saves[key]
        start, end = save.written, min(save.written + CHUNK_BYTES, len(save.blob))
        self._store.begin_commit(
            Commit(
                key, self._shape, save.generation, 0, save.step, self._writer, start, end,
                start > 0, save.blob[start:end], 1, save.account,
            )
        )  # fmt: skip

    def _on_loaded(self, event: Loaded) -> None:
        wanted = self._loads.get(event.session_key)
        if wanted is None or wanted[0] != event.generation:
            return
        generation, seal, then = self._loads.pop(event.session_key)
        self._stats["loads_given_up"] += event.given_up
        try:
            then(unseal_blob(seal, event.rows, generation))
        except ForgedRows:
            then(b"")


def item_key(session_key: bytes, item: str) -> bytes:
    """Names an item of a stage in the store."""
    return session_key + f"/{item}".encode()


def item_keys(session_key: bytes) -> list[bytes]:
    """Of all items that are blobs, of images and of texts."""
    return [item_key(session_key, item) for item in (CONDITIONING_ITEM, LATENTS, STATE)]
