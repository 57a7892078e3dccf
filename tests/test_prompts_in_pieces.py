"""A long prompt travels in pieces, several at once, and whatever happens to one loses none."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
import zmq
from pools import GREEDY, intercept

from common.errors import BrokerUnavailable, MidspanError, StepOvertaken
from common.protocol.messages import Need, Opening, Part, Step, StepReply
from common.protocol.wire import decode_header
from common.settings import PIECES_AHEAD
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.engine.engine import Engine
from edge_agent.engine.exchange import Answered, Ask
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.text_session import LEAST_PIECE, TextSession
from edge_agent.text.work import AwaitAnswer, DropAsks, SendAhead

COUNT = 12
PROMPT_TOKENS = 420  # of a context of 512


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2, model="stories-llama")) as running:
        yield running


@pytest.fixture(scope="module")
def prompts(demo_directory: Path) -> list[list[int]]:
    """Long ones, which are all others from their first words on."""
    text = (demo_directory / "validation.txt").read_text()
    from edge_agent.text.tokenizer import TextTokenizer

    ids = TextTokenizer(demo_directory).encode(text[:40_000])
    return [ids[at : at + PROMPT_TOKENS] for at in range(0, 6 * PROMPT_TOKENS, PROMPT_TOKENS)]


@pytest.fixture(scope="module")
def wanted(whole_model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = whole_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def test_pieces_are_sent_before_the_first_is_answered(
    demo_ends: ModelEnds, prompts: list[list[int]]
) -> None:
    session = TextSession(demo_ends, uniform_settings("fp32"))
    working = session.answer(prompts[0], 1, GREEDY)
    ahead, most, sizes = deque[Ask](), 0, []
    result: Any = None
    driver = Session(demo_ends, None)  # type: ignore[arg-type]
    for _ in range(1000):
        try:
            work = working.send(result)
        except StopIteration:
            break
        result = None
        if isinstance(work, SendAhead):
            ahead.append(work.ask)
            sizes.append(work.ask.step.rows)  # type: ignore[union-attr]
            most = max(most, len(ahead))
        elif isinstance(work, AwaitAnswer):
            step = ahead.popleft().step
            assert isinstance(step, Step)
            reply = StepReply(*step.key, 1, step.reply_rows, 0, "w1", 0, 0)
            body = bytes(step.reply_rows * demo_ends.hidden * 4)
            result = Answered(reply, body, 0, 0, 0)
        else:
            result = driver._do(work) if not hasattr(work, "token_id") else None
    assert most == PIECES_AHEAD
    assert not ahead
    assert sum(sizes) == PROMPT_TOKENS
    assert max(sizes) == LEAST_PIECE


def test_long_prompts_at_once_give_the_tokens_of_the_unsplit_model_while_workers_die(
    pool: LocalPool, demo_ends: ModelEnds, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    with Engine(demo_ends, [pool.edge_endpoint], uniform_settings("fp32")) as engine:
        streams = [engine.submit(prompt, COUNT) for prompt in prompts * 2]
        redis.Redis.from_url(pool.redis_url).flushall()
        pool.kill_worker(sorted(pool.workers)[0])
        pool.start_worker()
        for stream, tokens in zip(streams, wanted * 2, strict=True):
            assert [token.token_id for token in stream] == tokens
    pool.wait_for_workers(2)


def test_a_broker_that_is_started_anew_gets_all_pieces(
    pool: LocalPool, demo_ends: ModelEnds, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    with Engine(demo_ends, [pool.edge_endpoint], uniform_settings("fp32")) as engine:
        streams = [engine.submit(prompt, COUNT) for prompt in prompts]
        assert pool.broker is not None
        pool.broker.kill()
        pool.start_broker()
        for stream, tokens in zip(streams, wanted, strict=True):
            assert [token.token_id for token in stream] == tokens
    pool.wait_for_workers(2)


@pytest.mark.parametrize("at", [0, 1, 3, 6])
@pytest.mark.parametrize("what", ["need", "overtaken", "unusable"])
def test_a_piece_that_went_wrong_is_sent_again_with_those_behind_it(
    client: BrokerClient,
    demo_ends: ModelEnds,
    prompts: list[list[int]],
    wanted: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    what: str,
) -> None:
    steps: list[Step] = []

    def spoil(step: Step) -> Answered | StepOvertaken | None:
        steps.append(step)
        if len(steps) != at + 1:
            return None
        if what == "overtaken":
            return StepOvertaken("a newer step of this session has arrived")
        if what == "need" and step.position:
            return Answered(Need(*step.key, 1, 0, [], "w9"), b"", 0, 0, 0)
        reply = StepReply(*step.key, 1, step.reply_rows, 0, "w9", 0, 0)
        return Answered(reply, b"\xff" * (step.reply_rows * demo_ends.hidden * 4), 0, 0, 0)  # NaN

    intercept(client, spoil, monkeypatch)
    session = Session(demo_ends, client, uniform_settings("fp32"))
    assert list(session.generate(prompts[0], COUNT, GREEDY)) == wanted[0]
    assert session.generation == 0
    numbers = [step.step for step in steps]
    assert len(set(numbers)) == len(numbers)


def test_what_was_sent_ahead_is_dropped_where_an_answer_fails(
    demo_ends: ModelEnds, prompts: list[list[int]]
) -> None:
    session = TextSession(demo_ends, uniform_settings("fp32"))
    seen: list[type] = []
    with pytest.raises(MidspanError, match="could not be used"):
        answer_with_nonsense(session, demo_ends, prompts[0], seen)
    assert DropAsks in seen


def answer_with_nonsense(
    session: TextSession, ends: ModelEnds, prompt: list[int], seen: list[type]
) -> None:
    """A pool all whose answers have more rows than were asked for."""
    driver = Session(ends, None)  # type: ignore[arg-type]
    working = session.answer(prompt, 1, GREEDY)
    nonsense = StepReply(session.session_id, 0, 0, 1, 999, 0, "w1", 0, 0)
    result: Any = None
    while True:
        work = working.send(result)
        seen.append(type(work))
        result = None
        if isinstance(work, AwaitAnswer | Ask):
            result = Answered(nonsense, b"", 0, 0, 0)
        elif not isinstance(work, SendAhead | DropAsks):
            result = driver._do(work)


def test_pieces_reach_a_broker_that_comes_late_in_their_order() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    client = BrokerClient([address], timeout_s=3.0)
    opening = Opening("model", ["2-6"], 8, ["fp32"], "")
    steps = [
        Step(bytes(16), 0, 0, number, number, [Part(0, [1], 32)], 1, 0, 60_000)
        for number in range(4)
    ]
    keys = [client.send_ahead(Ask(step, bytes(32), opening, False, True)) for step in steps]
    context = zmq.Context()
    broker = context.socket(zmq.ROUTER)
    broker.bind(address)
    with pytest.raises(BrokerUnavailable):
        client.await_answer(keys[0])
    came = []
    while broker.poll(100):
        message = decode_header(broker.recv_multipart()[1])
        if isinstance(message, Step):
            came.append(message.step)
    assert list(dict.fromkeys(came)) == [0, 1, 2, 3]  # some of them twice
    client.close()
    context.destroy(linger=0)
