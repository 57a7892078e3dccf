"""`midspan ask` with the options that people know from llama2.c's run."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import error_line, run_midspan
from pools import PROMPTS

from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.tokenizer import TextTokenizer

CONTEXT = 512  # of the demo model


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1)) as running:
        yield running


def ask(pool: LocalPool, prompt: str, *options: str) -> dict[str, Any]:
    done = run_midspan(
        "ask", prompt, "--broker", pool.edge_endpoint, "--json", "--no-serve", *options
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_short_names_mean_the_same(pool: LocalPool) -> None:
    drawn = ["-t", "0.9", "--seed", "3"]
    long = ask(pool, PROMPTS[0], *drawn, "--top-p", "0.3", "--max-new-tokens", "12")
    short = ask(pool, PROMPTS[0], *drawn, "-p", "0.3", "--steps", "12")
    assert short["token_ids"] == long["token_ids"]
    assert len(short["token_ids"]) == 12
    other = ask(pool, PROMPTS[0], *drawn, "-p", "1", "--steps", "12")
    assert other["token_ids"] != short["token_ids"]


def test_no_number_of_tokens_is_all_that_fit(pool: LocalPool, demo_directory: Path) -> None:
    words = ("mouse " * 1000).strip()
    tokenizer = TextTokenizer(demo_directory)
    prompt = words[: len(tokenizer.decode(tokenizer.encode(words)[: CONTEXT - 9]))]
    room = CONTEXT - len(tokenizer.encode(prompt))
    answer = ask(pool, prompt, "-n", "0", "-t", "1", "--seed", "1")
    assert room < 12
    assert (len(answer["token_ids"]), answer["stats"]["finish_reason"]) == (room, "length")


def test_a_system_prompt_makes_a_chat_of_it(pool: LocalPool, demo_directory: Path) -> None:
    tokenizer = TextTokenizer(demo_directory)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": PROMPTS[1]}]
    rendered = tokenizer.render_chat(messages, None)
    answer = ask(pool, PROMPTS[1], "-y", "Be kind.", "-n", "3")
    assert answer["stats"]["prompt_tokens"] == len(rendered)
    assert len(rendered) > len(tokenizer.encode(PROMPTS[1]))


def test_another_tokenizer_is_taken_for_the_models(pool: LocalPool, tmp_path: Path) -> None:
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256)), b" "]
    data = struct.pack("<i", 6) + b"".join(struct.pack("<fi", 0, len(p)) + p for p in pieces)
    (tmp_path / "tok.bin").write_bytes(data)
    answer = ask(pool, "abc", "-z", str(tmp_path / "tok.bin"), "-n", "1")
    assert answer["stats"]["prompt_tokens"] == 5  # the beginning, a space and three bytes
    line = error_line("ask", "abc", "-z", "nothing", "--broker", pool.edge_endpoint)
    assert "--tokenizer nothing cannot be read: there is no such file" in line
    line = error_line(
        "ask", "abc", "-z", str(tmp_path / "tok.bin"), "-y", "x", "--broker", pool.edge_endpoint
    )
    assert "no chat template, so --system has no place" in line
