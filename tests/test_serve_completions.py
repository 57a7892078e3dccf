"""Completions through the official client: prompts of every kind, log-probabilities, echo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from pools import PROMPTS, reference_tokens
from serving import Endpoint, open_endpoint

from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.tokenizer import TextTokenizer

TEXT = "/v1/completions"
COUNT = 8
END = 1  # the demo model's end of text


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1)) as running:
        yield running


@pytest.fixture(scope="module")
def endpoint(pool: LocalPool, demo_ends: ModelEnds) -> Iterator[Endpoint]:
    with open_endpoint(pool, demo_ends) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(demo_ends: ModelEnds) -> TextTokenizer:
    return TextTokenizer(demo_ends.directory)


@pytest.fixture(scope="module")
def wanted(whole_model: torch.nn.Module, tokenizer: TextTokenizer) -> list[str]:
    tokens = reference_tokens(whole_model, tokenizer, PROMPTS[:3], COUNT)
    return [tokenizer.decode(ids) for ids in tokens]


@pytest.fixture(scope="module")
def score(whole_model: torch.nn.Module) -> Any:
    """Log-probabilities (T - 1, vocabulary) of what follows each token but the last."""

    def compute(token_ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits = whole_model(torch.tensor([list(token_ids)])).logits[0].float()
        return torch.log_softmax(logits, -1)[:-1]

    return compute


def texts_of(completion: Any) -> list[str]:
    assert [choice.index for choice in completion.choices] == list(range(len(completion.choices)))
    return [choice.text for choice in completion.choices]


def test_prompts_are_texts_or_token_ids_one_or_several(
    endpoint: Endpoint, wanted: list[str], tokenizer: TextTokenizer
) -> None:
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS[:3]]
    for prompt, texts in (
        (PROMPTS[0], wanted[:1]),
        (PROMPTS[:3], wanted),
        (ids[0], wanted[:1]),
        (ids, wanted),
        ([PROMPTS[0], ids[1], PROMPTS[2]], wanted),
    ):
        done = endpoint.post(TEXT, prompt=prompt, temperature=0, max_tokens=COUNT).json()
        assert [choice["text"] for choice in done["choices"]] == texts
        assert done["usage"]["prompt_tokens"] == sum(map(len, ids[: len(texts)]))
        assert done["usage"]["completion_tokens"] == COUNT * len(texts)
    assert endpoint.complete(PROMPTS[0]).usage.completion_tokens == 16  # as OpenAI has it


def test_several_prompts_with_several_choices_are_in_order_streamed_or_not(
    endpoint: Endpoint,
) -> None:
    options: dict[str, Any] = {"n": 2, "seed": 7, "max_tokens": COUNT}
    texts = texts_of(endpoint.complete(PROMPTS[:2], **options))
    for place, index in ((0, 1), (1, 3)):
        alone = endpoint.complete(PROMPTS[place], seed=8, max_tokens=COUNT)
        assert texts[index] == alone.choices[0].text
    streamed = [""] * 4
    for chunk in endpoint.complete(PROMPTS[:2], stream=True, **options):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


def test_an_echo_has_an_entry_for_every_token_and_says_what_the_unsplit_model_says(
    endpoint: Endpoint, tokenizer: TextTokenizer, score: Any
) -> None:
    done = endpoint.complete(
        PROMPTS[0], echo=True, logprobs=4, max_tokens=COUNT, temperature=1.5, seed=2
    )
    (choice,) = done.choices
    entries = choice.logprobs
    prompt_ids = tokenizer.encode(PROMPTS[0])
    assert choice.text.startswith(PROMPTS[0])
    generated = choice.text.removeprefix(PROMPTS[0])
    ids = prompt_ids + tokenizer.tokenize(generated, add_special_tokens=False)
    assert len(entries.tokens) == len(ids) == len(prompt_ids) + COUNT
    assert (entries.token_logprobs[0], entries.top_logprobs[0]) == (None, None)
    for place, row in enumerate(score(ids), start=1):
        own = entries.token_logprobs[place]
        assert own == pytest.approx(float(row[ids[place]]), abs=1e-4)
        best = row.topk(4)
        top = entries.top_logprobs[place]
        expected = dict(zip(map(tokenizer.decode, best.indices), best.values.tolist(), strict=True))
        assert {name: top[name] for name in expected} == pytest.approx(expected, abs=1e-4)
        assert top[entries.tokens[place]] == own  # the very same number
        assert set(top) - set(expected) <= {entries.tokens[place]}
    for token, offset in list(zip(entries.tokens, entries.text_offset, strict=True))[1:]:
        assert choice.text[offset : offset + len(token)] == token


def test_an_end_of_text_has_an_entry_where_it_was_generated_and_where_it_was_given(
    endpoint: Endpoint, tokenizer: TextTokenizer, score: Any
) -> None:
    ids = [*tokenizer.encode("The end."), END, *tokenizer.encode("Once")]
    done = endpoint.complete(
        [ids], echo=True, logprobs=0, max_tokens=4, temperature=0, logit_bias={str(END): 100}
    )
    (choice,) = done.choices
    assert (choice.text, choice.finish_reason) == ("The end.Once", "stop")
    assert choice.logprobs.tokens[-1] == "</s>"
    assert len(choice.logprobs.tokens) == len(ids) + 1
    assert done.usage.prompt_tokens == len(ids)  # none was added
    rows = score([*ids, END])
    own = [float(row[token]) for row, token in zip(rows, [*ids[1:], END], strict=True)]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(own, abs=1e-4)
    assert [len(top) for top in choice.logprobs.top_logprobs[1:]] == [1] * len(ids)


def test_a_prompt_alone_is_scored_or_just_said_again(
    endpoint: Endpoint, tokenizer: TextTokenizer, score: Any
) -> None:
    ids = tokenizer.encode(PROMPTS[1])
    done = endpoint.complete(PROMPTS[1], echo=True, logprobs=1, max_tokens=0)
    (choice,) = done.choices
    assert (choice.text, choice.finish_reason) == (PROMPTS[1], "length")
    own = [float(row[token]) for row, token in zip(score(ids), ids[1:], strict=True)]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(own, abs=1e-4)
    assert done.usage.completion_tokens == 0
    bare = endpoint.complete(PROMPTS[1], echo=True, max_tokens=0)
    assert (bare.choices[0].text, bare.choices[0].logprobs) == (PROMPTS[1], None)
    more = endpoint.complete(PROMPTS[1], echo=True, max_tokens=2, temperature=0).choices[0]
    assert more.text.startswith(PROMPTS[1])


def test_a_streamed_echo_is_the_whole_one_in_pieces(endpoint: Endpoint) -> None:
    options: dict[str, Any] = {
        "echo": True, "logprobs": 2, "max_tokens": COUNT, "seed": 3, "stop": "z",
    }  # fmt: skip
    (whole,) = endpoint.complete(PROMPTS[2], **options).choices
    text, lists = "", {name: [] for name in whole.logprobs.model_fields_set}  # type: ignore[var-annotated]
    for chunk in endpoint.complete(PROMPTS[2], stream=True, **options):
        for choice in chunk.choices:
            text += choice.text
            for name, values in lists.items():
                values += getattr(choice.logprobs, name) if choice.logprobs else []
    assert text == whole.text
    for name, values in lists.items():
        if "logprobs" in name:
            values[1:], own = [flatten(v) for v in values[1:]], getattr(whole.logprobs, name)
            assert values[1:] == pytest.approx([flatten(v) for v in own[1:]], abs=1e-4)
        else:
            assert values == getattr(whole.logprobs, name)


def flatten(value: float | dict[str, float]) -> float:
    return sum(value.values()) if isinstance(value, dict) else value


def test_log_likelihoods_are_had_as_lm_evaluation_harness_asks_for_them(
    endpoint: Endpoint, tokenizer: TextTokenizer, score: Any
) -> None:
    """Its `local-completions`: contexts with continuations, of different lengths, as token ids."""
    contexts = [tokenizer.encode(prompt) for prompt in (PROMPTS[0], "A", " ".join(PROMPTS[:6]))]
    endings = [tokenizer.tokenize(text, False) for text in (" She was kind.", " fox", " The")]
    prompts = [context + ending for context, ending in zip(contexts, endings, strict=True)]
    done = endpoint.post(
        TEXT, model="stories-llama", prompt=prompts, temperature=0, max_tokens=1, logprobs=1,
        seed=1234, echo=True,
    ).json()  # fmt: skip
    choices = sorted(done["choices"], key=lambda choice: choice["index"])
    for choice, ids, context in zip(choices, prompts, contexts, strict=True):
        begin = len(context)
        own = choice["logprobs"]["token_logprobs"][begin:-1]
        top = choice["logprobs"]["top_logprobs"][begin:-1]
        rows = score(ids)[begin - 1 :]
        want = [float(row[token]) for row, token in zip(rows, ids[begin:], strict=True)]
        assert sum(own) == pytest.approx(sum(want), abs=1e-3)
        is_greedy = all(value == max(best.values()) for value, best in zip(own, top, strict=True))
        assert is_greedy == all(
            int(row.argmax()) == token for row, token in zip(rows, ids[begin:], strict=True)
        )


@pytest.mark.parametrize("logprobs", [0, 20])
def test_from_no_to_twenty_likeliest_tokens_are_told(endpoint: Endpoint, logprobs: int) -> None:
    (choice,) = endpoint.complete(PROMPTS[0], logprobs=logprobs, max_tokens=3, seed=1).choices
    assert {len(top) for top in choice.logprobs.top_logprobs} <= {max(1, logprobs), logprobs + 1}
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset[0] == 0


def test_a_part_of_a_character_is_spelled_in_bytes(
    endpoint: Endpoint, tokenizer: TextTokenizer
) -> None:
    first, second = tokenizer.tokenize("é", add_special_tokens=False)
    ids = [*tokenizer.encode("caf"), first, second]
    (choice,) = endpoint.complete([ids], echo=True, logprobs=1, max_tokens=0).choices
    assert choice.text == "café"
    assert choice.logprobs.tokens[-2:] == ["bytes:\\xc3", "é"]
    assert choice.logprobs.text_offset[-2:] == [3, 3]


def test_a_text_whose_end_is_ignored_has_all_its_tokens(endpoint: Endpoint) -> None:
    wanted: dict[str, Any] = {"prompt": PROMPTS[0], "max_tokens": COUNT, "temperature": 0}
    ending = {**wanted, "logit_bias": {str(END): 100}}
    done = endpoint.post(TEXT, **ending).json()
    assert (done["choices"][0]["finish_reason"], done["usage"]["completion_tokens"]) == ("stop", 1)
    ignored = endpoint.post(TEXT, **ending, ignore_eos=True).json()
    assert ignored["choices"][0]["finish_reason"] == "length"
    assert ignored["usage"]["completion_tokens"] == COUNT
    assert (
        ignored["choices"][0]["text"] == endpoint.post(TEXT, **wanted).json()["choices"][0]["text"]
    )
