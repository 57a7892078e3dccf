"""What the system adds to a token: edge, broker, worker and Redis against plain `generate`.

    python benchmarks/overhead.py [--json]

Both run in this one call on the same model with the same number of torch threads, in turns, so
that a noisy machine disturbs them alike. The default model has about 60 M random parameters
(hidden 512, 8 layers, vocabulary 32,000) and is made on the spot.

`added` is what is left of a token's time when head, middle and tail are taken away: serialization,
sockets, the broker, queues, codec and wake-ups.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from common.console.processes import freeze_loaded_objects, set_up_torch
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings


def make_model(directory: Path) -> None:
    """About 60 M parameters of noise; it never ends a text by itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def time_generate(model: Any, prompt_ids: list[int], tokens: int) -> tuple[float, list[int]]:
    """Decode tokens/s of transformers' generate, without the prompt, and the tokens."""
    ids = torch.tensor([prompt_ids])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    started_at = time.perf_counter()
    model.generate(ids, max_new_tokens=1, **options)
    first_at = time.perf_counter()
    output = model.generate(ids, max_new_tokens=tokens, **options)
    done_at = time.perf_counter()
    decode_s = (done_at - first_at) - (first_at - started_at)
    return (tokens - 1) / decode_s, output[0, ids.shape[1] :].tolist()


def time_midspan(
    ends: ModelEnds, endpoint: str, prompt_ids: list[int], tokens: int, codec: str
) -> tuple[Session, list[int]]:
    client = BrokerClient([endpoint])
    session = Session(ends, client, uniform_settings(codec))
    written = list(session.generate(prompt_ids, tokens, SamplingSettings()))
    client.close()
    return session, written


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


@click.command()
@click.option("--model", help="Hugging Face directory.  [default: 60 M random parameters]")
@click.option("--tokens", default=96, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--codec", default="int8", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    model: str | None, tokens: int, rounds: int, threads: int, codec: str, as_json: bool
) -> None:
    set_up_torch(threads)
    with tempfile.TemporaryDirectory() as made:
        directory = Path(model or made)
        if model is None:
            make_model(directory)
        whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        settings = PoolSettings(workers=1, model=str(directory), threads=threads)
        with LocalPool(settings) as pool:
            ends = load_ends(directory)
            freeze_loaded_objects()
            prompt_ids = torch.randint(3, 900, (32,)).tolist()
            time_midspan(ends, pool.edge_endpoint, prompt_ids, 8, codec)
            time_generate(whole, prompt_ids, 8)
            plain, ours, sessions = [], [], []
            for _ in range(rounds):
                speed, want = time_generate(whole, prompt_ids, tokens)
                plain.append(speed)
                session, got = time_midspan(ends, pool.edge_endpoint, prompt_ids, tokens, codec)
                ours.append(session.stats.to_json()["tokens_per_s"])
                sessions.append(session)
    stages = {
        name: [s * 1e3 for session in sessions for s in session.stats.stage_s[name]]
        for name in sessions[0].stats.stage_s
    }
    added = [
        network + queue for network, queue in zip(stages["network"], stages["queue"], strict=True)
    ]
    result = {
        "ratio": round(statistics.median(o / p for o, p in zip(ours, plain, strict=True)), 3),
        "generate_tokens_per_s": round(statistics.median(plain), 2),
        "midspan_tokens_per_s": round(statistics.median(ours), 2),
        "added_ms_p50": round(statistics.median(added), 3),
        "added_ms_p99": round(percentile(added, 0.99), 3),
        "stages": {
            name: {
                "p50_ms": round(statistics.median(values), 3),
                "p99_ms": round(percentile(values, 0.99), 3),
            }
            for name, values in stages.items()
        },
        "same_tokens": got == want,
        "threads": threads,
        "codec": codec,
        "parameters": sum(p.numel() for p in whole.parameters()),
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result.items():
        click.echo(f"{name:24} {value}")


if __name__ == "__main__":
    main()
