"""A span larger than memory: layers that take turns, against all in memory and against accelerate.

    python benchmarks/stream_layers.py [--sessions N] [--layers K …] [--json]

All compute the same layers of the same model for the same prompts with one thread each, in turns:

- `resident`: a worker that holds all layers, without a limit of memory;
- `streamed`: a worker with --stream-layers K, in a memory cgroup;
- `accelerate`: `generate` of transformers with as many layers in memory and the others on the disk
  (accelerate's hooks), in a like cgroup, for all prompts in one batch of equal lengths, which is
  the best that it can do, and for one prompt after another.

The worker has all layers of the model, the edge the embeddings and the LM head. The limit counts
the system's cache of files, so weights come from the disk as they do where a model is larger than
memory; without the right to make a cgroup it is left out, and the weights are in that cache.
`accelerate` is not among midspan's own dependencies: pip install accelerate.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from common.console.processes import set_up_torch
from deploy import pool as pool_module
from deploy.child import midspan_command
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.engine import Engine
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session_settings import uniform_settings

LAYERS = 24
BESIDE_LAYERS_MB = 570  # libraries, KV, and room for the cache of files
LOSSLESS = uniform_settings("fp32")
PROMPT = 16  # tokens
CGROUPS = Path("/sys/fs/cgroup")
IN_CGROUP = 'echo $$ > "$0" && exec "$@"'
WITH_ACCELERATE = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
directory, resident, layers, tokens, prompts = json.loads(sys.argv[1])
torch.set_num_threads(1)
places = {f"model.layers.{i}": "cpu" if i < resident else "disk" for i in range(layers)}
places |= dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
model = AutoModelForCausalLM.from_pretrained(directory, device_map=places, dtype=torch.float32)
def write(ids):
    ids = torch.tensor(ids)
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                          max_new_tokens=tokens)[:, ids.shape[1]:].tolist()
begun_at = time.perf_counter()
written = write(prompts)
batch_s = time.perf_counter() - begun_at
begun_at = time.perf_counter()
write(prompts[:1])
one_s = time.perf_counter() - begun_at
print(json.dumps({"written": written, "batch_s": batch_s, "one_s": one_s}))
"""


def make_model(directory: Path, hidden: int) -> None:
    """Noise, nearly all of it in the layers; it never ends a text by itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000, hidden_size=hidden, intermediate_size=hidden * 11 // 4,
        num_hidden_layers=LAYERS, num_attention_heads=16, num_key_value_heads=4,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


@contextlib.contextmanager
def limit_memory(limit_mb: int) -> Iterator[Path | None]:
    """The file that a process's number goes into, to be bound; None where that cannot be done."""
    controller = CGROUPS / "memory" if (CGROUPS / "memory").is_dir() else CGROUPS
    group = controller / f"midspan-bench-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        old = group / "memory.limit_in_bytes"
        (old if old.exists() else group / "memory.max").write_text(str(limit_mb << 20))
        yield group / "cgroup.procs"
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


@dataclass(frozen=True, slots=True)
class Work:
    """What all of them do."""

    directory: Path
    ends: ModelEnds
    prompts: list[list[int]]
    tokens: int


def forget_cached(directory: Path) -> None:
    """Drop a model's files from the system's cache, where nobody's limit would count them."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bound(command: list[str], procs: Path | None) -> list[str]:
    return ["sh", "-c", IN_CGROUP, str(procs), *command] if procs is not None else command


def read_memory_mb(pid: int, what: str) -> float:
    """VmRSS is what is resident now, VmHWM the most that ever was."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) / 1024


def time_worker(work: Work, options: list[str], procs: Path | None) -> dict[str, Any]:
    """One worker that serves all sessions at once."""
    forget_cached(work.directory)

    def command(*arguments: str) -> list[str]:
        bare = midspan_command(*arguments)
        return bound(bare, procs) if arguments[0] == "worker" else bare

    settings = PoolSettings(
        workers=1,
        model=str(work.directory),
        span=str(work.ends.cut.middle),
        worker_options=[*options, "--cache-mb", "64"],
    )
    with patch.object(pool_module, "midspan_command", command), LocalPool(settings) as pool:
        with Engine(work.ends, [pool.edge_endpoint], LOSSLESS, timeout_s=600) as engine:
            begun_at = time.perf_counter()
            greedy = SamplingSettings()
            streams = [engine.submit(prompt, work.tokens, greedy) for prompt in work.prompts]
            written = [[token.token_id for token in stream] for stream in streams]
            took_s = time.perf_counter() - begun_at
        pid = next(iter(pool.workers.values())).pid
        serving_mb, peak_mb = read_memory_mb(pid, "VmRSS"), read_memory_mb(pid, "VmHWM")
    return {
        "tokens_per_s": sum(map(len, written)) / took_s,
        "serving_mb": serving_mb,
        "peak_mb": peak_mb,
        "written": written,
    }


def time_accelerate(work: Work, resident: int, procs: Path | None) -> dict[str, Any]:
    """All prompts in one batch, then one alone."""
    forget_cached(work.directory)
    arguments = json.dumps([str(work.directory), resident, LAYERS, work.tokens, work.prompts])
    command = bound([sys.executable, "-c", WITH_ACCELERATE, arguments], procs)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"accelerate: {done.returncode}: {done.stderr.strip()[-1500:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return {
        "tokens_per_s": work.tokens * len(work.prompts) / said["batch_s"],
        "one_by_one_tokens_per_s": work.tokens / said["one_s"],
        "written": said["written"],
    }


def compare(work: Work, layers: int, memory_mb: int, rounds: int) -> dict[str, Any]:
    """All of them in turns, with so many layers in memory."""
    results: dict[str, list[dict[str, Any]]] = {"resident": [], "streamed": [], "accelerate": []}
    with limit_memory(memory_mb) as procs:
        for _ in range(rounds):
            results["resident"].append(time_worker(work, [], None))
            streamed = time_worker(work, ["--stream-layers", str(layers)], procs)
            results["streamed"].append(streamed)
            results["accelerate"].append(time_accelerate(work, layers, procs))
            assert streamed["written"] == results["resident"][0]["written"]

    def middle(kind: str, name: str = "tokens_per_s") -> float:
        return float(statistics.median(result[name] for result in results[kind]))

    one_by_one = middle("accelerate", "one_by_one_tokens_per_s")
    return {
        "layers_in_memory": layers,
        "memory_limit_mb": memory_mb if procs is not None else None,
        "serving_mb": round(middle("streamed", "serving_mb")),
        "peak_mb": round(middle("streamed", "peak_mb")),
        "resident_tokens_per_s": round(middle("resident"), 2),
        "streamed_tokens_per_s": round(middle("streamed"), 2),
        "accelerate_tokens_per_s": round(middle("accelerate"), 2),
        "accelerate_one_by_one_tokens_per_s": round(one_by_one, 2),
        "streamed_to_resident": round(middle("streamed") / middle("resident"), 2),
        "streamed_to_accelerate": round(middle("streamed") / middle("accelerate"), 2),
        "streamed_to_accelerate_one_by_one": round(middle("streamed") / one_by_one, 2),
    }


@click.command()
@click.option("--sessions", default=8, show_default=True)
@click.option("--tokens", default=16, show_default=True)
@click.option("--layers", multiple=True, type=int, default=[4, 12], show_default=True,
              help=f"Of {LAYERS}, in memory at once.")  # fmt: skip
@click.option("--hidden", default=1024, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    sessions: int, tokens: int, layers: tuple[int, ...], hidden: int, rounds: int, as_json: bool
) -> None:
    """A span that is larger than memory."""
    set_up_torch(1)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(2, 2000, (sessions, PROMPT), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as place:
        make_model(Path(place), hidden)
        weights_mb = (Path(place) / "model.safetensors").stat().st_size / 1e6
        work = Work(Path(place), load_ends(place, f"0-{LAYERS}"), prompts, tokens)
        compared = [
            compare(work, count, round(BESIDE_LAYERS_MB + count * weights_mb / LAYERS), rounds)
            for count in layers
        ]
    facts = {"sessions": sessions, "layers": LAYERS, "weights_mb": round(weights_mb)}
    if as_json:
        click.echo(json.dumps(facts | {"compared": compared}))
        return
    click.echo(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
    for name in compared[0]:
        values = "".join(f"{each[name]!s:>10}" for each in compared)
        click.echo(f"{name.replace('_', ' '):40}{values}")


if __name__ == "__main__":
    main()
