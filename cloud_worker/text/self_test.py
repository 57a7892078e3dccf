"""What a worker proves before it announces itself: a real step, through its codec and its store."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable

import torch

from cloud_worker.loop.batcher import Task
from cloud_worker.state.store import Commit, CommitFailed, CommitRefused, KvStore, Load, Loaded
from cloud_worker.text.executor import TextExecutor
from cloud_worker.text.warm_cache import WarmSession
from common.codecs.codec import make_codec
from common.errors import MidspanError, StoreUnavailable
from common.protocol.messages import Opening, Part, Service, Step

log = logging.getLogger("midspan.worker")

ROWS = 2
STORE_LIMIT_S = 2.0
CODEC = "int8"


def check_executor(executor: TextExecutor, service: Service) -> WarmSession:
    """Compute a step of two rows and look at what comes out. Raises MidspanError.

    Returns the session with the KV of those rows.
    """
    hidden = executor.model.hidden
    rows = torch.randn(ROWS, hidden, generator=torch.Generator().manual_seed(0))
    body = make_codec(CODEC, "up").encode(rows)
    opening = Opening(service.model, [service.part], hidden, [CODEC], "")
    session_id = secrets.token_bytes(16)
    step = Step(session_id, 0, 0, 0, 0, [Part(0, [ROWS], len(body))], ROWS, 0, 1000)
    task = Task(step, opening, body, 1, 0, 0, time.monotonic())
    session = WarmSession(task.session_key, executor.model.new_kv(), 0, 0)
    executor.check(task)
    computed = executor.run([(task, session)])[0]
    if computed.failure:
        raise MidspanError(f"this worker cannot compute its own test step: {computed.failure}")
    make_codec(CODEC, "down").decode(computed.body, ROWS, hidden)
    return session


def check_store(
    store: KvStore, session: WarmSession, shape: str, row_bytes: int, is_over: Callable[[], bool]
) -> None:
    """Commit the session's rows, read them back and compare. Raises StoreUnavailable."""
    rows = session.kv.read_bytes(0, ROWS)
    store.begin_commit(
        Commit(session.session_key, shape, 0, 0, 0, "self-test", 0, ROWS, False, rows, row_bytes)
    )
    store.begin_load(Load(session.session_key, shape, 0, 0, 0, ROWS, row_bytes))
    give_up_at = time.monotonic() + STORE_LIMIT_S
    while time.monotonic() < give_up_at and not is_over():
        for event in store.poll():
            if event.session_key != session.session_key:
                continue
            if isinstance(event, CommitFailed | CommitRefused):
                raise StoreUnavailable(f"the store did not take a test row: {event}")
            if isinstance(event, Loaded):
                store.begin_delete(session.session_key)
                if event.rows != rows:
                    raise StoreUnavailable("the store gave other rows back than it was given")
                return
        time.sleep(0.002)
    raise StoreUnavailable(f"the store did not answer a test within {STORE_LIMIT_S:g} s")
