"""A step gets through a thin link, once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pools import PROMPTS, reference_tokens

from chaos.thin_link import ThinLink
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.text.ends import ModelEnds
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

HEADERS = 3000  # bytes of headers, handshakes and questions, beside the bodies
NEW_TOKENS = 3


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1)) as running:
        yield running


@pytest.mark.parametrize(
    ("bytes_per_s", "repeats"),
    [(5_000, 3), pytest.param(30_000, 20, marks=pytest.mark.long)],
)
def test_a_prompt_gets_through_a_thin_link_once(
    pool: LocalPool,
    demo_ends: ModelEnds,
    whole_model: torch.nn.Module,
    bytes_per_s: float,
    repeats: int,
) -> None:
    """Up and down it takes from several seconds on, much longer than a broker may be silent."""
    tokenizer = TextTokenizer(demo_ends.directory)
    prompt = " ".join(PROMPTS[:repeats])
    (reference,) = reference_tokens(whole_model, tokenizer, [prompt], NEW_TOKENS)
    prompt_ids = tokenizer.encode(prompt)
    link = ThinLink(pool.edge_endpoint, bytes_per_s)
    client = BrokerClient([link.endpoint])
    session = Session(demo_ends, client, uniform_settings("fp32"))
    tokens = list(session.generate(prompt_ids, NEW_TOKENS, SamplingSettings()))
    client.close()
    rows = len(prompt_ids) + NEW_TOKENS - 1
    body = rows * demo_ends.hidden * 4
    assert tokens == reference
    assert body / bytes_per_s > 3.0  # else the link was not thin
    assert link.bytes_up < body + HEADERS
    assert link.bytes_down < body + HEADERS
    link.close()


def test_a_broker_that_restarts_behind_a_thin_link_gets_the_step_anew(
    demo_ends: ModelEnds, whole_model: torch.nn.Module
) -> None:
    tokenizer = TextTokenizer(demo_ends.directory)
    (reference,) = reference_tokens(whole_model, tokenizer, PROMPTS[:1], 6)
    with LocalPool(PoolSettings(workers=1)) as own:
        link = ThinLink(own.edge_endpoint, 50_000)
        client = BrokerClient([link.endpoint])
        session = Session(demo_ends, client, uniform_settings("fp32"))
        tokens = []
        for token in session.generate(tokenizer.encode(PROMPTS[0]), 6, SamplingSettings()):
            tokens.append(token)
            if len(tokens) == 2:
                assert own.broker is not None
                own.broker.kill()
                own.start_broker()
        client.close()
        link.close()
    assert tokens == reference
