"""Fixtures: the demo model cut and whole, and a real Redis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, logging

from common.demo_model import find_model
from deploy.embedded_redis import EmbeddedRedis
from edge_agent.ends import ModelEnds, load_ends

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()


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
