"""Requests that cannot be served: refused in OpenAI's shape, with the field that is wrong."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import ENDLESS, MODEL, Endpoint, open_endpoint
from waiting import wait_until

from common.weights.demo_model import DEMO_IMAGE_MODEL, find_model
from deploy.pool import LocalPool, PoolSettings
from edge_agent.server.gate import MAX_BODY_BYTES
from edge_agent.server.opening import Bounds
from edge_agent.text.ends import ModelEnds, load_ends

CHAT, TEXT, IMAGES = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"
HELLO = [{"role": "user", "content": "Once"}]
BEYOND = 1024  # the first number that is no token of the demo model


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1)) as running:
        yield running


@pytest.fixture(scope="module")
def endpoint(pool: LocalPool, demo_ends: ModelEnds) -> Iterator[Endpoint]:
    with open_endpoint(pool, demo_ends) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (CHAT, {}, "messages", "Field required"),
        (CHAT, {"messages": []}, "messages", "at least 1 item"),
        (CHAT, {"messages": "hi"}, "messages", "valid list"),
        (CHAT, {"messages": [{"role": "king", "content": "a"}]}, "messages", "messages.0.role"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages", "valid string"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
            "a part is of type 'image_url'; expected text parts only",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "once " * 600}]},
            "messages",
            "has a context of 512",
        ),
        (CHAT, {"messages": HELLO, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        (CHAT, {"messages": HELLO, "max_tokens": True}, "max_tokens", "valid integer"),
        (CHAT, {"messages": HELLO, "temperature": 2.5}, "temperature", "less than or equal to 2"),
        (CHAT, {"messages": HELLO, "temperature": "1"}, "temperature", "valid number"),
        (CHAT, {"messages": HELLO, "top_p": -1}, "top_p", "greater than or equal to 0"),
        (CHAT, {"messages": HELLO, "presence_penalty": 3}, "presence_penalty", "equal to 2"),
        (CHAT, {"messages": HELLO, "n": 0}, "n", "greater than or equal to 1"),
        (CHAT, {"messages": HELLO, "seed": 2**64}, "seed", "less than"),
        (CHAT, {"messages": HELLO, "stop": 5}, "stop", "a string or a list of strings"),
        (CHAT, {"messages": HELLO, "top_logprobs": 3}, "top_logprobs", "only with logprobs"),
        (
            CHAT,
            {"messages": HELLO, "logprobs": True, "top_logprobs": 21},
            "top_logprobs",
            "less than or equal to 20",
        ),
        (CHAT, {"messages": HELLO, "tools": [{}]}, "tools", "this server calls no tools"),
        (CHAT, {"messages": HELLO, "functions": [{}]}, "functions", "calls no tools"),
        (
            CHAT,
            {"messages": HELLO, "response_format": {"type": "json_object"}},
            "response_format",
            "plain text only",
        ),
        (CHAT, {"messages": HELLO, "logit_bias": {"a": 1}}, "logit_bias", "'a' is not the number"),
        (CHAT, {"messages": HELLO, "logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
        (CHAT, {"messages": HELLO, "logit_bias": [5]}, "logit_bias", "expected an object"),
        (CHAT, {"messages": HELLO, "logit_bias": {str(BEYOND): 1}}, "logit_bias", "token 1024"),
        (TEXT, {}, "prompt", "Field required"),
        (TEXT, {"prompt": []}, "prompt", "list of either that is not empty"),
        (TEXT, {"prompt": ["a", 5]}, "prompt", "prompt 1 is neither"),
        (TEXT, {"prompt": [[]]}, "prompt", "prompt 0 is neither"),
        (TEXT, {"prompt": [0, BEYOND]}, "prompt", f"the prompt has token {BEYOND}"),
        (TEXT, {"prompt": [[0], [-1]]}, "prompt", "the prompt has token -1"),
        (TEXT, {"prompt": [0] * 512}, "prompt", "the prompt has 512 tokens"),
        (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs", "less than or equal to 20"),
        (TEXT, {"prompt": "a", "logprobs": True}, "logprobs", "valid integer"),
        (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens", "0 goes with echo only"),
        (TEXT, {"prompt": "a", "best_of": 3}, "best_of", "expected to be n"),
        (TEXT, {"prompt": "a", "suffix": "b"}, "suffix", "writes on from a prompt only"),
        (TEXT, {"prompt": ["a"] * 2000}, "prompt", "2000 choices in one request"),
    ],
)
def test_what_is_wrong_is_said_with_its_field_also_before_a_stream(
    endpoint: Endpoint, path: str, body: dict[str, Any], param: str, words: str, stream: bool
) -> None:
    got, field, message = endpoint.refusal(path, **body, stream=stream)
    assert (got, field) == (400, param), message
    assert words in message


def test_the_official_client_raises_what_it_raises_with_openai(endpoint: Endpoint) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        endpoint.complete([BEYOND])
    assert (bad.value.param, bad.value.type) == ("prompt", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        endpoint.chat("once " * 600)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        endpoint.openai.chat.completions.create(model="gpt-9", messages=HELLO)  # type: ignore[arg-type]
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert f"{MODEL} is" in str(unknown.value)


def test_bodies_that_are_no_json_are_refused(endpoint: Endpoint) -> None:
    for data, words in (
        (b"{", "the body is no JSON"),
        (b"", "the body"),
        (b"[]", "the body"),
        (b"[" * 100_000, "body"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": "a", "temperature": NaN}', "finite"),
    ):
        response = endpoint.http.post(
            TEXT, content=data, headers={"Content-Type": "application/json; charset=utf-8"}
        )
        assert response.status_code == 400, data[:20]
        assert words in response.json()["error"]["message"]
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = endpoint.http.post(TEXT, content=b"{}", headers={"Content-Type": kind})
        assert response.status_code == 415
        assert "expected application/json" in response.json()["error"]["message"]


def test_a_body_beyond_its_bound_is_not_read(endpoint: Endpoint) -> None:
    response = endpoint.http.post(
        TEXT, content=b" " * (MAX_BODY_BYTES + 1), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413
    assert f"more than {MAX_BODY_BYTES} bytes" in response.json()["error"]["message"]


def test_paths_and_methods_that_are_not_there_are_refused_in_the_same_shape(
    endpoint: Endpoint,
) -> None:
    assert endpoint.http.get("/v1/nothing").json()["error"]["message"] == "Not Found"
    assert endpoint.post("/v1/embeddings", input="a").status_code == 404
    assert endpoint.http.get(TEXT).status_code == 405
    status, _, words = endpoint.refusal(IMAGES, prompt="a hill")
    assert status == 404
    assert "start with --image-model" in words


def test_a_name_of_somebody_else_for_this_machine_is_not_answered(endpoint: Endpoint) -> None:
    refused = endpoint.http.get("/v1/models", headers={"Host": "evil.example:8080"})
    assert refused.status_code == 403
    for host in ("localhost:8080", "127.0.0.1", "[::1]:8080"):
        assert endpoint.http.get("/v1/models", headers={"Host": host}).status_code == 200


def test_a_key_opens_everything_but_health_and_docs(pool: LocalPool, demo_ends: ModelEnds) -> None:
    with open_endpoint(pool, demo_ends, api_keys=["sesame", "second"]) as locked:
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic sesame"}):
            for path in ("/v1/models", "/ready", "/metrics", "/midspan/pool"):
                response = locked.http.get(path, headers=headers)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "invalid_api_key"
        for path in ("/health", "/docs", "/openapi.json"):
            assert locked.http.get(path).status_code == 200
        for key in ("sesame", "second"):
            client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key)
            assert [model.id for model in client.models.list()] == [MODEL]
            client.close()
        named = locked.http.get(
            "/v1/models", headers={"Host": "mine.example", "Authorization": "Bearer sesame"}
        )
        assert named.status_code == 200


def test_the_docs_list_all_paths_and_load_nothing(endpoint: Endpoint) -> None:
    page = endpoint.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    listed = set(re.findall(r"<code>([A-Z]+) ([^<]+)</code>", page.text))
    schema = endpoint.http.get("/openapi.json").json()
    assert listed == {
        (method.upper(), path) for path, methods in schema["paths"].items() for method in methods
    }
    assert ("POST", "/v1/chat/completions") in listed
    assert "http" not in page.text
    assert "<script" not in page.text


def test_a_model_without_a_chat_template_says_what_to_do(
    pool: LocalPool, demo_directory: Path, tmp_path: Path
) -> None:
    bare = tmp_path / MODEL
    shutil.copytree(demo_directory, bare)
    (bare / "chat_template.jinja").unlink()
    with open_endpoint(pool, load_ends(bare)) as endpoint:
        response = endpoint.post(CHAT, messages=HELLO)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "no_chat_template")
        assert "--chat-template FILE, or use /v1/completions" in error["message"]
        assert endpoint.complete("Once", max_tokens=1).usage.completion_tokens == 1


def test_the_checkpoints_sampling_holds_unless_it_is_overridden(
    pool: LocalPool, demo_directory: Path, tmp_path: Path
) -> None:
    greedy = tmp_path / MODEL
    shutil.copytree(demo_directory, greedy)
    (greedy / "generation_config.json").write_text('{"temperature": 2.0, "top_k": 1}')
    with open_endpoint(pool, load_ends(greedy)) as endpoint:
        plain = {endpoint.complete("Once", max_tokens=12).choices[0].text for _ in range(2)}
        exact = endpoint.complete("Once", max_tokens=12, temperature=0).choices[0].text
        assert plain == {exact}
        free = endpoint.complete("Once", max_tokens=12, seed=1, extra_body={"top_k": 0})
        assert free.choices[0].text != exact


def test_a_full_queue_says_when_to_come_back(pool: LocalPool, demo_ends: ModelEnds) -> None:
    with open_endpoint(pool, demo_ends, bounds=Bounds(1, 1)) as narrow:
        engine = narrow.services.text.engine
        stream = narrow.complete("Once", stream=True, **ENDLESS)
        next(stream)
        (running,) = engine._running.values()
        with pytest.raises(openai.RateLimitError) as full:
            narrow.complete(["a", "b"])
        assert int(full.value.response.headers["retry-after"]) >= 1
        assert full.value.code == "rate_limit_exceeded"
        assert "answers are being made or waited for" in str(full.value)
        wait_until(lambda: engine.count_answers() == (1, 0))
        assert list(engine._running.values()) == [running]  # all are taken or none
        stream.close()
        wait_until(lambda: engine.count_answers() == (0, 0))
        assert len(narrow.complete(["a", "b"]).choices) == 2


def test_no_worker_is_a_503_with_the_reason(pool: LocalPool, demo_directory: Path) -> None:
    with open_endpoint(pool, load_ends(demo_directory, "3:5")) as elsewhere:
        wait_until(lambda: elsewhere.post(TEXT, prompt="a").status_code == 503)
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as away:
                elsewhere.complete("Once", stream=stream)
            assert (away.value.status_code, away.value.code) == (503, "no_worker")
            assert "retry-after" in away.value.response.headers
        ready = elsewhere.http.get("/ready")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "not_ready")
        assert elsewhere.http.get("/health").status_code == 200


def test_no_worker_for_pictures_is_a_503(pool: LocalPool, demo_ends: ModelEnds) -> None:
    with open_endpoint(pool, demo_ends, image_model=find_model(DEMO_IMAGE_MODEL)) as endpoint:
        wait_until(lambda: endpoint.post(IMAGES, prompt="a", steps=1).status_code == 503)
        with pytest.raises(openai.InternalServerError) as away:
            endpoint.openai.images.generate(prompt="a", extra_body={"steps": 1})
        assert away.value.code == "no_worker"


def test_no_broker_is_a_503_with_the_reason(demo_ends: ModelEnds) -> None:
    with open_endpoint("tcp://127.0.0.1:1", demo_ends, timeout_s=0.5) as nowhere:
        with pytest.raises(openai.InternalServerError) as away:
            nowhere.complete("Once")
        assert (away.value.status_code, away.value.code) == (503, "broker_unavailable")
        assert "no broker answers" in str(away.value)
        assert nowhere.http.get("/midspan/pool").json()["error"]["code"] == "broker_unavailable"


def test_an_error_after_the_stream_began_is_an_event(pool: LocalPool, demo_ends: ModelEnds) -> None:
    with open_endpoint(pool, demo_ends) as endpoint:
        stream = endpoint.complete("Once upon", max_tokens=400, stream=True)
        next(stream)
        endpoint.services.text.engine.close()
        with pytest.raises(openai.APIError, match="the engine is closed"):
            list(stream)
