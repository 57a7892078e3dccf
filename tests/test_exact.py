"""Exact sessions: the same numbers to the last bit, whatever else happens at the time.

What is compared are the log-probabilities of the hundred likeliest tokens in each place: all logits
are in them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from click.testing import CliRunner
from pools import PROMPTS
from random_models import save_random_model
from torch import Tensor
from transformers import LlamaConfig, Mamba2Config, MixtralConfig, PretrainedConfig

from common.errors import SettingsError
from common.spans.cut import Span
from deploy.cli import midspan
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.engine import Engine
from edge_agent.engine.streams import TokenStream
from edge_agent.server import opening
from edge_agent.text.drafting.choice import Drafters, Kind
from edge_agent.text.drafting.drafter import Draft, DrafterSource
from edge_agent.text.drafting.policy import DraftPolicy
from edge_agent.text.ends import EndCaches, ModelEnds, load_ends
from edge_agent.text.logprobs import MOST_TOP, TokenLogprob
from edge_agent.text.remote_middle import RemoteMiddle
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import SessionSettings, uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

COUNT = 32
SAMPLED = SamplingSettings(temperature=0.8, seed=3)
Numbers = list[TokenLogprob]
NO_REDIS = "redis://127.0.0.1:1"


class Oracle:
    """Knows a text, and errs with every third guess."""

    name = "oracle"
    is_free = True

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text

    def propose(self, token_ids: Sequence[int], limit: int) -> list[Draft]:
        following = self._text[len(token_ids) : len(token_ids) + min(limit, 5)]
        return [Draft(5 if i % 3 == 2 else token, 0) for i, token in enumerate(following)]

    def observe(self, boundary: Tensor, tail_inputs: Tensor) -> None: ...

    def cut_back(self, position: int) -> None: ...


class Oracles:
    """Gives every session one that knows a text."""

    is_demanded = True

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text

    def __call__(self, ends: ModelEnds, caches: EndCaches) -> Oracle:
        return Oracle(self._text)

    def keep(self, ends: ModelEnds, prompt_ids: Sequence[int], answer: Sequence[int]) -> None: ...


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    """One worker, so that all sessions are in its batches."""
    with LocalPool(PoolSettings(workers=1, model="stories-llama")) as running:
        yield running


@pytest.fixture
def send_all_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftPolicy, "_count_worth", lambda self, shares, guess_s=0.0: len(shares))


@pytest.fixture(scope="module")
def prompts(demo_directory: Path) -> list[list[int]]:
    """Some of a dozen tokens, and some that go in pieces."""
    tokenizer = TextTokenizer(demo_directory)
    stories = [s for s in (demo_directory / "validation.txt").read_text().split("\n\n") if s]
    long = [tokenizer.encode(" ".join(stories[at : at + 2]))[:100] for at in (0, 2, 4)]
    return [*long, *(tokenizer.encode(prompt) for prompt in PROMPTS[:4])]


def read(stream: TokenStream) -> Numbers:
    numbers = [token.logprob for token in stream]
    assert all(each is not None for each in numbers)
    return [each for each in numbers if each is not None]


def settings_of(codec: str, exact: bool = True, **others: object) -> SessionSettings:
    return uniform_settings(codec, exact=exact, **others)


def write_alone(
    pool: LocalPool, ends: ModelEnds, prompt: list[int], codec: str, count: int = COUNT
) -> Numbers:
    """Undrafted, and beside nobody."""
    with Engine(ends, [pool.edge_endpoint], settings_of(codec)) as engine:
        return read(engine.submit(prompt, count, SAMPLED, top_logprobs=MOST_TOP))


@pytest.fixture(scope="module")
def alone(
    pool: LocalPool, demo_ends: ModelEnds, prompts: list[list[int]]
) -> Callable[[str], list[Numbers]]:
    """What each prompt gives alone, by codec."""
    known: dict[str, list[Numbers]] = {}

    def written(codec: str) -> list[Numbers]:
        if codec not in known:
            known[codec] = [write_alone(pool, demo_ends, each, codec) for each in prompts]
        return known[codec]

    return written


def count_batches(pool: LocalPool) -> tuple[int, int]:
    """Batches and steps of the only worker."""
    client = pool.connect()
    try:
        (worker,) = client.status()["workers"]
    finally:
        client.close()
    return worker["stats"]["batches"], worker["stats"]["steps"]


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("kind", ["lookup", "ngram", "model", "oracle"])
@pytest.mark.usefixtures("send_all_guesses")
def test_drafted_and_undrafted_texts_have_the_same_bits(
    pool: LocalPool,
    demo_ends: ModelEnds,
    prompts: list[list[int]],
    alone: Callable[[str], list[Numbers]],
    kind: Kind,
    codec: str,
) -> None:
    for prompt, wanted in zip(prompts[2:4], alone(codec)[2:4], strict=True):
        text = [*prompt, *(each.token_id for each in wanted)]
        drafters: DrafterSource = Oracles(text) if kind == "oracle" else Drafters(kind)
        with Engine(
            demo_ends, [pool.edge_endpoint], settings_of(codec), drafters=drafters
        ) as engine:
            stream = engine.submit(prompt, COUNT, SAMPLED, top_logprobs=MOST_TOP)
            assert read(stream) == wanted
        if kind == "oracle":
            assert 0 < stream.stats.accepted[kind] < stream.stats.drafted[kind]


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.usefixtures("send_all_guesses")
def test_beside_others_a_session_has_the_bits_that_it_has_alone(
    pool: LocalPool,
    demo_ends: ModelEnds,
    prompts: list[list[int]],
    alone: Callable[[str], list[Numbers]],
    codec: str,
) -> None:
    """Beside exact ones in its own engine, drafted, and others that are not in another."""
    wanted = alone(codec)
    batches, steps = count_batches(pool)
    with (
        Engine(
            demo_ends, [pool.edge_endpoint], settings_of(codec), drafters=Drafters("auto")
        ) as engine,
        Engine(demo_ends, [pool.edge_endpoint], settings_of(codec, exact=False)) as other,
    ):
        others = [other.submit(prompt, COUNT, SAMPLED) for prompt in prompts[3:]]
        streams = [engine.submit(p, COUNT, SAMPLED, top_logprobs=MOST_TOP) for p in prompts]
        found = [read(stream) for stream in streams]
        for stream in others:
            list(stream)
    assert found == wanted
    after = count_batches(pool)
    assert after[1] - steps > 1.3 * (after[0] - batches)  # they did share batches


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("with_redis", [True, False], ids=["redis", "no-redis"])
@pytest.mark.usefixtures("send_all_guesses")
def test_a_dead_worker_changes_no_bit(
    demo_ends: ModelEnds,
    prompts: list[list[int]],
    alone: Callable[[str], list[Numbers]],
    codec: str,
    with_redis: bool,
) -> None:
    """Rows come from Redis, or are computed again, by pieces of the prompt and one by one."""
    wanted = alone(codec)[0]
    text = [*prompts[0], *(each.token_id for each in wanted)]
    url = None if with_redis else NO_REDIS
    with (
        LocalPool(PoolSettings(workers=2, model="stories-llama", redis_url=url)) as pool,
        Engine(
            demo_ends, [pool.edge_endpoint], settings_of(codec), drafters=Oracles(text)
        ) as engine,
    ):
        stream = engine.submit(prompts[0], COUNT, SAMPLED, top_logprobs=MOST_TOP)
        found = []
        for token in stream:
            assert token.logprob is not None
            found.append(token.logprob)
            if len(found) == 20:
                pool.kill_worker(token.worker_id)
        assert found == wanted
        replayed = stream.stats.rows_replayed
        assert replayed < len(prompts[0]) if with_redis else replayed >= len(prompts[0])


@pytest.mark.usefixtures("send_all_guesses")
def test_rows_of_several_replayed_steps_are_as_they_were(
    pool: LocalPool, demo_ends: ModelEnds, prompts: list[list[int]]
) -> None:
    """More than go in one step of an exact session."""
    count = 90
    wanted = write_alone(pool, demo_ends, prompts[4], "int8", count)
    settings = PoolSettings(workers=2, model="stories-llama", redis_url=NO_REDIS)
    text = [*prompts[4], *(each.token_id for each in wanted)]
    with (
        LocalPool(settings) as own,
        Engine(
            demo_ends, [own.edge_endpoint], settings_of("int8"), drafters=Oracles(text)
        ) as engine,
    ):
        stream = engine.submit(prompts[4], count, SAMPLED, top_logprobs=MOST_TOP)
        head = list(itertools.islice(stream, 75))
        own.kill_worker(head[-1].worker_id)
        found = [each.logprob for each in [*head, *stream]]
    assert found == wanted


def converse(engine: Engine, turns: Sequence[list[int]], harm: Callable[[], None]) -> list[Numbers]:
    """Each turn goes on where the answer to the one before ended."""
    conversation = engine.open()
    said: list[int] = []
    answers = []
    for index, turn in enumerate(turns):
        said += turn
        if index == 1:
            harm()
        answer = read(conversation.submit(said, 12, SAMPLED, top_logprobs=MOST_TOP))
        said += [each.token_id for each in answer]
        answers.append(answer)
    conversation.close()
    return answers


@pytest.mark.usefixtures("send_all_guesses")
def test_a_chat_that_goes_on_has_the_same_bits_whatever_happened(
    pool: LocalPool, demo_ends: ModelEnds, prompts: list[list[int]]
) -> None:
    turns = prompts[3:6]
    endpoints = [pool.edge_endpoint]
    with Engine(demo_ends, endpoints, settings_of("int8")) as engine:
        plain = converse(engine, turns, lambda: None)

    def harm() -> None:
        redis.Redis.from_url(pool.redis_url).flushall()
        pool.kill_worker(next(iter(pool.workers)))
        pool.start_worker()

    with Engine(demo_ends, endpoints, settings_of("int8"), drafters=Drafters("ngram")) as engine:
        beside = [engine.submit(prompt, COUNT) for prompt in prompts]
        assert converse(engine, turns, harm) == plain
        for stream in beside:
            list(stream)
    pool.wait_for_workers(1)


SIZE = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2),
    "mamba2": Mamba2Config(
        vocab_size=99, hidden_size=64, num_hidden_layers=4, state_size=16, num_heads=8, head_dim=16,
        n_groups=1, chunk_size=16, bos_token_id=0, eos_token_id=None, pad_token_id=None,
    ),
    "no tail": LlamaConfig(**SIZE),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("send_all_guesses")
def test_other_kinds_of_layers_have_the_same_bits(family: str, tmp_path: Path) -> None:
    """Experts, a state of the whole text, and logits that come from the pool."""
    directory = save_random_model(FAMILIES[family], tmp_path)
    span = "1-4e" if family == "no tail" else "1-3"
    ends = load_ends(directory, "1:" if family == "no tail" else span)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 99, (n,), generator=generator).tolist() for n in (80, 11, 9, 30)]
    settings = PoolSettings(workers=2, model=str(directory), span=span, redis_url=NO_REDIS)
    with LocalPool(settings) as pool:
        wanted = [write_alone(pool, ends, prompt, "fp32", 24) for prompt in prompts]
        text = [*prompts[0], *(each.token_id for each in wanted[0])]
        drafters = None if family == "mamba2" else Oracles(text)
        with Engine(ends, [pool.edge_endpoint], settings_of("fp32"), drafters=drafters) as engine:
            streams = [engine.submit(p, 24, SAMPLED, top_logprobs=MOST_TOP) for p in prompts]
            first = next(iter(streams[0]))
            assert first.logprob is not None
            pool.kill_worker(first.worker_id)
            found = [read(stream) for stream in streams]
    assert [[first.logprob, *found[0]], *found[1:]] == wanted


@pytest.mark.usefixtures("send_all_guesses")
def test_spans_in_a_row_have_the_same_bits(
    demo_ends: ModelEnds, prompts: list[list[int]], alone: Callable[[str], list[Numbers]]
) -> None:
    """What a worker hands to the next one is cut into the pieces that the edge has sent."""
    spans = (Span(2, 4), Span(4, 6))
    wanted = alone("fp32")[0]
    text = [*prompts[0], *(each.token_id for each in wanted)]
    with LocalPool(PoolSettings(workers=0, redis_url=NO_REDIS)) as pool:
        names = [pool.start_worker(span=str(span)) for span in (*spans, spans[1])]
        pool.wait_for_workers(len(names))
        settings = settings_of("fp32", route=spans)
        with Engine(demo_ends, [pool.edge_endpoint], settings, drafters=Oracles(text)) as engine:
            stream = engine.submit(prompts[0], COUNT, SAMPLED, top_logprobs=MOST_TOP)
            head = list(itertools.islice(stream, 20))
            pool.kill_worker(head[-1].worker_id)
            found = [each.logprob for each in [*head, *stream]]
        assert stream.stats.rows_replayed >= len(prompts[0])
    assert found == wanted


def test_codecs_whose_rows_are_multiplied_together_are_not_drafted_for(
    demo_ends: ModelEnds,
) -> None:
    codec = "int4:token:affine+hadamard64"
    with pytest.raises(SettingsError, match="product of matrices"):
        Session(demo_ends, None, settings_of(codec), drafters=Drafters("lookup"))  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="between spans"):
        Session(demo_ends, None, replace(settings_of("int8"), between=codec))  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ["ask", "chat", "score", "serve"])
def test_commands_open_exact_sessions_where_they_are_told_to(
    pool: LocalPool, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[bool] = []
    real_middle, real_services = RemoteMiddle.__init__, opening.open_services

    def open_middle(
        middle: RemoteMiddle, ends: ModelEnds, settings: SessionSettings, *more: Any
    ) -> None:
        real_middle(middle, ends, settings, *more)
        opened.append(middle._asks.opening.exact)  # type: ignore[union-attr]

    def open_services(ends: ModelEnds, access: Any, settings: SessionSettings, **more: Any) -> Any:
        opened.append(settings.exact)
        real_services(ends, access, settings, **more).close()
        raise SettingsError("this is all that was to be seen")

    monkeypatch.setattr(RemoteMiddle, "__init__", open_middle)
    monkeypatch.setattr(opening, "open_services", open_services)
    words = {
        "ask": ["ask", PROMPTS[0], "-n", "4"],
        "chat": ["chat", "--max-new-tokens", "4"],
        "score": ["score", "The fox was", "--option", " happy.", "--option", " sad."],
        "serve": ["serve", "--port", "0"],
    }[command]
    for options in ([], ["--exact"]):
        opened.clear()
        CliRunner().invoke(midspan, [*words, "--broker", pool.edge_endpoint, *options], "Hello\n")
        assert set(opened) == {bool(options)}


def test_without_it_tokens_are_the_same_unless_two_are_as_close_as_rounding(
    pool: LocalPool,
    demo_ends: ModelEnds,
    prompts: list[list[int]],
    alone: Callable[[str], list[Numbers]],
) -> None:
    """Greedy, where the promise without it is about the two likeliest tokens."""
    settings = settings_of("fp32", exact=False)

    def write(engine: Engine) -> list[Numbers]:
        streams = [engine.submit(p, COUNT, top_logprobs=2) for p in prompts]
        return [read(stream) for stream in streams]

    with Engine(demo_ends, [pool.edge_endpoint], settings) as engine:
        plain = [read(engine.submit(p, COUNT, top_logprobs=2)) for p in prompts]
    with Engine(demo_ends, [pool.edge_endpoint], settings, drafters=Drafters("auto")) as engine:
        together = write(engine)
    for ours, theirs in zip(plain, together, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            if one.token_id != other.token_id:
                assert one.top[0][1] - one.top[1][1] < 1e-4  # what fp32 rounds, of the demo model
                break
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
