"""What encoding and decoding cost, as a part of the time of one decoder layer of the same size.

    python benchmarks/codec.py [--codec smallest] [--json]

For every codec, or those that are named, at hidden 256, 2048 and 4096 and for 1 and 256 tokens:
what an edge does for a step, encoding the uplink and decoding the downlink, against a Llama layer
(intermediate 2.7 times hidden, heads of 64) in the same run on the same number of threads. A
calibration is made up, since only its shapes matter here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch
from report import tell_rows
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from common.codecs.calibration import Calibration, DirectionCalibration, Predictor
from common.codecs.codec import make_codec
from common.console.processes import set_up_torch

CODECS = ("fp32", "fp16", "int8", "int4:token:affine", "int5+hadamard64", "fp8-e4m3", "compact",
          "smallest")  # fmt: skip


def made_up_calibration(hidden: int) -> Calibration:
    direction = DirectionCalibration(
        torch.zeros(hidden), torch.ones(hidden), torch.eye(hidden), torch.eye(hidden),
        torch.ones(hidden),
    )  # fmt: skip
    rank = min(64, hidden // 4)
    predictor = Predictor(
        torch.zeros(hidden), torch.zeros(hidden, rank), torch.zeros(rank, hidden),
        torch.zeros(hidden),
    )  # fmt: skip
    return Calibration("m", (0, 1), 0, direction, direction, direction, predictor, "c")


def median_s(work: Callable[[], object], budget_s: float) -> float:
    """Median time of one call, over as many calls as fit into the budget, 3 at least."""
    work()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_s and len(times) < 200):
        started_at = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_at)
    return statistics.median(times)


def layer_work(hidden: int, tokens: int) -> Callable[[], object]:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 27 // 10, num_hidden_layers=1,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
        attn_implementation="sdpa",
    )  # fmt: skip
    layer = LlamaDecoderLayer(config, 0).eval()
    rows = torch.randn(1, tokens, hidden)
    rotary = LlamaRotaryEmbedding(config)(rows, torch.arange(tokens)[None])

    @torch.inference_mode()
    def run() -> object:
        return layer(rows, position_embeddings=rotary)

    return run


def codec_work(name: str, hidden: int, tokens: int, calibration: Calibration) -> Callable[[], None]:
    """Both directions of one step at one end: encode the uplink, decode the downlink, and so on."""
    up, down = make_codec(name, "up", calibration), make_codec(name, "down", calibration)
    rows = torch.randn(tokens, hidden)
    received = up.decode(up.encode(rows), tokens, hidden)
    body = down.encode(rows, received)

    @torch.inference_mode()
    def run() -> None:
        up.encode(rows)
        down.decode(body, tokens, hidden, torch.float32, received)

    return run


@click.command()
@click.option("--hidden", "sizes", multiple=True, type=int, default=[256, 2048, 4096])
@click.option("--tokens", "counts", multiple=True, type=int, default=[1, 256])
@click.option("--codec", "names", multiple=True, default=CODECS)
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    sizes: tuple[int, ...],
    counts: tuple[int, ...],
    names: tuple[str, ...],
    threads: int,
    as_json: bool,
) -> None:
    set_up_torch(threads)
    results = []
    for hidden in sizes:
        calibration = made_up_calibration(hidden)
        for tokens in counts:
            layer = layer_work(hidden, tokens)
            for name in names:
                layer_s = median_s(layer, 0.5)
                codec_s = median_s(codec_work(name, hidden, tokens, calibration), 0.5)
                results.append(
                    {
                        "codec": name, "hidden": hidden, "tokens": tokens,
                        "us_per_token": round(codec_s / tokens * 1e6, 2),
                        "layer_us_per_token": round(layer_s / tokens * 1e6, 2),
                        "percent_of_layer": round(100 * codec_s / layer_s, 2),
                    }
                )  # fmt: skip
    tell_rows(results, as_json)


if __name__ == "__main__":
    main()
