"""Run sessions at moderate load for long, and watch memory and descriptors of every process.

    python benchmarks/soak.py --minutes 30

Prints, for broker, workers, Redis and the edge (this process), resident memory after warming up and
at the end, its slope by least squares over that time, and open descriptors at both times.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path

import numpy as np

from common.console.processes import set_up_torch
from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL, find_model
from deploy.pool import LocalPool, PoolSettings
from edge_agent.image.maker import ImageMaker, ImageSettings
from edge_agent.text.ends import load_ends
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

SAMPLE_S = 5.0
PROMPTS = ["Once upon a time, there was a fox.", "One day, a bear named Tom went to the lake."]


def read_process(pid: int) -> tuple[float, int]:
    """Resident memory in MB and open descriptors."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(resident.split()[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def write_texts(pool: LocalPool, pause_s: float, stop_at: float, done: list[int]) -> None:
    ends = load_ends(find_model(DEMO_TEXT_MODEL))
    tokenizer = TextTokenizer(ends.directory)
    client = pool.connect()
    turn = 0
    while time.monotonic() < stop_at:
        session = Session(ends, client, uniform_settings("int8"))
        ids = tokenizer.encode(PROMPTS[turn % len(PROMPTS)])
        for _ in session.generate(ids, 60, SamplingSettings(temperature=1.0, seed=turn)):
            time.sleep(pause_s)
            done[0] += 1
        turn += 1
    client.close()


def make_pictures(pool: LocalPool, pause_s: float, stop_at: float, done: list[int]) -> None:
    maker = ImageMaker(find_model(DEMO_IMAGE_MODEL), pool.connect())
    while time.monotonic() < stop_at:
        sync = "cloud" if done[1] % 2 else "edge"
        maker.make(
            ImageSettings("a tree on a green hill", steps=10, seed=done[1], sync=sync),
            on_step=lambda progress: time.sleep(pause_s * 4),
        )
        done[1] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--pause-ms", type=float, default=40, help="Between two tokens.")
    arguments = parser.parse_args()
    set_up_torch(threads=1)
    pause_s = arguments.pause_ms / 1000
    image_model = str(find_model(DEMO_IMAGE_MODEL))
    settings = PoolSettings(workers=2, model=DEMO_TEXT_MODEL, image_model=image_model)
    with LocalPool(settings) as pool:
        assert pool.broker is not None
        assert pool.redis is not None
        pids = {"broker": pool.broker.pid, "redis": pool.redis.child.pid, "edge": os.getpid()}
        pids |= {name: child.pid for name, child in pool.workers.items()}
        stop_at = time.monotonic() + arguments.minutes * 60
        done = [0, 0]
        work = [(write_texts, arguments.sessions), (make_pictures, 1)]
        threads = [
            threading.Thread(target=target, args=(pool, pause_s, stop_at, done))
            for target, count in work
            for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        started_at = time.monotonic()
        samples: dict[str, list[tuple[float, float, int]]] = {name: [] for name in pids}
        while time.monotonic() < stop_at:
            time.sleep(SAMPLE_S)
            for name, pid in pids.items():
                samples[name].append((time.monotonic() - started_at, *read_process(pid)))
        for thread in threads:
            thread.join()
        pool.check()
    print(f"{arguments.minutes:g} minutes, {done[0]:,} tokens, {done[1]:,} pictures, seeds fixed")
    print(f"{'process':10} {'MB at 20%':>10} {'MB at end':>10} {'MB/hour':>9} {'fds':>10}")
    for name, taken in samples.items():
        later = taken[len(taken) // 5 :]  # pools of memory fill up first
        hours = np.array([at for at, _, _ in later]) / 3600
        slope = np.polyfit(hours, [memory for _, memory, _ in later], 1)[0]
        print(
            f"{name:10} {later[0][1]:10.1f} {later[-1][1]:10.1f} {slope:9.2f} "
            f"{later[0][2]:4} -> {later[-1][2]}"
        )


if __name__ == "__main__":
    main()
