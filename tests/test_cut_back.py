"""Sessions that are cut back: edited prompts, regeneration, and rows that must not come back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pools import GREEDY, PROMPTS, reference_tokens

from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.text.ends import ModelEnds
from edge_agent.text.replay_log import ReplayLog
from edge_agent.text.session import Session, uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

COUNT = 16


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2)) as running:
        yield running


@pytest.fixture
def client(pool: LocalPool) -> Iterator[BrokerClient]:
    connected = pool.connect()
    yield connected
    connected.close()


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
    assert session._generation == 0


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
        assert session._generation == turn + 1
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


def test_two_cuts_without_a_step_between_are_one_generation(demo_ends: ModelEnds) -> None:
    client = BrokerClient(["tcp://127.0.0.1:1"])
    session = Session(demo_ends, client, uniform_settings("fp32"))
    session._log = log_of(4, 1, 1, 1)
    session._token_ids = list(range(7))
    session._sent_generation = 0
    for cache in (session._caches.head, session._caches.tail):
        cache.reserve(7)
        cache.length = 7
    assert session.cut_back(6) == 6
    assert session.cut_back(5) == 5
    assert (session._generation, session._fork) == (1, 5)
    session._sent_generation = 1
    assert session.cut_back(2) == 0  # rows that were encoded together go together
    assert (session._generation, session._fork) == (2, 0)
    client.close()


def log_of(*pieces: int) -> ReplayLog:
    log = ReplayLog()
    for rows in pieces:
        log.append(rows, 0, b"")
    return log


def test_a_session_can_be_used_again_after_an_error_in_the_head(
    client: BrokerClient,
    demo_ends: ModelEnds,
    tokenizer: TextTokenizer,
    whole_model: torch.nn.Module,
) -> None:
    session = Session(demo_ends, client, uniform_settings("fp32"))
    good_codecs = session._up
    session._up = [None]  # type: ignore[list-item]
    with pytest.raises(AttributeError):
        answer(session, tokenizer.encode(PROMPTS[3]))
    session._up = good_codecs
    ids = tokenizer.encode(PROMPTS[0])
    assert answer(session, ids) == reference(whole_model, tokenizer, ids)
    session.end()
