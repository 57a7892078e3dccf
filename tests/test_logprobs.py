"""Log-probabilities through the pool against those of the unsplit model, and OpenAI's penalties."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pools import PROMPTS, generate

from common.codecs.codec import make_codec
from common.errors import SettingsError
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.engine import Engine
from edge_agent.text.ends import ModelEnds
from edge_agent.text.logprobs import TokenLogprob, rank
from edge_agent.text.sampler import Sampler
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.text_session import SCORED_ROWS
from edge_agent.text.tokenizer import TextTokenizer

TOP = 4
NEW_TOKENS = 12
LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1)) as running:
        yield running


@pytest.fixture(scope="module")
def engine(pool: LocalPool, demo_ends: ModelEnds) -> Iterator[Engine]:
    with Engine(demo_ends, [pool.edge_endpoint], uniform_settings("fp32")) as running:
        yield running


@pytest.fixture(scope="module")
def prompt_ids(demo_ends: ModelEnds) -> list[int]:
    return TextTokenizer(demo_ends.directory).encode(PROMPTS[4])


def assert_are_those_of(
    logprobs: list[TokenLogprob], whole_model: torch.nn.Module, token_ids: list[int], first: int
) -> None:
    """That they are what the unsplit model says of a text's tokens from `first` on."""
    with torch.inference_mode():
        logits = whole_model(torch.tensor([token_ids])).logits[0].float()
    want = torch.log_softmax(logits, -1)[first - 1 : -1]
    assert [entry.token_id for entry in logprobs] == token_ids[first:]
    for entry, row in zip(logprobs, want, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        values, ids = row.topk(TOP)
        assert [token_id for token_id, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert dict(entry.top).get(entry.token_id, entry.logprob) == entry.logprob


def test_new_tokens_have_the_models_logprobs_whatever_the_temperature(
    engine: Engine, whole_model: torch.nn.Module, prompt_ids: list[int]
) -> None:
    sampling = SamplingSettings(temperature=1.5, seed=3, presence_penalty=1.0)
    tokens = list(engine.submit(prompt_ids, NEW_TOKENS, sampling, top_logprobs=TOP))
    logprobs = [token.logprob for token in tokens if token.logprob is not None]
    assert len(logprobs) == len(tokens)
    text = prompt_ids + [token.token_id for token in tokens]
    assert_are_those_of(logprobs, whole_model, text, len(prompt_ids))


@pytest.mark.parametrize("new_tokens", [0, 3])
@pytest.mark.parametrize("length", [1, 2, SCORED_ROWS, 2 * SCORED_ROWS + 1])
def test_a_prompt_is_scored_token_by_token(
    engine: Engine,
    whole_model: torch.nn.Module,
    prompt_ids: list[int],
    length: int,
    new_tokens: int,
) -> None:
    text = (prompt_ids * 20)[:length]
    stream = engine.submit(text, new_tokens, top_logprobs=TOP, score_prompt=True)
    tokens = [token.token_id for token in stream]
    assert len(tokens) == new_tokens
    assert_are_those_of(stream.prompt_logprobs, whole_model, text, 1)
    if new_tokens:
        plain = [token.token_id for token in engine.submit(text, new_tokens)]
        assert tokens == plain


def test_a_conversation_is_scored_from_its_beginning_too(
    engine: Engine, whole_model: torch.nn.Module, prompt_ids: list[int]
) -> None:
    conversation = engine.open()
    first = [token.token_id for token in conversation.submit(prompt_ids, 4)]
    text = prompt_ids + first
    assert conversation.count_shared(text) == len(text) - 1
    stream = conversation.submit(text, 0, top_logprobs=TOP, score_prompt=True)
    assert list(stream) == []
    assert_are_those_of(stream.prompt_logprobs, whole_model, text, 1)
    conversation.close()


def test_several_prompts_are_scored_while_others_are_answered(
    engine: Engine, whole_model: torch.nn.Module, prompt_ids: list[int]
) -> None:
    plain = engine.submit(prompt_ids, 20)
    texts = [(prompt_ids * 20)[: 150 + index] for index in range(6)]
    streams = [engine.submit(text, 0, top_logprobs=TOP, score_prompt=True) for text in texts]
    for text, stream in zip(texts, streams, strict=True):
        assert list(stream) == []
        assert_are_those_of(stream.prompt_logprobs, whole_model, text, 1)
    assert len(list(plain)) == 20


def test_what_cannot_be_scored_is_refused(engine: Engine, demo_ends: ModelEnds) -> None:
    vocabulary = demo_ends.vocabulary
    with pytest.raises(SettingsError, match=f"the prompt has token {vocabulary}; .* has 0 to"):
        list(engine.submit([1, vocabulary], 1))
    with pytest.raises(SettingsError, match="the prompt has token -1"):
        list(engine.submit([1, -1], 1))
    with pytest.raises(SettingsError, match="the prompt has no tokens"):
        list(engine.submit([], 1))
    with pytest.raises(SettingsError, match="101 top log-probabilities; expected 0 to 100"):
        list(engine.submit([1], 1, top_logprobs=101))
    with pytest.raises(SettingsError, match="number of new tokens is 0; expected 1 or more"):
        list(engine.submit([1], 0))


def test_a_bias_keeps_tokens_out_and_lets_others_in(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int]
) -> None:
    plain, _ = generate(pool, demo_ends, prompt_ids, NEW_TOKENS)
    ban = SamplingSettings(logit_bias=dict.fromkeys(plain, -100.0))
    without, _ = generate(pool, demo_ends, prompt_ids, NEW_TOKENS, sampling=ban)
    assert not set(plain) & set(without)
    forced, _ = generate(
        pool, demo_ends, prompt_ids, 3, sampling=SamplingSettings(logit_bias={7: 100.0})
    )
    assert forced == [7, 7, 7]


def test_a_ban_holds_against_any_logit() -> None:
    logits = torch.tensor([1000.0, 0.0])
    assert Sampler(SamplingSettings(logit_bias={0: -100.0})).pick(logits, []) == 1
    assert Sampler(SamplingSettings(logit_bias={0: -99.0})).pick(logits, []) == 0


def test_penalties_are_of_generated_tokens_once_or_as_often_as_they_came() -> None:
    presence = Sampler(SamplingSettings(presence_penalty=0.9), prompt_tokens=1)
    frequency = Sampler(SamplingSettings(frequency_penalty=0.6), prompt_tokens=1)
    assert presence.pick(LOGITS, [1]) == frequency.pick(LOGITS, [1]) == 1  # of the prompt
    assert presence.pick(LOGITS, [0, 1, 1, 1]) == 1  # 2.1 against 2.0
    assert frequency.pick(LOGITS, [0, 1]) == 1  # 2.4
    assert frequency.pick(LOGITS, [0, 1, 1]) == 2  # 1.8


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"presence_penalty": 1e9}, "presence penalty is 1000000000.0; expected -10000 to 10000"),
        ({"frequency_penalty": float("nan")}, "frequency penalty is nan"),
        ({"logit_bias": {3: 101.0}}, "logit bias of token 3 is 101.0; expected -100 to 100"),
        ({"logit_bias": {-1: 1.0}}, "logit bias of token -1 is 1.0"),
    ],
)
def test_settings_out_of_bounds_are_named(values: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        SamplingSettings(**values)  # type: ignore[arg-type]


def test_a_bias_beyond_the_vocabulary_is_refused(engine: Engine, demo_ends: ModelEnds) -> None:
    beyond = SamplingSettings(logit_bias={demo_ends.vocabulary: 1.0})
    with pytest.raises(SettingsError, match=f"logit bias names token {demo_ends.vocabulary}"):
        list(engine.submit([1], 1, beyond))


def test_tokens_that_the_codec_left_out_are_not_among_the_likeliest() -> None:
    codec = make_codec("top2", "down", None)
    logits = codec.decode(codec.encode(LOGITS[None]), 1, len(LOGITS), torch.float32)
    (scored,) = rank(logits, [1], TOP)
    assert [token_id for token_id, _ in scored.top] == [1, 2]
