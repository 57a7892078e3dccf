"""A worker in the middle of a route whose answers are no good: another one computes its part."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import zmq
from pools import GREEDY, PROMPTS, reference_tokens

from common.protocol.messages import Announce, Dispatch, Service, Step, StepReply
from common.protocol.sockets import Context, connect_dealer, has_message, receive_frames
from common.protocol.wire import decode_header, encode_header
from common.spans.cut import Span
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.engine import Engine
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

SPANS = (Span(2, 4), Span(4, 6))
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=0)) as running:
        for span in SPANS:
            running.start_worker(span=str(span))
        running.wait_for_workers(len(SPANS))
        yield running


@contextlib.contextmanager
def lying_worker(broker: str, service: Service, way: str) -> Iterator[list[int]]:
    """Answers every step with what nobody can use, in a thread; counts the steps it got."""
    stop = threading.Event()
    got: list[int] = []

    def run() -> None:
        context: Context = zmq.Context()
        socket = connect_dealer(context, broker)
        announce_at = 0.0
        while not stop.is_set():
            if time.monotonic() >= announce_at:
                socket.send(encode_header(Announce("liar", [service], 64, 100, host="here")))
                announce_at = time.monotonic() + 0.05
            socket.poll(5)
            if not has_message(socket):
                continue
            frames = receive_frames(socket)
            dispatch = decode_header(frames[0])
            if isinstance(dispatch, Dispatch):
                step = decode_header(frames[1])
                assert isinstance(step, Step)
                got.append(step.rows)
                size = step.rows * service.hidden * 4
                bodies = {
                    "garbage": [b"x" * 7],
                    "empty": [b""],
                    "huge": [bytes(60 << 20)],
                    "nan": [b"\xff" * size],
                    "bodies": [bytes(size), bytes(size)],
                    "none": [],
                    "rows": [bytes(size)],
                }[way]
                rows = 2**53 if way == "rows" else step.rows
                reply = StepReply(*step.key, dispatch.attempt, rows, 0, "liar", 0, 0)
                socket.send_multipart([encode_header(reply), *bodies])
        context.destroy(linger=0)

    thread = threading.Thread(target=run, name="liar", daemon=True)
    thread.start()
    try:
        yield got
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("way", ["garbage", "empty", "huge", "nan", "bodies", "none", "rows"])
@pytest.mark.parametrize("hop", [0, 1])
def test_the_tokens_are_those_of_the_unsplit_model(
    pool: LocalPool, demo_ends: ModelEnds, whole_model: torch.nn.Module, way: str, hop: int
) -> None:
    tokenizer = TextTokenizer(demo_ends.directory)
    (wanted,) = reference_tokens(whole_model, tokenizer, [PROMPTS[0]], NEW_TOKENS)
    ids = tokenizer.encode(PROMPTS[0])
    service = Service(demo_ends.fingerprint, "x", str(SPANS[hop]), demo_ends.hidden, "float32")
    settings = uniform_settings("fp32", route=SPANS)
    with (
        lying_worker(pool.worker_endpoint, service, way) as got,
        Engine(demo_ends, [pool.edge_endpoint], settings, timeout_s=20) as engine,
    ):
        client = pool.connect()
        while len(client.status()["workers"]) < 3:
            time.sleep(0.02)
        for _ in range(8):
            assert [t.token_id for t in engine.submit(ids, NEW_TOKENS, GREEDY)] == wanted
            if got:
                break
        else:
            raise AssertionError("the liar got no step")
        status = client.status()
        while len(client.status()["workers"]) < 3:
            time.sleep(0.02)
    while len(client.status()["workers"]) > 2:
        time.sleep(0.02)
    client.close()
    assert status["steps_in_flight"] == 0
