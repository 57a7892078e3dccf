"""Schedulers by name, and how far one has come: what a worker needs to go on in the middle.

All are diffusers' own and deterministic: they draw no noise after the first. Worker and edge make
theirs from the same configuration, whose digest they compare.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import ProtocolError, SettingsError
from common.weights.model_files import read_json

# name -> diffusers' class, and what is set besides the checkpoint's own configuration
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
}
CONFIG_FILE = Path("scheduler") / "scheduler_config.json"


def read_scheduler_config(directory: Path) -> dict[str, Any]:
    """The scheduler's configuration of a pipeline's directory. Raises CheckpointError."""
    config = read_json(directory / CONFIG_FILE)
    return {key: value for key, value in config.items() if not key.startswith("_")}


def make_scheduler(config: dict[str, Any], name: str, steps: int) -> Any:
    """A diffusers scheduler, set to `steps` timesteps. Raises SettingsError for an unknown name."""
    import diffusers

    if name not in SCHEDULERS:
        raise SettingsError(f"scheduler {name!r} is unknown; known are {', '.join(SCHEDULERS)}")
    class_name, others = SCHEDULERS[name]
    scheduler = getattr(diffusers, class_name).from_config({**config, **others})
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise SettingsError(f"scheduler {name} cannot make {steps} steps: {error}") from error
    return scheduler


def describe_scheduler(config: dict[str, Any], name: str) -> str:
    """A name that is the same only where schedulers are: `euler 0123456789ab`."""
    text = json.dumps(config, sort_keys=True)
    return f"{name} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def read_history(scheduler: Any) -> list[Tensor]:
    """What a multistep scheduler remembers of the steps before, oldest first; often nothing."""
    return [output for output in getattr(scheduler, "model_outputs", []) if output is not None]


def go_to(scheduler: Any, position: int, history: list[Tensor]) -> None:
    """Make a new scheduler stand where another one stood before step `position`.

    Raises ProtocolError if the history is not one of that step.
    """
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(position)
    if hasattr(scheduler, "model_outputs"):
        order = scheduler.config.solver_order
        if len(history) != min(position, order):
            raise ProtocolError(
                f"the scheduler remembers {len(history)} outputs; step {position} needs "
                f"{min(position, order)}"
            )
        scheduler.model_outputs = [None] * (order - len(history)) + list(history)
        scheduler.lower_order_nums = min(position, order)
