"""Fixtures: the demo model cut and whole, a real Redis, and commands that need not import torch."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forks import ForkingSubprocess, start_server
from redis_cluster import RedisCluster
from transformers import AutoModelForCausalLM, logging

from common.weights.demo_model import find_model
from deploy import child
from deploy.embedded_redis import EmbeddedRedis
from deploy.pool import LocalPool
from edge_agent.engine.client import BrokerClient
from edge_agent.text.ends import ModelEnds, load_ends

os.environ["MIDSPAN_CONFIG"] = os.devnull  # whoever runs the tests may have one
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:  # in the background, say: commands would inherit
        signal.signal(number, lambda *_: None)
torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def forking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkingSubprocess]:
    """Midspan's commands are forks of one process; see tests/forks.py."""
    server, path = start_server(tmp_path_factory.mktemp("forks"))
    whole = child.subprocess
    forking = child.subprocess = ForkingSubprocess(path)  # type: ignore[assignment]
    yield forking
    child.subprocess = whole
    server.communicate(timeout=10)


@pytest.fixture
def unforked(forking: ForkingSubprocess) -> Iterator[None]:
    """Midspan's commands are started from nothing, as `python -m midspan`."""
    forking.enabled = False
    yield
    forking.enabled = True


@pytest.fixture
def client(pool: LocalPool) -> Iterator[BrokerClient]:
    """A connection of a test's own to the `pool` of its file."""
    connected = pool.connect()
    yield connected
    connected.close()


@pytest.fixture(scope="session")
def demo_directory() -> Path:
    return find_model(None)


@pytest.fixture(scope="session")
def demo_ends(demo_directory: Path) -> ModelEnds:
    return load_ends(demo_directory)


@pytest.fixture(scope="session")
def whole_model(demo_directory: Path) -> torch.nn.Module:
    """The unsplit demo model, as transformers loads it: the reference."""
    return AutoModelForCausalLM.from_pretrained(demo_directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    cluster = RedisCluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A command that ran in this process may have set torch to more: last bits would move."""
    yield
    torch.set_num_threads(1)
