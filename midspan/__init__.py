"""midspan from Python: the names below, each imported when it is first used.

`import midspan` therefore does not import torch. midspan's packages have common names, so
before any is imported it is made sure that Python would import ours: another `common`, installed or
lying in the current directory, is named in an ImportError instead of failing somewhere inside.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.errors import MidspanError
    from common.weights.demo_model import find_model
    from deploy.pool import LocalPool, PoolSettings
    from edge_agent.engine.client import BrokerClient
    from edge_agent.engine.engine import Engine
    from edge_agent.engine.streams import Conversation, Token, TokenStream
    from edge_agent.text.drafting.choice import Drafters
    from edge_agent.text.ends import load_ends
    from edge_agent.text.generation import start_generation
    from edge_agent.text.sampling import SamplingSettings
    from edge_agent.text.session import Session
    from edge_agent.text.session_settings import SessionSettings, uniform_settings
    from edge_agent.text.tokenizer import TextTokenizer

__all__ = [
    "BrokerClient",
    "Conversation",
    "Drafters",
    "Engine",
    "LocalPool",
    "MidspanError",
    "PoolSettings",
    "SamplingSettings",
    "Session",
    "SessionSettings",
    "TextTokenizer",
    "Token",
    "TokenStream",
    "find_model",
    "load_ends",
    "start_generation",
    "uniform_settings",
]

HOMES = {
    "BrokerClient": "edge_agent.engine.client",
    "Conversation": "edge_agent.engine.streams",
    "Drafters": "edge_agent.text.drafting.choice",
    "Engine": "edge_agent.engine.engine",
    "LocalPool": "deploy.pool",
    "MidspanError": "common.errors",
    "PoolSettings": "deploy.pool",
    "SamplingSettings": "edge_agent.text.sampling",
    "Session": "edge_agent.text.session",
    "SessionSettings": "edge_agent.text.session_settings",
    "TextTokenizer": "edge_agent.text.tokenizer",
    "Token": "edge_agent.engine.streams",
    "TokenStream": "edge_agent.engine.streams",
    "find_model": "common.weights.demo_model",
    "load_ends": "edge_agent.text.ends",
    "start_generation": "edge_agent.text.generation",
    "uniform_settings": "edge_agent.text.session_settings",
}
PACKAGES = (
    "broker", "chaos", "cloud_worker", "common", "deploy", "edge_agent", "evaluation",
    "loadtest",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("midspan")
    if name not in HOMES:
        raise AttributeError(f"module 'midspan' has no attribute {name!r}")
    check_packages()
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def check_packages() -> None:
    """Raise ImportError if one of our packages is hidden by another of its name."""
    ours = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin != ours / name / "__init__.py":
            raise ImportError(
                f"midspan's package {name!r} is hidden by another at {origin or 'no file'}; rename "
                "or move that, or run midspan from another directory or environment"
            )
