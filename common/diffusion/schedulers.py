"""Schedulers by name, and how far one has come: what a worker needs to go on in the middle.

All are diffusers' own, and the edge may have any of them. A worker that keeps the latents has those
that draw no noise after the first and whose memory we know; it makes its own from the same
configuration, whose digest both compare.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.diffusion.shapes import read_index
from common.errors import CheckpointError, ProtocolError, SettingsError
from common.weights.model_files import read_json

if TYPE_CHECKING:
    from torch import Tensor

OWN = "own"  # the one that the checkpoint's configuration names
KARRAS = "-karras"  # after a name: sigmas as Karras et al. (2022) space them
# name -> diffusers' class, and what is set besides the checkpoint's own configuration
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
SPACED = (
    "euler", "heun", "lms", "dpm2", "dpm2-a", "dpm++2s", "dpm++2m", "dpm++2m-sde", "deis", "unipc",
)  # fmt: skip
NAMES = (OWN, *SCHEDULERS, *(f"{name}{KARRAS}" for name in SPACED))
# classes that checkpoints name and that have no name here, for they go with no other checkpoint
MORE_OWN = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}
RESUMABLE = {"EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"}
CONFIG_FILE = Path("scheduler") / "scheduler_config.json"
CLASS = "_class_name"


def read_scheduler_config(directory: Path) -> dict[str, Any]:
    """The scheduler's configuration of a pipeline's directory. Raises CheckpointError.

    Its class is the one that the pipeline's index names, as for diffusers.
    """
    config = read_json(directory / CONFIG_FILE)
    named = read_index(directory).get("scheduler")
    if isinstance(named, list) and len(named) == 2:
        config[CLASS] = named[1]
    return {key: value for key, value in config.items() if key == CLASS or key[:1] != "_"}


def find_class(config: dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """diffusers' class, and what is set besides. Raises SettingsError or CheckpointError."""
    if name not in NAMES:
        raise SettingsError(f"scheduler {name!r} is unknown; known are {', '.join(NAMES)}")
    if name != OWN:
        class_name, others = SCHEDULERS[name.removesuffix(KARRAS)]
        return class_name, others | ({"use_karras_sigmas": True} if name.endswith(KARRAS) else {})
    class_name = str(config.get(CLASS))
    if class_name not in MORE_OWN and class_name not in {known for known, _ in SCHEDULERS.values()}:
        raise CheckpointError(
            f"the checkpoint's own scheduler is {class_name}, which makes no pictures here; take "
            f"another one: --scheduler {', '.join(SCHEDULERS)}"
        )
    return class_name, {}


def make_scheduler(config: dict[str, Any], name: str, steps: int) -> Any:
    """A diffusers scheduler, set to `steps` steps.

    Raises SettingsError for an unknown name, or a number of steps that it cannot make, and
    CheckpointError.
    """
    import diffusers

    class_name, others = find_class(config, name)
    own = {key: value for key, value in config.items() if key != CLASS}
    try:
        scheduler = getattr(diffusers, class_name).from_config({**own, **others})
        scheduler.set_timesteps(steps)
    except ImportError as error:
        raise SettingsError(f"scheduler {name} needs a package: {error}") from error
    except (ValueError, NotImplementedError) as error:
        raise SettingsError(f"scheduler {name} cannot make {steps} steps: {error}") from error
    return scheduler


def check_resumable(config: dict[str, Any], name: str) -> None:
    """Raises SettingsError unless a worker can go on with this scheduler from any step."""
    class_name, others = find_class(config, name)
    draws = str({**config, **others}.get("algorithm_type", "")).startswith("sde")
    if class_name not in RESUMABLE or draws:
        names = [name for name, (known, _) in SCHEDULERS.items() if known in RESUMABLE]
        names.remove("dpm++2m-sde")
        raise SettingsError(
            f"scheduler {name} ({class_name}) is the edge's alone; with sync cloud, where workers "
            f"keep the latents, take {', '.join(names)}, or leave them to the edge: sync edge"
        )


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
        if len(history) > min(position, order):  # fewer are those of a session that began later
            raise ProtocolError(
                f"the scheduler remembers {len(history)} outputs; step {position} needs at most "
                f"{min(position, order)}"
            )
        scheduler.model_outputs = [None] * (order - len(history)) + list(history)
        scheduler.lower_order_nums = len(history)
