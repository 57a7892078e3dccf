"""From the start of a worker's process to its first answered step, and what it then has in memory.

    python benchmarks/cold_start.py [--rounds N] [--json]

A worker for the demo text model beside one for the demo image model as well, in turns, each joining
an empty pool in which a session already waits; and both once more with libraries imported as they
import themselves (`whole`), which is what common/console/libraries.py is compared with. Stages are
what the worker itself says. CPU is the process's until the session had its token, and hardly
depends on what else the machine does. Memory is resident, and of that what is its own (not a file's
that other processes share). `bare` is a Python that has imported torch and nothing else.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click

from common.console.processes import set_up_torch
from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL, find_model
from deploy import pool as pool_module
from deploy.child import midspan_command
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings

KINDS = {"text": None, "text_and_images": DEMO_IMAGE_MODEL}  # the image model
WAYS = ("whole", "light")
WHOLE = """
import transformers.generation.utils, transformers.modeling_utils
import midspan.__main__
midspan.__main__.main()
"""
SETTLED_S = 0.5  # memory for KV is made ready behind the first step
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
BARE = "import torch, pathlib; print(pathlib.Path('/proc/self/status').read_text())"


def read_memory(text: str) -> dict[str, float]:
    """MB resident, and MB of that which are no file's."""
    sizes = {name: int(kb) / 1024 for name, kb in re.findall(r"(VmRSS|RssAnon):\s+(\d+) kB", text)}
    return {"resident_mb": round(sizes["VmRSS"], 1), "own_mb": round(sizes["RssAnon"], 1)}


def read_cpu_s(pid: int) -> float:
    """Of a process, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def whole_command(*arguments: str) -> list[str]:
    """As deploy.child's, for a command whose libraries import what they like."""
    return [sys.executable, "-P", "-c", WHOLE, *arguments]


def start_one(ends: ModelEnds, kind: str, way: str) -> dict[str, Any]:
    """One worker, started while a session waits for its first token."""
    settings = PoolSettings(
        workers=0, model=DEMO_TEXT_MODEL, image_model=KINDS[kind],
        broker_options=["--hold", "120"], worker_options=["--verbose"],
    )  # fmt: skip
    command = whole_command if way == "whole" else midspan_command
    with LocalPool(settings) as pool, patch.object(pool_module, "midspan_command", command):
        client = pool.connect(timeout_s=120)
        session = Session(ends, client, uniform_settings("int8"))
        answered_at: list[float] = []

        def ask() -> None:
            next(iter(session.generate([5, 6, 7, 8], 1, SamplingSettings())))
            answered_at.append(time.perf_counter())

        asking = threading.Thread(target=ask)
        asking.start()
        started_at = time.perf_counter()
        name = pool.start_worker()
        child = pool.workers[name]
        line = child.wait_for("started in", timeout_s=120)
        asking.join()
        cpu_s = read_cpu_s(child.pid)
        time.sleep(SETTLED_S)
        memory = read_memory(Path(f"/proc/{child.pid}/status").read_text())
        client.close()
    stages = {stage.strip(): float(s) for stage, s in re.findall(r"([a-z ]+) ([\d.]+) s[,)]", line)}
    first_s = round(answered_at[0] - started_at, 2)
    return {"first_step_s": first_s, "cpu_s": cpu_s, "stages_s": stages, **memory}


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(rounds: int, as_json: bool) -> None:
    set_up_torch(threads=1)
    ends = load_ends(find_model(DEMO_TEXT_MODEL))
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for kind, way in itertools.product(KINDS, WAYS):
            rows.setdefault((kind, way), []).append(start_one(ends, kind, way))
    bare = subprocess.run(
        [sys.executable, "-c", BARE], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    result: dict[str, Any] = {
        f"{kind}, {way}": {
            **{
                name: round(statistics.median(row[name] for row in found), 2)
                for name in ("first_step_s", "cpu_s", "resident_mb", "own_mb")
            },
            "stages_s": {
                stage: round(statistics.median(row["stages_s"][stage] for row in found), 2)
                for stage in found[0]["stages_s"]
            },
        }
        for (kind, way), found in rows.items()
    }
    size = sum(path.stat().st_size for path in find_model(DEMO_TEXT_MODEL).glob("*.safetensors"))
    result |= {"bare": read_memory(bare), "text_model_mb": round(size / 1e6, 1), "rounds": rounds}
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, figures in result.items():
        click.echo(f"{name:24} {figures}")


if __name__ == "__main__":
    main()
