"""Each example, run as its docstring says, against a live stack: what it says is the model's."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pools import reference_tokens
from serving import MODEL, Endpoint, open_endpoint

from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL, find_model
from deploy.pool import LocalPool, PoolSettings
from edge_agent.image.maker import ImageMaker, ImageSettings
from edge_agent.server.images import DEFAULT_GUIDANCE
from edge_agent.text.ends import ModelEnds
from edge_agent.text.tokenizer import TextTokenizer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FOX = "Once upon a time, there was a brave fox named Mia."
OTHERS = [
    "One sunny morning, a little duck named Max went to the river.",
    "Long ago, near a quiet forest, there lived a kind bear named Tom.",
]
COUNT = 40


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    settings = PoolSettings(workers=1, model=DEMO_TEXT_MODEL, image_model=DEMO_IMAGE_MODEL)
    with LocalPool(settings) as running:
        yield running


@pytest.fixture(scope="module")
def endpoint(pool: LocalPool, demo_ends: ModelEnds) -> Iterator[Endpoint]:
    with open_endpoint(pool, demo_ends, image_model=find_model(DEMO_IMAGE_MODEL)) as running:
        yield running


@pytest.fixture(scope="module")
def answer_to(whole_model: torch.nn.Module, demo_ends: ModelEnds) -> Callable[[str], str]:
    """What the unsplit model writes after a prompt."""
    tokenizer = TextTokenizer(demo_ends.directory)

    def write(prompt: str) -> str:
        (ids,) = reference_tokens(whole_model, tokenizer, [prompt], COUNT)
        return tokenizer.decode(ids)

    return write


def run_example(name: str, *arguments: str, cwd: Path, **variables: str) -> list[str]:
    """The lines that an example writes."""
    unset = {"OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=cwd, env=kept | variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_the_official_client_streams_a_chat_and_reads_log_probabilities(
    endpoint: Endpoint, tmp_path: Path, answer_to: Callable[[str], str], demo_ends: ModelEnds
) -> None:
    text, usage, *tokens = run_example("openai_client.py", f"{endpoint.url}/v1", cwd=tmp_path)
    assert text == answer_to(FOX)
    prompt_ids = TextTokenizer(demo_ends.directory).encode(FOX)
    assert usage == f"{len(prompt_ids)} tokens, then {COUNT}"
    found = [re.fullmatch(r"('.*') ([01]\.\d\d) of ('.*') \2, '.*' 0\.\d\d", row) for row in tokens]
    assert len(found) == 5
    assert all(row is not None and row[1] == row[3] for row in found)  # greedy: the best one
    assert text.startswith("".join(ast.literal_eval(row[1]) for row in found if row))


def test_plain_requests_need_nothing_but_python(
    endpoint: Endpoint, tmp_path: Path, answer_to: Callable[[str], str], demo_ends: ModelEnds
) -> None:
    lines = run_example("plain_requests.py", cwd=tmp_path, OPENAI_BASE_URL=f"{endpoint.url}/v1")
    count = len(TextTokenizer(demo_ends.directory).encode(FOX)) + COUNT
    pool = endpoint.http.get("/midspan/pool").json()
    assert lines == [
        f"models: {MODEL}, landscapes-sdxl",
        answer_to(FOX),
        f"{count} tokens",
        answer_to(FOX),
        f"computed by {pool['workers'][0]['worker_id']}",
        "refused with 400: max_tokens: Input should be greater than or equal to 0",
    ]


def test_langchain_invokes_streams_and_batches(
    endpoint: Endpoint, tmp_path: Path, answer_to: Callable[[str], str]
) -> None:
    lines = run_example("langchain_chat.py", f"{endpoint.url}/v1", cwd=tmp_path)
    assert lines == [
        f"invoke: {answer_to(FOX)}",
        f"stream: {answer_to(FOX)}",
        *(f"batch: {answer_to(prompt)}" for prompt in [FOX, *OTHERS]),
    ]


def test_a_picture_is_the_one_of_its_seed(
    endpoint: Endpoint, pool: LocalPool, tmp_path: Path
) -> None:
    options = ["-o", "made.png", "--steps", "2", "--seed", "7", "--prompt", "a hill"]
    (line,) = run_example("make_image.py", f"{endpoint.url}/v1", *options, cwd=tmp_path)
    data = (tmp_path / "made.png").read_bytes()
    assert line == f"made.png: {len(data)} bytes, seed 7"
    client = pool.connect()
    try:
        maker = ImageMaker(find_model(DEMO_IMAGE_MODEL), client)
        (wanted,) = maker.make(ImageSettings("a hill", steps=2, guidance=DEFAULT_GUIDANCE, seed=7))
    finally:
        client.close()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(wanted))


def test_the_curl_of_the_examples_is_a_request_that_is_answered(endpoint: Endpoint) -> None:
    line = next(
        line
        for line in (EXAMPLES / "plain_requests.py").read_text().splitlines()
        if " curl B" in line
    )
    body = line.partition("-d '")[2].rstrip("'")
    assert endpoint.post("/v1/completions", **json.loads(body)).status_code == 200
