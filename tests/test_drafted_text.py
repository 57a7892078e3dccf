"""Drafted text is the text that would have come one token at a time, whatever was guessed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import redis
import torch
from pools import GREEDY, PROMPTS, intercept, reference_tokens
from torch import Tensor
from waiting import wait_until

from common.protocol.messages import Need, Step
from common.spans.fixed_groups import ROWS
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.engine.engine import Engine
from edge_agent.engine.exchange import Answered
from edge_agent.engine.streams import TokenStream
from edge_agent.text.drafting.company import FIRST_ROW_SHARE, Company, StepCost, UnderWay
from edge_agent.text.drafting.drafter import Draft, DrafterSource
from edge_agent.text.drafting.policy import DraftPolicy
from edge_agent.text.ends import EndCaches, ModelEnds
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

COUNT = 48
SAMPLED = SamplingSettings(temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=7)


class Oracle:
    """Knows the text and errs now and then; sees to it that it is told the truth."""

    name = "oracle"
    is_free = True

    def __init__(self, texts: Sequence[list[int]], ends: ModelEnds, caches: EndCaches) -> None:
        self._texts, self._ends, self._caches = texts, ends, caches
        self._rng = random.Random(1)
        self._observed = 0

    def propose(self, token_ids: Sequence[int], limit: int) -> list[Draft]:
        """What follows in the text that begins like this, with every fourth token wrong."""
        held = self._caches.head.length
        assert self._observed == held == self._caches.tail.length == len(token_ids) - 1
        ids = list(token_ids)
        truth = next((text for text in self._texts if text[: len(ids)] == ids), ids)
        following = truth[len(ids) : len(ids) + self._rng.randrange(limit + 1)]
        return [Draft(token if self._rng.random() < 0.75 else 5, 0) for token in following]

    def observe(self, boundary: Tensor, tail_inputs: Tensor) -> None:
        assert boundary.shape == tail_inputs.shape == (len(boundary), self._ends.hidden)
        self._observed += len(boundary)

    def cut_back(self, position: int) -> None:
        self._observed = min(self._observed, position)


class Oracles:
    """Gives every session an oracle that knows some texts, and remembers what was written."""

    is_demanded = True

    def __init__(self, texts: Sequence[list[int]]) -> None:
        self._texts = texts
        self.kept: list[list[int]] = []

    def __call__(self, ends: ModelEnds, caches: EndCaches) -> Oracle:
        return Oracle(self._texts, ends, caches)

    def keep(self, ends: ModelEnds, prompt_ids: Sequence[int], answer: Sequence[int]) -> None:
        self.kept.append([*prompt_ids, *answer])


def knowing(*texts: list[int]) -> Oracles:
    return Oracles(texts)


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2, model="stories-llama")) as running:
        yield running


@pytest.fixture(scope="module")
def lonely_client() -> Iterator[BrokerClient]:
    """Of a pool with one worker: nobody takes a step over because it is late."""
    with LocalPool(PoolSettings(workers=1, model="stories-llama")) as running:
        connected = BrokerClient([running.edge_endpoint])
        yield connected
        connected.close()


@pytest.fixture(scope="module")
def tokenizer(demo_directory: Path) -> TextTokenizer:
    return TextTokenizer(demo_directory)


@pytest.fixture
def write(demo_ends: ModelEnds, client: BrokerClient) -> Callable[..., tuple[list[int], Session]]:
    def written(
        prompt: list[int],
        sampling: SamplingSettings = GREEDY,
        codec: str = "fp32",
        drafters: DrafterSource | None = None,
    ) -> tuple[list[int], Session]:
        settings = uniform_settings(codec)
        session = Session(demo_ends, client, settings, drafters=drafters)
        return list(session.generate(prompt, COUNT, sampling)), session

    return written


@pytest.mark.parametrize("codec", ["fp32", "int8", "int4:token:affine+hadamard64"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafted_text_is_the_undrafted_text(
    write: Callable[..., tuple[list[int], Session]],
    tokenizer: TextTokenizer,
    codec: str,
    sampling: SamplingSettings,
) -> None:
    prompt = tokenizer.encode(PROMPTS[0])
    plain, _ = write(prompt, sampling, codec)
    drafters = knowing(prompt + plain)
    drafted, session = write(prompt, sampling, codec, drafters)
    assert drafted == plain
    assert drafters.kept == [prompt + plain]  # whoever guesses may learn of it
    stats = session.stats
    assert stats.round_trips < COUNT * 0.7
    assert stats.tokens_per_round_trip == (len(plain) - 1) / stats.round_trips
    assert 0 < stats.accepted["oracle"] < stats.drafted["oracle"]  # some were taken back
    assert stats.round_trips + stats.accepted["oracle"] == len(plain) - 1


@pytest.fixture(scope="module")
def stories(whole_model: torch.nn.Module, tokenizer: TextTokenizer) -> list[list[int]]:
    """Prompts with what `generate` writes after them, to the end of the text or COUNT tokens."""
    answers = reference_tokens(whole_model, tokenizer, PROMPTS[:6], COUNT)
    return [[*tokenizer.encode(p), *a] for p, a in zip(PROMPTS, answers, strict=False)]


@pytest.fixture
def engine(pool: LocalPool, demo_ends: ModelEnds, stories: list[list[int]]) -> Iterator[Engine]:
    """Its steps have no more than 8 rows, replayed ones too."""
    settings = uniform_settings("fp32", prefill_rows=8)
    with Engine(demo_ends, [pool.edge_endpoint], settings, drafters=knowing(*stories)) as running:
        yield running


def read(stream: TokenStream) -> list[int]:
    return [token.token_id for token in stream]


def test_sessions_in_one_batch_draft_as_many_as_each_likes_while_workers_die(
    pool: LocalPool, engine: Engine, stories: list[list[int]]
) -> None:
    prompts = [story[:-COUNT] for story in stories] * 2
    store = redis.Redis.from_url(pool.redis_url)
    streams = [engine.submit(prompt, COUNT) for prompt in prompts]
    first = [next(iter(stream)).token_id for stream in streams]
    store.flushall()
    pool.kill_worker(sorted(pool.workers)[0])
    store.flushall()
    pool.start_worker()
    for index, stream in enumerate(streams):
        assert [first[index], *read(stream)] == stories[index % len(stories)][-COUNT:]
    trips = sum(stream.stats.round_trips for stream in streams)
    assert trips < 0.9 * len(streams) * (COUNT - 1)  # whatever a kill makes of what rows cost
    assert sum(stream.stats.rows_replayed for stream in streams) > 0
    pool.wait_for_workers(2)


def test_a_conversation_goes_on_after_drafts(engine: Engine, stories: list[list[int]]) -> None:
    """Also where the text was stopped in the midst of them, and where the next turn differs."""
    story = stories[0]
    begin = len(story) - COUNT
    conversation = engine.open()
    for length in (3, 7, 12):
        stream = conversation.submit(story[:begin], length)
        assert read(stream) == story[begin : begin + length]
    for end in (begin + 12, begin + 20, begin + 15):
        stream = conversation.submit(story[:end], 9)
        assert read(stream) == story[end : end + 9]
    conversation.close()


def test_an_answer_that_was_cancelled_among_its_drafts_can_be_asked_for_again(
    engine: Engine, stories: list[list[int]]
) -> None:
    story = stories[1]
    conversation = engine.open()
    for taken in (2, 5, 9):
        stream = conversation.submit(story[:-COUNT], COUNT)
        got = [next(iter(stream)).token_id for _ in range(taken)]
        stream.cancel()
        got += read(stream)
        assert got == story[-COUNT:][: len(got)]
    assert read(conversation.submit(story[:-COUNT], COUNT)) == story[-COUNT:]
    conversation.close()


def test_the_text_ends_where_it_would_have_ended_without_drafts(
    demo_ends: ModelEnds, pool: LocalPool, whole_model: torch.nn.Module, tokenizer: TextTokenizer
) -> None:
    """At its end-of-sequence token, at the context's end, and at as many tokens as were asked."""
    (answer,) = reference_tokens(whole_model, tokenizer, PROMPTS[:1], 400)
    story = [*tokenizer.encode(PROMPTS[0]), *answer]
    assert story[-1] in demo_ends.eos_ids
    drafter = knowing([*story, 7, 7, 7, 7, 7, 7, 7, 7])
    with Engine(demo_ends, [pool.edge_endpoint], drafters=drafter) as engine:
        stream = engine.submit(story[:-20], 200)
        assert read(stream) == story[-20:]
        assert stream.ended_by_itself
        for count in range(1, 6):
            assert read(engine.submit(story[:-20], count)) == story[-20:][:count]
    assert demo_ends.context is not None
    endless = (story[:-1] * 9)[: demo_ends.context - 5]
    for drafters in (None, knowing([*endless, *[7] * 30])):
        with Engine(demo_ends, [pool.edge_endpoint], drafters=drafters) as engine:
            assert len(read(engine.submit(endless, 50))) == 5


def test_drafted_tokens_have_the_log_probabilities_of_undrafted_ones(
    engine: Engine, pool: LocalPool, demo_ends: ModelEnds, stories: list[list[int]]
) -> None:
    drafted = list(engine.submit(stories[2][:-COUNT], COUNT, top_logprobs=3))
    with Engine(demo_ends, [pool.edge_endpoint], uniform_settings("fp32")) as other:
        plain = list(other.submit(stories[2][:-COUNT], COUNT, top_logprobs=3))
    for one, two in zip(drafted, plain, strict=True):
        assert one.logprob is not None
        assert two.logprob is not None
        assert one.logprob.logprob == pytest.approx(two.logprob.logprob, abs=1e-4)
        assert [token for token, _ in one.logprob.top] == [token for token, _ in two.logprob.top]


@pytest.mark.parametrize("lost_at", [8, 9, 10, 11])
def test_every_draft_is_sent_as_tentative_and_all_of_a_step_together(
    lost_at: int,
    lonely_client: BrokerClient,
    demo_ends: ModelEnds,
    stories: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a worker has lost the session and rows before them are replayed."""
    steps: list[Step] = []

    def lose(step: Step) -> Answered | None:
        steps.append(step)
        if len(steps) != lost_at + 1:  # a worker that has the first five rows only
            return None
        return Answered(Need(*step.key, 1, 5, [], "w9"), b"", 0, 0, 0)

    # or how many guesses pay would hang on what else the machine does
    monkeypatch.setattr(StepCost, "of", lambda cost, rows: 1.0 + FIRST_ROW_SHARE * rows)
    intercept(lonely_client, lose, monkeypatch)
    settings = uniform_settings("fp32", prefill_rows=8)
    session = Session(demo_ends, lonely_client, settings, drafters=knowing(*stories))
    prompt = stories[0][:-COUNT]
    assert list(session.generate(prompt, COUNT, GREEDY)) == stories[0][-COUNT:]
    prompt_steps = -(-len(prompt) // 8)
    lost = steps[lost_at]
    done = next(at for at, step in enumerate(steps) if at > lost_at and step.end == lost.end) + 1
    again, others = steps[lost_at + 1 : done], [*steps[prompt_steps:lost_at], *steps[done:]]
    assert all(step.tentative == step.rows - 1 for step in others)
    assert [step.tentative for step in again[:-1]] == [0] * (len(again) - 1)
    assert (again[-1].final, again[-1].end) == (lost.final, lost.end)
    assert len(again) >= 3
    assert max(step.tentative for step in steps) > 3


# --- how many


class Guesser:
    """Right with a probability that goes by the grade."""

    name = "guesser"
    is_free = True

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares = shares
        self._rng = random.Random(3)

    def propose(self, token_ids: Sequence[int], limit: int) -> list[Draft]:
        """Token 1 is right."""
        grades = [index % len(self._shares) for index in range(limit)]
        return [Draft(int(self._rng.random() < self._shares[g]), g) for g in grades]

    def observe(self, boundary: Tensor, tail_inputs: Tensor) -> None: ...

    def cut_back(self, position: int) -> None: ...


def simulate(shares: Sequence[float], step_s: float, row_s: float, steps: int = 600) -> float:
    """How many times as fast a session of so many steps is as one that drafts nothing."""
    policy, guesser = DraftPolicy(16), Guesser(shares)
    rng = random.Random(5)
    tokens, seconds = 0, 0.0
    for _ in range(steps):
        drafts = policy.propose(guesser, [], 16)
        right = 0
        while right < len(drafts) and drafts[right].token_id == 1:
            right += 1
        took = (step_s + row_s * (1 + len(drafts))) * rng.uniform(0.8, 1.3)
        policy.on_step(took)
        for _ in range(right + 1):
            policy.on_token(1)
        tokens, seconds = tokens + right + 1, seconds + took
    return tokens / seconds * (step_s + row_s) * 1.05  # the mean of what is drawn


@pytest.mark.parametrize(("shares", "step_s", "row_s", "least"), [
    ([0.95], 0.050, 0.001, 5.0),  # good guesses on a far network: nearly all of them
    ([0.6], 0.050, 0.001, 2.0),
    ([0.6], 0.002, 0.001, 1.05),  # a row costs a third of a step
    ([0.02], 0.050, 0.005, 0.97),  # bad guesses are left out
    ([0.02], 0.002, 0.002, 0.97),
    ([0.3], 0.0, 0.010, 0.95),  # what a row costs is all that a step costs
])  # fmt: skip
def test_as_many_drafts_are_sent_as_pay(
    shares: list[float], step_s: float, row_s: float, least: float
) -> None:
    assert simulate(shares, step_s, row_s) >= least


def test_a_proposal_is_cut_where_its_guesses_become_bad() -> None:
    policy, guesser = DraftPolicy(8), Guesser([0.95, 0.9, 0.02])
    lengths = []
    for _ in range(300):
        drafts = policy.propose(guesser, [], 8)
        lengths.append(len(drafts))
        policy.on_step(0.01 + 0.001 * len(drafts))
        right = 0
        while right < len(drafts) and drafts[right].token_id == 1:
            right += 1
        for _ in range(right + 1):
            policy.on_token(1)
    assert sorted(lengths[100:])[100] == 2


def write_together(company: Company | None, share: float, link_s: float, pass_s: float) -> float:
    """How many times as fast eight sessions are as undrafted, in passes of eight of their rows."""
    rng, tokens, seconds = random.Random(5), 0, 0.0
    policies = [DraftPolicy(16, company) for _ in range(8)]
    guessers = [Guesser([share]) for _ in policies]
    for index, guesser in enumerate(guessers):
        guesser._rng = random.Random(index)
    for _ in range(300):
        proposals = [p.propose(g, [], 16) for p, g in zip(policies, guessers, strict=True)]
        passes = -(-sum(1 + len(drafts) for drafts in proposals) // ROWS)
        took = (link_s + pass_s * passes) * rng.uniform(0.8, 1.3)
        seconds += took
        for policy, drafts in zip(policies, proposals, strict=True):
            right = next((i for i, d in enumerate(drafts) if d.token_id != 1), len(drafts))
            policy.on_step(took)
            for _ in range(right + 1):
                policy.on_token(1)
            tokens += right + 1
    return tokens / seconds * (link_s + pass_s) * 1.05 / len(policies)


@pytest.mark.parametrize(("share", "link_s", "pass_s", "least"), [
    (0.6, 0.010, 0.040, 0.95),  # a guess of each takes nearly as long as a step of all
    (0.1, 0.010, 0.040, 0.95),
    (0.6, 0.200, 0.010, 1.6),
    (0.95, 0.200, 0.010, 6.0),
])  # fmt: skip
def test_sessions_that_share_passes_draft_no_more_than_pays_for_all(
    share: float, link_s: float, pass_s: float, least: float
) -> None:
    assert write_together(Company(ROWS), share, link_s, pass_s) >= least


def test_who_writes_no_more_is_not_counted() -> None:
    company = Company()
    one, other = DraftPolicy(4, company), DraftPolicy(4, company)
    for policy in (one, other, one):
        policy.propose(Guesser([0.5]), [], 4)
    assert company._sessions == 2
    for policy in (one, other, other):
        policy.rest()
    assert (company._sessions, company._rows, company._tokens) == (0, 0, 0.0)
    one.on_step(0.1)  # of nothing
    assert company.rate_of_none(UnderWay()) == Company().rate_of_none(UnderWay())


def test_sessions_of_an_engine_keep_one_company(
    pool: LocalPool, demo_ends: ModelEnds, stories: list[list[int]]
) -> None:
    settings = uniform_settings("fp32", exact=True)
    with Engine(demo_ends, [pool.edge_endpoint], settings, drafters=knowing(*stories)) as engine:
        company = engine._company
        assert company is not None
        streams = [engine.submit(story[:-COUNT], COUNT) for story in stories[:3]]
        for stream, story in zip(streams, stories, strict=False):
            assert [token.token_id for token in stream] == story[-COUNT:]
        wait_until(lambda: engine.count_answers() == (0, 0))
        assert (company._rows_per_pass, company._sessions, company._rows) == (ROWS, 0, 0)
        assert company.rounds > 0
        assert company._cost.of(2) != Company(ROWS)._cost.of(2)


def test_what_a_row_costs_is_read_off_steps_of_few_and_many_rows() -> None:
    cost = StepCost()
    for rows in [1, 5, 9] * 20:
        cost.add(rows, 0.020 + 0.002 * rows)
    cost.add(1, 5.0)  # a pause of somebody else's
    assert cost.of(9) - cost.of(1) == pytest.approx(0.016, rel=0.25)


class DearGuesser(Guesser):
    """Takes a millisecond for a guess."""

    is_free = False
    asked = 0

    def propose(self, token_ids: Sequence[int], limit: int) -> list[Draft]:
        self.asked += limit
        time.sleep(0.001 * limit)
        return super().propose(token_ids, limit)


@pytest.mark.parametrize(("share", "step_s", "least", "most"), [
    (0.5, 0.001, 0, 90),  # a guess takes as long as a step: a few to learn it, and now and then
    (0.95, 0.100, 1500, 2400),
])  # fmt: skip
def test_dear_guesses_are_asked_for_where_they_pay(
    share: float, step_s: float, least: int, most: int
) -> None:
    policy, guesser = DraftPolicy(8), DearGuesser([share])
    for _ in range(300):
        drafts = policy.propose(guesser, [], 8)
        right = next((i for i, d in enumerate(drafts) if d.token_id != 1), len(drafts))
        policy.on_step(step_s * (1 + 0.01 * len(drafts)))
        for _ in range(right + 1):
            policy.on_token(1)
    assert least <= guesser.asked <= most


def test_a_session_that_has_taken_a_pause_for_what_rows_cost_finds_out() -> None:
    policy, guesser = DraftPolicy(8), Guesser([0.9])
    sent = []
    for step in range(120):
        drafts = policy.propose(guesser, [], 8)
        sent.append(len(drafts))
        right = next((i for i, d in enumerate(drafts) if d.token_id != 1), len(drafts))
        pause = 0.5 if 5 <= step < 9 and drafts else 0.0
        policy.on_step(0.010 + 0.0005 * len(drafts) + pause)
        for _ in range(right + 1):
            policy.on_token(1)
    assert sum(sent[80:]) / 40 > 4
