"""What the integration tests share: prompts, references and sessions in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
import redis
import torch

from cloud_worker.loop.batcher import make_session_key
from cloud_worker.state.redis_store import record_key
from common.codecs.calibration import Calibration
from common.protocol.messages import Step, StepKey
from common.settings import PREFILL_ROWS
from deploy.pool import LocalPool
from edge_agent.engine.client import BrokerClient
from edge_agent.engine.exchange import Ask
from edge_agent.engine.exchanges import Outcome
from edge_agent.text.ends import ModelEnds
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

HEROES = ["mouse named Lily", "bear named Tom", "fox named Mia", "duck named Max", "owl named Ella"]
OPENINGS = [
    "Once upon a time, there was a brave {}.",
    "One sunny morning, a little {} went to the river.",
    "Long ago, near a quiet forest, there lived a kind {}.",
    "In a small house by the lake lived a shy {}. Every day,",
]
PROMPTS = [opening.format(hero) for opening in OPENINGS for hero in HEROES]
GREEDY = SamplingSettings()


def record_of(session: Session, owner: str = "", part: str = "2-6") -> str:
    """The key of what a session leaves in Redis, at a part of the demo model."""
    return record_key(make_session_key(session.session_id, owner, part))


def count_records(store: redis.Redis) -> int:
    """Of what sessions leave in Redis."""
    return len([key for key in store.keys("midspan:*") if key.endswith(b"record")])  # type: ignore[union-attr]


def reference_tokens(
    whole_model: torch.nn.Module, tokenizer: TextTokenizer, prompts: Sequence[str], count: int
) -> list[list[int]]:
    """What transformers' own `generate` writes with the unsplit model."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)])
        output = whole_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )
        answers.append(output[0, ids.shape[1] :].tolist())
    return answers


def generate(
    pool: LocalPool,
    ends: ModelEnds,
    prompt_ids: Sequence[int],
    count: int,
    codec: str = "fp32",
    sampling: SamplingSettings = GREEDY,
    on_token: Callable[[int, Session], None] = lambda index, session: None,
    timeout_s: float = 60.0,
    prefill_rows: int = PREFILL_ROWS,
    calibration: Calibration | None = None,
) -> tuple[list[int], Session]:
    """One session through the pool; `on_token` may do harm on the way."""
    client = pool.connect(timeout_s)
    session = Session(ends, client, uniform_settings(codec, prefill_rows=prefill_rows), calibration)
    tokens = []
    try:
        for token in session.generate(prompt_ids, count, sampling):
            tokens.append(token)
            on_token(len(tokens), session)
    finally:
        client.close()
    return tokens, session


def generate_together(
    pool: LocalPool,
    ends: ModelEnds,
    prompts_ids: Sequence[Sequence[int]],
    count: int,
    sessions: list[Session] | None = None,
) -> list[list[int]]:
    """All prompts at once, each in a thread and with a client of its own.

    Those that are done are added to `sessions`.
    """
    answers: list[list[int]] = [[] for _ in prompts_ids]
    errors: list[Exception] = []
    barrier = threading.Barrier(len(prompts_ids))

    def work(index: int) -> None:
        torch.set_num_threads(1)
        barrier.wait()
        try:
            answers[index], session = generate(pool, ends, prompts_ids[index], count)
            if sessions is not None:
                sessions.append(session)
        except Exception as error:  # shown in the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts_ids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return answers


def intercept(
    client: BrokerClient,
    answer: Callable[[Step], Outcome | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Have steps that `answer` has an answer to never get to the broker."""
    send = client.send_ahead

    def send_ahead(ask: Ask) -> StepKey:
        assert isinstance(ask.step, Step)
        outcome = answer(ask.step)
        if outcome is None:
            return send(ask)
        client._outcomes[ask.step.key] = outcome
        return ask.step.key

    monkeypatch.setattr(client, "send_ahead", send_ahead)
