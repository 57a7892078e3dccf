"""Chats through the official client against a live pool, compared with the unsplit model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from pools import PROMPTS, reference_tokens
from serving import MODEL, Endpoint, open_endpoint

from deploy.pool import LocalPool, PoolSettings
from edge_agent.server.schema import ChatRequest
from edge_agent.text.ends import ModelEnds
from edge_agent.text.tokenizer import TextTokenizer

CHAT = "/v1/chat/completions"
PROMPT = PROMPTS[0]
COUNT = 16


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
def wanted(whole_model: torch.nn.Module, tokenizer: TextTokenizer) -> str:
    """What the unsplit model answers to PROMPT."""
    return tokenizer.decode(reference_tokens(whole_model, tokenizer, [PROMPT], COUNT)[0])


def chunks_of(endpoint: Endpoint, **options: Any) -> list[Any]:
    return list(endpoint.chat(PROMPT, stream=True, **options))


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_an_answer_is_the_unsplit_models(
    endpoint: Endpoint, wanted: str, tokenizer: TextTokenizer
) -> None:
    answer = endpoint.chat(PROMPT, temperature=0, max_tokens=COUNT)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", wanted)
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("length", 0, None)
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    prompt_tokens = len(tokenizer.encode(PROMPT))
    assert answer.usage.prompt_tokens == prompt_tokens
    assert answer.usage.completion_tokens == COUNT
    assert answer.usage.total_tokens == prompt_tokens + COUNT


def test_a_stream_is_made_as_openais(endpoint: Endpoint, wanted: str) -> None:
    with endpoint.http.stream(
        "POST",
        CHAT,
        json={
            "messages": [{"role": "user", "content": PROMPT}],
            "stream": True,
            "temperature": 0,
            "max_tokens": COUNT,
        },
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line for line in response.iter_lines() if line]
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk or "midspan" in chunk for chunk in chunks)
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert all(set(choice["delta"]) == {"content"} for choice in middle)
    assert "".join(choice["delta"]["content"] for choice in middle) == wanted
    assert {choice["finish_reason"] for choice in (first, *middle)} == {None}
    assert (last["delta"], last["finish_reason"]) == ({}, "length")


def test_a_streams_usage_comes_when_it_is_asked_for_in_a_last_chunk_without_choices(
    endpoint: Endpoint, tokenizer: TextTokenizer
) -> None:
    *chunks, last = chunks_of(endpoint, max_tokens=3, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert last.usage.completion_tokens == 3
    assert {chunk.usage for chunk in chunks} == {None}
    without = chunks_of(endpoint, max_tokens=3, stream_options={"include_usage": False})
    assert all(chunk.choices and chunk.usage is None for chunk in without)
    status, param, words = endpoint.refusal(
        CHAT, messages=[{"role": "user", "content": "a"}], stream_options={"include_usage": True}
    )
    assert (status, param, words) == (400, "stream_options", "stream_options: only with stream")


def test_content_may_be_parts_and_messages_may_follow_those_of_one_role(
    endpoint: Endpoint, wanted: str
) -> None:
    half = len("Once upon a time, ")
    parts = [{"type": "text", "text": PROMPT[:half]}, {"type": "text", "text": PROMPT[half:]}]
    said: list[dict[str, Any]] = [
        {"role": "user", "content": parts, "name": "Ann", "mood": "fine"},
    ]
    split = [
        {"role": "user", "content": PROMPT[: half - 1]},
        {"role": "user", "content": PROMPT[half:], "name": "Bob"},
    ]
    with_system = [
        {"role": "developer", "content": PROMPT[: half - 1]},
        {"role": "user", "content": PROMPT[half:]},
        {"role": "assistant", "content": None},
    ]
    for messages in (said, split, with_system):
        response = endpoint.post(
            CHAT, messages=messages, temperature=0, max_tokens=COUNT, user="me", store=None, new=[]
        )
        assert response.json()["choices"][0]["message"]["content"] == wanted, messages


def test_fields_that_are_null_are_as_if_they_were_not_there(
    endpoint: Endpoint, wanted: str
) -> None:
    optional = set(ChatRequest.model_fields) - {"messages", "temperature", "max_tokens"}
    response = endpoint.post(
        CHAT, messages=[{"role": "user", "content": PROMPT, "name": None}], temperature=0,
        max_tokens=COUNT, **dict.fromkeys(optional),
    )  # fmt: skip
    assert response.json()["choices"][0]["message"]["content"] == wanted


def test_both_names_of_the_limit_count_and_the_newer_one_holds(endpoint: Endpoint) -> None:
    for options, count in (
        ({"max_tokens": 2}, 2),
        ({"max_completion_tokens": 3}, 3),
        ({"max_tokens": 2, "max_completion_tokens": 4}, 4),
    ):
        assert endpoint.chat(PROMPT, **options).usage.completion_tokens == count


def test_a_seed_repeats_a_text_streamed_or_not_and_choice_k_has_seed_plus_k(
    endpoint: Endpoint,
) -> None:
    options: dict[str, Any] = {"max_tokens": COUNT}
    three = endpoint.chat(PROMPT, seed=2**63 - 1, n=3, **options)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert three.usage.completion_tokens == 3 * COUNT
    for k, text in enumerate(texts):
        again = chunks_of(endpoint, seed=2**63 - 1 + k, **options)
        assert text_of(again) == text
    streamed = chunks_of(endpoint, seed=2**63 - 1, n=3, **options)
    assert [text_of(streamed, k) for k in range(3)] == texts
    last = endpoint.chat(PROMPT, seed=2**64 - 1, n=2, **options).choices[1]
    first = endpoint.chat(PROMPT, seed=0, **options).choices[0]
    assert last.message.content == first.message.content


def test_openais_temperature_holds_when_nothing_is_said(endpoint: Endpoint) -> None:
    silent = endpoint.chat(PROMPT, seed=5, max_tokens=COUNT).choices[0].message.content
    warm = endpoint.chat(PROMPT, seed=5, max_tokens=COUNT, temperature=1).choices[0].message.content
    assert silent == warm
    narrow = endpoint.chat(PROMPT, seed=5, max_tokens=COUNT, temperature=2, top_p=0)
    greedy = endpoint.chat(PROMPT, max_tokens=COUNT, temperature=1e-9)
    assert narrow.choices[0].message.content == greedy.choices[0].message.content != silent


def test_penalties_and_biases_change_an_answer(
    endpoint: Endpoint, wanted: str, tokenizer: TextTokenizer
) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": COUNT}
    (first, *_) = tokenizer.tokenize(wanted, add_special_tokens=False)
    banned = endpoint.chat(PROMPT, logit_bias={str(first): -100}, **options)
    assert first not in tokenizer.tokenize(banned.choices[0].message.content, False)
    forced = endpoint.chat(PROMPT, logit_bias={str(first): 100}, **options)
    assert forced.choices[0].message.content == tokenizer.decode([first]) * COUNT
    repeated = endpoint.chat(
        PROMPT, logit_bias={str(first): 20}, frequency_penalty=2, presence_penalty=2, **options
    )
    assert 1 < repeated.choices[0].message.content.count(tokenizer.decode([first])) < COUNT


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_a_stop_string(endpoint: Endpoint, wanted: str, stream: bool) -> None:
    words = wanted.split(" ")
    inner = wanted[5:9]
    cut = wanted[: wanted.index(words[3])]
    for stop, text in (
        (words[3], cut),
        ([words[3]], cut),
        (["?", "!", "@", "#", words[3], words[5]], cut),
        ([inner], wanted[: wanted.index(inner)]),
        ([], wanted),
        (None, wanted),
        (["", "never"], wanted),
    ):
        options: dict[str, Any] = {"temperature": 0, "max_tokens": COUNT, "stop": stop}
        if stream:
            chunks = chunks_of(endpoint, **options)
            got, reason = text_of(chunks), chunks[-1].choices[0].finish_reason
        else:
            (choice,) = endpoint.chat(PROMPT, **options).choices
            got, reason = choice.message.content, choice.finish_reason
        assert (got, reason) == (text, "length" if text == wanted else "stop"), stop


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [None, "ved"])
def test_logprobs_are_the_unsplit_models_and_their_tokens_join_to_the_text(
    endpoint: Endpoint,
    whole_model: torch.nn.Module,
    tokenizer: TextTokenizer,
    stop: str | None,
    stream: bool,
) -> None:
    options: dict[str, Any] = {
        "logprobs": True, "top_logprobs": 3, "temperature": 1.3, "seed": 11,
        "max_tokens": COUNT, "presence_penalty": 1.0, "stop": stop,
    }  # fmt: skip
    if stream:
        chunks = chunks_of(endpoint, **options)
        text = text_of(chunks)
        parts = [choice.logprobs for chunk in chunks for choice in chunk.choices]
        entries = [entry for part in parts if part is not None for entry in part.content]
    else:
        (choice,) = endpoint.chat(PROMPT, **options).choices
        text, entries = choice.message.content, choice.logprobs.content
    assert "".join(entry.token for entry in entries) == text
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == text
    prompt_ids = tokenizer.encode(PROMPT)
    ids = tokenizer.tokenize(text, add_special_tokens=False)[: len(entries) - 1]
    with torch.inference_mode():
        logits = whole_model(torch.tensor([prompt_ids + ids])).logits[0].float()
    rows = torch.log_softmax(logits, -1)[len(prompt_ids) - 1 :]
    for entry, token_id, row in zip(entries, ids, rows, strict=False):
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        values, best = row.topk(3)
        assert [top.token for top in entry.top_logprobs] == [tokenizer.decode([i]) for i in best]
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            values.tolist(), abs=1e-4
        )
        same = [top.logprob for top in entry.top_logprobs if top.token == entry.token]
        assert same in ([], [entry.logprob])


def test_without_a_limit_a_story_is_told_to_its_end_which_is_no_token_of_it(
    endpoint: Endpoint,
) -> None:
    answer = endpoint.chat(PROMPT, logprobs=True, temperature=0)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.message.content.endswith(".")
    assert {len(entry.top_logprobs) for entry in choice.logprobs.content} == {0}
    assert len(choice.logprobs.content) == answer.usage.completion_tokens - 1


def test_tokens_of_a_character_carry_their_bytes_and_the_text_gets_it_whole(
    endpoint: Endpoint, tokenizer: TextTokenizer
) -> None:
    first, second = tokenizer.tokenize("é", add_special_tokens=False)
    chunks = chunks_of(
        endpoint, logit_bias={str(first): 100}, max_tokens=1, temperature=0, logprobs=True
    )
    (entry,) = [e for c in chunks for x in c.choices if x.logprobs for e in x.logprobs.content]
    assert (entry.token, entry.bytes) == ("", [0xC3])
    assert tokenizer.token_bytes(first) + tokenizer.token_bytes(second) == "é".encode()


def test_a_second_turn_sends_only_its_new_tokens(endpoint: Endpoint) -> None:
    asked: list[dict[str, str]] = [{"role": "user", "content": "One day a shy owl named Zoe met."}]

    def take_turn() -> dict[str, Any]:
        body = endpoint.post(
            CHAT, messages=asked, temperature=0, max_tokens=COUNT, midspan=True
        ).json()
        asked.append(body["choices"][0]["message"])
        stats: dict[str, Any] = body["midspan"][0] | {"prompt": body["usage"]["prompt_tokens"]}
        return stats

    first = take_turn()
    asked.append({"role": "user", "content": "Then a bear came."})
    second = take_turn()
    row = first["bytes_up_per_token"]
    new = second["prompt"] - first["prompt"] - COUNT + 1  # the answer's last token was never run
    spent = second["bytes_up"] - (COUNT - 1) * row
    assert new * 512 < spent < new * 512 + 200  # fp32, and a header
    asked[-2] = {"role": "user", "content": "Then a fox came."}
    del asked[-1]
    third = take_turn()
    assert third["bytes_up"] < first["prompt"] * 512 + COUNT * row  # the first turn is kept


def test_two_answers_are_never_made_in_one_conversation(endpoint: Endpoint) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": COUNT}
    streams = [endpoint.chat(PROMPTS[7], stream=True, **options) for _ in range(4)]
    texts = [text_of(list(stream)) for stream in streams]
    assert texts == [endpoint.chat(PROMPTS[7], **options).choices[0].message.content] * 4


def test_each_token_says_who_computed_it_and_what_it_cost(endpoint: Endpoint) -> None:
    chunks = chunks_of(endpoint, max_tokens=5, temperature=0, extra_body={"midspan": True})
    _, *tokens, last = [chunk.model_extra.get("midspan") for chunk in chunks]
    assert len(tokens) == 5
    for token in tokens:
        assert set(token) == {"token_id", "worker", "bytes_up", "bytes_down", "ms", "stages_ms"}
        assert token["worker"] == "w1"
        assert token["bytes_up"] >= 512  # a row of fp32
        assert token["ms"] > 0
    assert last["new_tokens"] == 5
    assert last["bytes_up"] == sum(token["bytes_up"] for token in tokens)
    assert last["bytes_down"] == sum(token["bytes_down"] for token in tokens)


def test_models_are_listed_and_found(endpoint: Endpoint) -> None:
    assert [model.id for model in endpoint.openai.models.list()] == [MODEL]
    assert endpoint.openai.models.retrieve(MODEL).owned_by == "midspan"
    with pytest.raises(openai.NotFoundError):
        endpoint.openai.models.retrieve("gpt-9")


def test_the_readmes_client_works_as_it_stands(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(import openai.*?)^```", readme, flags=re.S | re.M)
    exec(code.replace("http://127.0.0.1:8080", endpoint.url), {})
    assert capsys.readouterr().out.startswith(" ")


TEMPLATE = (
    "{% for m in messages %}{% if loop.index0 % 2 != (m.role == 'assistant') | int %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}"
    "{% endfor %}"
)


def test_a_template_from_a_file_that_wants_roles_to_alternate_gets_them_joined(
    pool: LocalPool, demo_ends: ModelEnds, tokenizer: TextTokenizer
) -> None:
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with open_endpoint(pool, demo_ends, template=TEMPLATE) as endpoint:
        usage = endpoint.post(CHAT, messages=twice, max_tokens=1).json()["usage"]
        assert usage["prompt_tokens"] == len(tokenizer.tokenize("<user>a\n\nb", False))
        status, param, words = endpoint.refusal(
            CHAT, messages=[{"role": "assistant", "content": "a"}]
        )
    assert (status, param) == (400, "messages")
    assert "the chat template refuses this: roles must alternate" in words
