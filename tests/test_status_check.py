"""`midspan status --check`: it works for what is served, and says when the store does not."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from forks import run_midspan

from deploy.checks import ServiceCheck, find_failure
from deploy.child import Child, midspan_command
from deploy.embedded_redis import EmbeddedRedis
from deploy.pool import LocalPool, PoolSettings


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    settings = PoolSettings(workers=1, model="stories-llama", image_model="landscapes-sdxl")
    with LocalPool(settings) as running:
        running.wait_for_workers(1)
        yield running


def run_check(pool: LocalPool, *options: str) -> subprocess.CompletedProcess[str]:
    return run_midspan("status", "--check", "--broker", pool.edge_endpoint, *options)


def report_of(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout)


def test_a_check_sends_steps_for_text_and_for_both_parts_of_the_image_model(
    pool: LocalPool,
) -> None:
    before = report_of(run_check(pool, "--json"))["workers"][0]["stats"]
    done = run_check(pool, "--json")
    assert done.returncode == 0, done.stderr
    checks = report_of(done)["checks"]
    assert {c["service"]: (c["worker_id"], c["stored"], c["failure"]) for c in checks} == {
        "stories-llama 2-6": ("w1", True, ""),
        "landscapes-sdxl unet": ("w1", None, ""),
        "landscapes-sdxl inner": ("w1", None, ""),
    }
    after = report_of(done)["workers"][0]["stats"]
    assert after["image_steps"] > before.get("image_steps", 0)


def test_an_image_model_that_is_none_is_named(pool: LocalPool, tmp_path: Path) -> None:
    line = run_check(pool, "--image-model", str(tmp_path)).stderr
    assert line.startswith(f"Error: {tmp_path} has no model_index.json")


def test_a_paused_redis_fails_the_check_and_is_told_in_the_table(pool: LocalPool) -> None:
    assert pool.redis is not None
    pool.redis.child.signal(signal.SIGSTOP)
    try:
        done = run_check(pool)
    finally:
        pool.redis.child.signal(signal.SIGCONT)
    assert done.returncode == 1
    assert "Error: the check failed: stories-llama 2-6: its KV was not stored" in done.stderr
    assert "The store of w1 is down" in done.stdout


def test_a_store_that_evicts_and_one_of_its_own_are_told(
    pool: LocalPool, redis_server: EmbeddedRedis, tmp_path: Path
) -> None:
    client = redis.Redis.from_url(redis_server.url)
    client.config_set("maxmemory-policy", "allkeys-lru")
    command = midspan_command(
        "worker", "--broker", pool.worker_endpoint, "--redis-url", redis_server.url,
        "--id", "apart", "--model", "stories-llama", "--threads", "1",
    )  # fmt: skip
    apart = Child("apart", command, tmp_path)
    try:
        apart.wait_for("worker apart ready")
        status = midspan_command("status", "--broker", pool.edge_endpoint)
        done = subprocess.run(status, capture_output=True, text=True, timeout=60, check=True)
    finally:
        apart.stop()
        client.config_set("maxmemory-policy", "noeviction")
    words = "The store of apart drops keys when it is full (maxmemory-policy allkeys-lru)"
    assert words in done.stdout
    words = "The workers of stories-llama 2-6 keep KV in 2 different stores (w1 and apart)"
    assert words in done.stdout


def test_services_that_could_not_be_checked_are_no_failure_unless_nothing_could() -> None:
    report = {"workers": [{"worker_id": "w1", "stats": {"store_up": True}}]}
    skipped = ServiceCheck("sdxl unet", skipped="not checked: its model is not here")
    works = ServiceCheck("llama 2-6", "w1", stored=True)
    assert find_failure(report, [works, skipped]) == ""
    assert find_failure(report, [skipped]) == "not checked: its model is not here"
    assert find_failure(report, []) == "no worker is ready"


def test_a_killed_redis_fails_the_check_of_a_pool_for_images_alone() -> None:
    with LocalPool(PoolSettings(workers=1, image_model="landscapes-sdxl")) as images:
        images.wait_for_workers(1)
        assert images.redis is not None
        images.redis.child.kill()
        done = run_check(images)
    assert done.returncode == 1
    assert "Error: the check failed: the store of w1 is down" in done.stderr
