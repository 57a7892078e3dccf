"""What a worker proves before it announces a span: a real step, through its codec."""

from __future__ import annotations

import secrets
import time

import torch

from cloud_worker.loop.batcher import Task
from cloud_worker.state.row_seals import Checksum
from cloud_worker.text.executor import TextExecutor
from cloud_worker.text.stage import TextStage
from common.codecs.codec import make_codec
from common.errors import MidspanError
from common.protocol.messages import Opening, Part, Service, Step

ROWS = 2
CODEC = "int8"


def compute_test_rows(executor: TextExecutor, service: Service) -> bytes:
    """Compute a step of two rows and look at what comes out. Raises MidspanError.

    Returns the KV of those rows, and the state after them, as they would lie in the store.
    """
    hidden = executor.model.hidden
    rows = torch.randn(ROWS, hidden, generator=torch.Generator().manual_seed(0))
    body = make_codec(CODEC, "up").encode(rows)
    opening = Opening(service.model, [service.part], hidden, [CODEC], "")
    session_id = secrets.token_bytes(16)
    step = Step(session_id, 0, 0, 0, 0, [Part(0, [ROWS], len(body))], ROWS, 0, 1000)
    task = Task(step, opening, body, 1, 0, 0, time.monotonic())
    kv = executor.model.new_kv()
    stage = TextStage(task.session_key, Checksum(task.session_key), kv, 0, 0)
    executor.check(task)
    (reply,) = executor.run([(task, stage)])
    if isinstance(reply, str):
        raise MidspanError(f"this worker cannot compute its own test step: {reply}")
    make_codec(CODEC, "down").decode(reply, ROWS, executor.model.reply_width)
    state = kv.states.pack(kv.states.current) if kv.states is not None else b""
    return kv.read_bytes(0, ROWS) + state or bytes(1)  # of layers that keep nothing
