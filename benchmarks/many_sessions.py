"""Many sessions from one edge process against `generate` with a batch of as many.

    python benchmarks/many_sessions.py [--json]

Both run in this one call on the same model, in turns, with one torch thread per process: edge,
worker, and `generate`. The default model has about 60 M random parameters (that of
benchmarks/overhead.py). Tokens per second are of decoding, all sessions together: from when the
last session has its first token until the first has its last.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
import torch
from overhead import make_model
from transformers import AutoModelForCausalLM

from common.console.processes import freeze_loaded_objects, set_up_torch
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.engine import Engine
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.session_settings import uniform_settings


def time_generate(model: Any, prompts: torch.Tensor, tokens: int) -> tuple[float, list[list[int]]]:
    """Decode tokens/s of transformers' generate, without the prompt, and the tokens."""
    options = {"attention_mask": torch.ones_like(prompts), "do_sample": False}
    started_at = time.perf_counter()
    model.generate(prompts, max_new_tokens=1, **options)
    first_at = time.perf_counter()
    output = model.generate(prompts, max_new_tokens=tokens, **options)
    decode_s = (time.perf_counter() - first_at) - (first_at - started_at)
    return (tokens - 1) * len(prompts) / decode_s, output[:, prompts.shape[1] :].tolist()


def time_engine(
    ends: ModelEnds, endpoint: str, prompts: torch.Tensor, tokens: int, codec: str
) -> tuple[float, list[list[int]]]:
    """Decode tokens/s of an engine with all prompts at once, and the tokens."""
    written: list[list[int]] = [[] for _ in prompts]
    times: list[list[float]] = [[] for _ in prompts]

    def read(index: int) -> None:
        for token in streams[index]:
            written[index].append(token.token_id)
            times[index].append(token.at_s)

    settings = uniform_settings(codec)
    with Engine(ends, [endpoint], settings, max_sessions=len(prompts)) as engine:
        begun_at = time.monotonic()
        streams = []
        offsets = []
        for prompt in prompts.tolist():
            offsets.append(time.monotonic() - begun_at)
            streams.append(engine.submit(prompt, tokens))
        threads = [threading.Thread(target=read, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    firsts = [offset + at[0] for offset, at in zip(offsets, times, strict=True)]
    lasts = [offset + at[-1] for offset, at in zip(offsets, times, strict=True)]
    begun, ended = max(firsts), min(lasts)
    all_at = [o + t for o, at in zip(offsets, times, strict=True) for t in at]
    return sum(begun < at <= ended for at in all_at) / (ended - begun), written


@click.command()
@click.option("--model", help="Hugging Face directory.  [default: 60 M random parameters]")
@click.option("--tokens", default=64, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--sessions", "counts", multiple=True, type=int, default=[1, 4, 16, 64])
@click.option("--codec", default="int8", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    model: str | None, tokens: int, rounds: int, counts: list[int], codec: str, as_json: bool
) -> None:
    set_up_torch(threads=1)
    measured: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as made:
        directory = Path(model or made)
        if model is None:
            make_model(directory)
        whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with LocalPool(PoolSettings(workers=1, model=str(directory), threads=1)) as pool:
            ends = load_ends(directory)
            freeze_loaded_objects()
            for count in counts:
                prompts = torch.randint(3, 900, (count, 32))
                time_engine(ends, pool.edge_endpoint, prompts, 4, codec)
                plain, ours = [], []
                for _ in range(rounds):
                    speed, want = time_generate(whole, prompts, tokens)
                    plain.append(speed)
                    speed, got = time_engine(ends, pool.edge_endpoint, prompts, tokens, codec)
                    ours.append(speed)
                same = sum(a == b for a, b in zip(got, want, strict=True))
                measured[str(count)] = {
                    "ratio": round(
                        statistics.median(o / p for o, p in zip(ours, plain, strict=True)), 3
                    ),
                    "midspan_tokens_per_s": round(statistics.median(ours), 1),
                    "generate_tokens_per_s": round(statistics.median(plain), 1),
                    "sessions_with_the_same_tokens": same,
                }
                if not as_json:
                    click.echo(f"{count} sessions: {measured[str(count)]}")
    if as_json:
        click.echo(json.dumps({"sessions": measured, "codec": codec, "tokens": tokens}))


if __name__ == "__main__":
    main()
