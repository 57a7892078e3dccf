"""What bfloat16 and 8-bit weights are worth to a worker: speed, memory and perplexity.

    python benchmarks/precision.py [--steps 20] [--text-tokens 8192] [--json]

Speed and memory are of a model with 340 M random parameters (hidden 1,536, 12 layers, the middle
half in the pool), perplexity is of the demo model's validation text; all through a broker and a
worker, one thread each. Memory is what belongs to the worker alone and not to files that it shares.
Steps of one row and of sixteen, as drafts make them: milliseconds in the middle layers, medians,
and their ratio to float32.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from report import tell_rows
from transformers import AutoModelForCausalLM, LlamaConfig

from common.console.processes import set_up_torch
from common.spans.attention import Segment
from common.spans.cut import Span
from common.weights.checkpoint import Checkpoint
from common.weights.demo_model import find_model
from common.weights.loading import load_span, parse_dtype
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import load_ends
from edge_agent.text.perplexity import PerplexityMeter, sliding_windows
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

MIDDLE = Span(3, 9)
WAYS = {
    "float32": ("float32", []),
    "bfloat16": ("bfloat16", []),
    "float32, int8 weights": ("float32", ["--weights", "int8"]),
    "bfloat16, int8 weights": ("bfloat16", ["--weights", "int8"]),
}
ROWS = 16
WINDOW = 256


def make_large_model(directory: Path) -> None:
    """About 340 M parameters of noise."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=1536, intermediate_size=4096, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def time_steps(directory: Path, steps: int) -> dict[str, dict[int, float]]:
    """Median milliseconds of a step in the middle half, by way and rows; all ways in turns."""
    spans = {}
    for name, (dtype, options) in WAYS.items():
        checkpoint = Checkpoint(directory)
        spans[name] = load_span(checkpoint, MIDDLE, parse_dtype(dtype), in_8_bits=bool(options))
        checkpoint.close()
    took: dict[str, dict[int, list[float]]] = {name: {} for name in WAYS}
    for rows in (1, ROWS):
        values = torch.randn(rows, 1536)
        for _ in range(steps):
            for name, span in spans.items():
                begun_at = time.perf_counter()
                span.run(values.to(span.dtype), [Segment(span.new_kv(), 0, rows)])
                took[name].setdefault(rows, []).append(time.perf_counter() - begun_at)
    return {
        name: {rows: 1e3 * statistics.median(times) for rows, times in by_rows.items()}
        for name, by_rows in took.items()
    }


def measure_memory(directory: Path, dtype: str, options: list[str]) -> float:
    """MB of a worker that has answered, its own."""
    settings = PoolSettings(
        workers=1, model=str(directory), span=str(MIDDLE), dtype=dtype, worker_options=options
    )
    with LocalPool(settings) as pool:
        client = pool.connect()
        (worker,) = client.status()["workers"]
        client.close()
        rollup = Path(f"/proc/{worker['pid']}/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"^Private_\w+:\s+(\d+) kB", rollup, re.M)) / 1e3


def measure_perplexity(dtype: str, options: list[str], tokens: int) -> float:
    """Of the demo model's validation text, in windows."""
    directory = find_model(None)
    ids = TextTokenizer(directory).encode((directory / "validation.txt").read_text())[:tokens]
    ends = load_ends(directory)
    meter = PerplexityMeter()
    settings = PoolSettings(workers=1, model=str(directory), dtype=dtype, worker_options=options)
    with LocalPool(settings) as pool:
        client = pool.connect()
        for window in sliding_windows(len(ids), WINDOW, WINDOW // 2):
            part = ids[window.begin : window.end]
            logits = Session(ends, client, uniform_settings("fp32")).score(part)
            meter.add(logits, part, window.scored)
        client.close()
    return meter.perplexity


@click.command()
@click.option("--steps", default=20, show_default=True, help="Of each kind.")
@click.option("--text-tokens", default=8192, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(steps: int, text_tokens: int, as_json: bool) -> None:
    set_up_torch(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made:
        make_large_model(Path(made))
        took = time_steps(Path(made), steps)
        plain = took["float32"]
        for name, (dtype, options) in WAYS.items():
            perplexity = measure_perplexity(dtype, options, text_tokens)
            base = rows[0]["perplexity"] if rows else perplexity
            rows.append({
                "way": name,
                "ms_1_row": round(took[name][1], 2),
                f"ms_{ROWS}_rows": round(took[name][ROWS], 2),
                "speed_1_row": round(plain[1] / took[name][1], 2),
                f"speed_{ROWS}_rows": round(plain[ROWS] / took[name][ROWS], 2),
                "worker_mb": round(measure_memory(Path(made), dtype, options)),
                "perplexity": round(perplexity, 5),
                "loss_percent": round(100 * (perplexity / base - 1), 3),
            })  # fmt: skip
    tell_rows(rows, as_json)


if __name__ == "__main__":
    main()
