"""Sessions that are cut back: edited prompts, regeneration, and rows that must not come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pools import GREEDY, PROMPTS, reference_tokens

from common.codecs.codec import Codec
from common.protocol.messages import Step, StepReply
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.engine.exchange import Answered, Ask
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.text_session import TextSession
from edge_agent.text.tokenizer import TextTokenizer
from edge_agent.text.work import AwaitAnswer, DecodeRow, EncodeRows, RunHead, RunTail, SendAhead

COUNT = 16


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2)) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(demo_ends: ModelEnds) -> TextTokenizer:
    return TextTokenizer(demo_ends.directory)


def answer(session: Session, ids: list[int], count: int = COUNT) -> list[int]:
    return list(session.generate(ids, count, GREEDY, keep_open=True))


def reference(
    whole_model: torch.nn.Module, tokenizer: TextTokenizer, ids: list[int], count: int = COUNT
) -> list[int]:
    output = whole_model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=count,
        do_sample=False,
    )  # fmt: skip
    return output[0, len(ids) :].tolist()


def test_a_longer_prompt_goes_on_from_the_last_answer(
    client: BrokerClient,
    demo_ends: ModelEnds,
    tokenizer: TextTokenizer,
    whole_model: torch.nn.Module,
) -> None:
    session = Session(demo_ends, client, uniform_settings("fp32"))
    ids = tokenizer.encode(PROMPTS[0])
    first = answer(session, ids)
    longer = ids + first + tokenizer.encode(" The end of that.")[1:]
    uplink = client.bytes_up
    assert answer(session, longer, 4) == reference(whole_model, tokenizer, longer, 4)
    rows_sent = (client.bytes_up - uplink) / (4 * demo_ends.hidden)
    assert rows_sent < len(longer) - len(ids) - len(first) + 8  # only what is new
    assert session.generation == 0


def test_an_edited_prompt_cuts_the_session_back(
    client: BrokerClient,
    demo_ends: ModelEnds,
    tokenizer: TextTokenizer,
    whole_model: torch.nn.Module,
) -> None:
    session = Session(demo_ends, client, uniform_settings("fp32"))
    ids = tokenizer.encode(PROMPTS[0])
    first = answer(session, ids)
    for turn, words in enumerate((" But then it rained.", " A bear came by.", " Tom was sad.")):
        edited = ids + first[: 10 - 3 * turn] + tokenizer.encode(words)[1:]
        assert answer(session, edited) == reference(whole_model, tokenizer, edited)
        assert session.generation == turn + 1
    session.end()


def test_a_session_goes_on_after_an_answer_was_broken_off(
    client: BrokerClient,
    demo_ends: ModelEnds,
    tokenizer: TextTokenizer,
    whole_model: torch.nn.Module,
) -> None:
    session = Session(demo_ends, client, uniform_settings("fp32"))
    ids = tokenizer.encode(PROMPTS[1])
    tokens = session.generate(ids, COUNT, GREEDY, keep_open=True)
    begun = [next(tokens) for _ in range(5)]
    tokens.close()
    want = reference_tokens(whole_model, tokenizer, [PROMPTS[1]], COUNT)[0]
    assert begun == want[:5]
    assert answer(session, ids) == want
    session.end()


def test_another_worker_takes_over_after_a_cut_back(
    pool: LocalPool,
    client: BrokerClient,
    demo_ends: ModelEnds,
    tokenizer: TextTokenizer,
    whole_model: torch.nn.Module,
) -> None:
    session = Session(demo_ends, client, uniform_settings("fp32"))
    ids = tokenizer.encode(PROMPTS[2])
    edited = ids + answer(session, ids)[:6] + tokenizer.encode(" A bear came by.")[1:]
    tokens = session.generate(edited, COUNT, GREEDY)
    got = [next(tokens) for _ in range(3)]
    pool.kill_worker(session.last_worker_id)
    pool.start_worker()
    got += list(tokens)
    assert got == reference(whole_model, tokenizer, edited)
    pool.wait_for_workers(2)


def drive(ends: ModelEnds, session: TextSession, prompt_ids: list[int], count: int) -> list[Step]:
    """Have an answer made by a pool that answers with zeros; the steps that were asked for."""
    steps: list[Step] = []
    working = session.answer(prompt_ids, count, GREEDY)
    result: Any = None
    ahead: deque[Ask] = deque()
    for _ in range(1000):
        try:
            work = working.send(result)
        except StopIteration:
            return steps
        if isinstance(work, AwaitAnswer):
            work = ahead.popleft()
        match work:
            case SendAhead(ask):
                ahead.append(ask)
            case RunHead(token_ids, caches):
                (result,) = ends.run_heads([(token_ids, caches)])
            case RunTail(rows, caches):
                (result,) = ends.run_tails([(rows, caches)])
            case EncodeRows() | DecodeRow():
                result = work.do()
            case Ask(step):
                assert isinstance(step, Step)
                steps.append(step)
                reply = StepReply(*step.key, 1, step.reply_rows, 0, "w1", 0, 0)
                result = Answered(reply, bytes(step.reply_rows * ends.hidden * 4), 0, 0, 0)
            case _:
                result = None
    raise AssertionError("it does not end")


def test_two_cuts_without_a_step_between_are_one_generation(demo_ends: ModelEnds) -> None:
    session = TextSession(demo_ends, uniform_settings("fp32"))
    ids = [1, 5, 6, 7]
    drive(demo_ends, session, ids, 4)  # the log has pieces of 4, 1, 1 and 1 rows
    assert session.cut_back(6) == 6
    assert session.cut_back(5) == 5
    (step, *_) = drive(demo_ends, session, [*ids, 9, 10], 1)
    assert (step.generation, step.fork, step.position) == (1, 4, 4)
    assert session.cut_back(2) == 0  # rows that were encoded together go together
    (step,) = drive(demo_ends, session, [1, 5, 8], 1)
    assert (step.generation, step.fork, step.position) == (2, 0, 0)


def test_a_session_can_be_used_again_after_an_error_in_the_head(
    monkeypatch: pytest.MonkeyPatch,
    client: BrokerClient,
    demo_ends: ModelEnds,
    tokenizer: TextTokenizer,
    whole_model: torch.nn.Module,
) -> None:
    session = Session(demo_ends, client, uniform_settings("fp32"))
    with monkeypatch.context() as broken:  # the head has run by then
        broken.setattr(Codec, "encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answer(session, tokenizer.encode(PROMPTS[3]))
    ids = tokenizer.encode(PROMPTS[0])
    assert answer(session, ids) == reference(whole_model, tokenizer, ids)
    session.end()
