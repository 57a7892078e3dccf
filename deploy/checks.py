"""What `midspan status --check` does: real steps for everything that a pool says it serves.

A text step is followed by others until a worker says that what came before is stored. An image step
needs the widths of its model, which no worker announces: they are read from a directory of that
name, one that comes with midspan or that --image-model names. A store's silence is found out by
using it, so the workers' own word is asked for again after the steps.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import CheckpointError, MidspanError, ProtocolError
from common.protocol.messages import BOUNDARY, ImageOpening, Opening, Part, Step, StepReply

if TYPE_CHECKING:
    from torch import Tensor

    from common.codecs.codec import Codec
    from common.diffusion.shapes import ConditioningSizes
    from edge_agent.engine.client import BrokerClient

CHECK_STEPS = 5
CHECK_CODEC = "int8"
STORE_LIMIT_S = 3.0  # in which a row must be stored; a worker gives a silent store up after 0.5 s
STEP_DEADLINE_MS = 10_000
CHECK_TOKENS = 2  # of an image's prompt
CHECK_SIDE = 8  # of its latents


@dataclass(slots=True)
class ServiceCheck:
    """What became of the steps that were sent for one service."""

    service: str
    worker_id: str = ""
    first_ms: float = 0.0
    later_ms: float = 0.0
    stored: bool | None = False  # None: the worker does not say
    failure: str = ""
    skipped: str = ""  # why nothing was sent


def check_services(
    client: BrokerClient, report: dict[str, Any], image_model: Path | None
) -> list[ServiceCheck]:
    """Send a few tiny steps for every service that a ready worker offers."""
    offered = {
        (service["model"], service["part"]): service
        for worker in report["workers"]
        if worker["state"] == "ready"
        for service in worker["services"]
    }
    checks = [
        check_text(client, service)
        if service["hidden"]
        else check_image(client, service, image_model)
        for service in offered.values()
    ]
    proven = {check.worker_id for check in checks if check.stored}
    if {check.worker_id for check in checks} - proven - {""}:
        wait_for_stores(client)
    return checks


def wait_for_stores(client: BrokerClient) -> None:
    """Give workers the time to notice that what they have sent to their store is not answered."""
    give_up_at = time.monotonic() + STORE_LIMIT_S / 2
    while not find_stores_down(client.status()) and time.monotonic() < give_up_at:
        time.sleep(0.05)


def find_stores_down(report: Mapping[str, Any]) -> list[str]:
    """Workers that say that their store does not answer."""
    return [w["worker_id"] for w in report["workers"] if not w["stats"].get("store_up")]


def find_store_faults(report: Mapping[str, Any]) -> list[str]:
    """What makes takeovers slow though nothing is lost: a sentence each."""
    faults = []
    down = find_stores_down(report)
    if down:
        faults.append(
            f"The store of {', '.join(down)} is down: KV is not kept beyond a worker's life."
        )
    dropping: dict[str, list[str]] = {}
    stores: dict[str, dict[str, list[str]]] = {}  # part of a model -> store -> workers
    for worker in report["workers"]:
        name, stats = worker["worker_id"], worker["stats"]
        if stats.get("store_policy") not in (None, "", "noeviction"):
            dropping.setdefault(stats["store_policy"], []).append(name)
        for service in worker["services"] if stats.get("store_id") else ():
            part = f"{service['name']} {service['part']}"
            stores.setdefault(part, {}).setdefault(stats["store_id"], []).append(name)
    for policy, names in dropping.items():
        faults.append(
            f"The store of {', '.join(names)} drops keys when it is full (maxmemory-policy "
            f"{policy}): what is missing is computed again; noeviction is better."
        )
    split = {part: groups for part, groups in stores.items() if len(groups) > 1}
    for part, groups in split.items():
        listed = " and ".join(", ".join(names) for names in groups.values())
        faults.append(
            f"The workers of {part} keep KV in {len(groups)} different stores ({listed}): a "
            "session that moves between them is computed again; give all the same --redis-url."
        )
    return faults


def find_failure(report: Mapping[str, Any], checks: list[ServiceCheck]) -> str:
    """Why a pool is not well, or nothing."""
    failed = [check for check in checks if check.failure]
    if failed:
        return f"{failed[0].service}: {failed[0].failure}"
    down = find_stores_down(report)
    if down:
        return (
            f"the store of {', '.join(down)} is down: whoever takes a session over must have it "
            "computed again; is Redis running?"
        )
    if all(check.skipped for check in checks):
        return checks[0].skipped if checks else "no worker is ready"
    return ""


def check_text(client: BrokerClient, service: dict[str, Any]) -> ServiceCheck:
    """Steps of one row each, until one is stored."""
    from common.codecs.codec import make_codec

    check = ServiceCheck(f"{service['name']} {service['part']}")
    opening = Opening(service["model"], [service["part"]], service["hidden"], [CHECK_CODEC], "")
    session_id = secrets.token_bytes(16)
    codecs = make_codec(CHECK_CODEC, "up"), make_codec(CHECK_CODEC, "down")
    give_up_at = time.monotonic() + STORE_LIMIT_S
    try:
        for index in _pace(give_up_at):
            answer = _ask_text(client, session_id, index, opening, codecs, check)
            check.stored = answer.committed > 0
            if index + 1 >= CHECK_STEPS and answer.committed:
                return check
        check.failure = f"its KV was not stored within {STORE_LIMIT_S:g} s; is Redis running?"
    except MidspanError as error:
        check.failure = str(error)
    finally:
        client.end_session(session_id)
    return check


def _pace(give_up_at: float) -> Iterator[int]:
    """Numbers of steps: the first ones at once, then slowly until the time is over."""
    index = 0
    while index < CHECK_STEPS or time.monotonic() < give_up_at:
        if index >= CHECK_STEPS:
            time.sleep(0.05)
        yield index
        index += 1


def _ask_text(
    client: BrokerClient,
    session_id: bytes,
    index: int,
    opening: Opening,
    codecs: tuple[Codec, Codec],
    check: ServiceCheck,
) -> StepReply:
    import torch

    up, down = codecs
    body = up.encode(torch.randn(1, opening.hidden))
    parts = [Part(0, [1], len(body))]
    step = Step(session_id, 0, 0, index, index, parts, 1, 0, STEP_DEADLINE_MS)
    answer, rows = _ask(client, step, body, opening, check, is_first=index == 0)
    down.decode(rows, 1, opening.hidden)
    return answer


def _ask(
    client: BrokerClient,
    step: Step,
    body: bytes,
    opening: Opening | ImageOpening,
    check: ServiceCheck,
    is_first: bool,
) -> tuple[StepReply, bytes]:
    """One answer, and in `check` who gave it and how long that took."""
    asked_at = time.monotonic()
    answer, reply = client.ask(step, body, opening, is_known=not is_first, wait_for_worker=False)
    check.later_ms = round((time.monotonic() - asked_at) * 1e3, 2)
    if is_first:
        check.first_ms = check.later_ms
    if not isinstance(answer, StepReply):
        raise ProtocolError(f"worker {answer.worker_id} lost the session's state")
    check.worker_id = answer.worker_id
    return answer, reply


def check_image(
    client: BrokerClient, service: dict[str, Any], image_model: Path | None
) -> ServiceCheck:
    """Two steps of a tiny image: one brings the prompt's embeddings, one finds them there."""
    from common.diffusion.shapes import INNER

    check = ServiceCheck(f"{service['name']} {service['part']}", stored=None)
    found = find_config(service, image_model)
    if found is None:
        check.skipped = "not checked: its model is not here; name it with --image-model"
        return check
    config, sizes, are_its_weights = found
    opening = ImageOpening(
        model=service["model"], route=[service["part"]], codecs=["fp32", CHECK_CODEC], images=1,
        guidance=1.0, timesteps=[1.0, 0.0], keeps_latents=False, scheduler="",
        latents_dtype="float32",
    )  # fmt: skip
    session_id = secrets.token_bytes(16)
    try:
        for index in range(2):
            tensors = make_image_tensors(config, sizes, service["part"] == INNER)
            if index:
                tensors = {BOUNDARY: tensors[BOUNDARY]}
            _ask_image(client, session_id, index, opening, config, tensors, check)
    except MidspanError as error:
        check.failure = str(error)
        if not are_its_weights:
            check.failure += " (widths are those of a model of its name here, with other weights)"
    finally:
        client.end_session(session_id)
    return check


def find_config(
    service: dict[str, Any], image_model: Path | None
) -> tuple[dict[str, Any], ConditioningSizes, bool] | None:
    """The UNet's config and sizes, and whether its weights are the service's.

    None if no directory that we know has a model of this name or these weights. A LoRA changes
    weights and no widths, and so does --image-weights: of such a service the name is the same.
    """
    from common.diffusion.shapes import find_sizes, read_index
    from common.diffusion.unet import open_unet
    from common.weights.demo_model import find_model

    try:
        checkpoint = open_unet(image_model or find_model(service["name"]))
    except CheckpointError:
        if image_model is not None:
            raise
        return None
    config: dict[str, Any] = checkpoint.config_json
    name, same = checkpoint.name, checkpoint.fingerprint() == service["model"]
    sizes = find_sizes(config, read_index(checkpoint.directory.parent))
    checkpoint.close()
    return (config, sizes, same) if same or name == service["name"] else None


def make_image_tensors(
    config: dict[str, Any], sizes: ConditioningSizes, is_inner: bool
) -> dict[str, Tensor]:
    """What a step of one tiny image without guidance brings along."""
    import torch

    from common.diffusion.shapes import boundary_channels

    channels = boundary_channels(config)[0] if is_inner else config["in_channels"]
    size = 8.0 * CHECK_SIDE
    return {
        BOUNDARY: torch.randn(1, channels, CHECK_SIDE, CHECK_SIDE),
        "prompt_embeds": torch.randn(1, CHECK_TOKENS, sizes.prompt),
        "text_embeds": torch.randn(1, sizes.pooled),
        "time_ids": torch.tensor([[size, size, 0.0, 0.0, size, size][: sizes.time_ids]]),
    }


def _ask_image(
    client: BrokerClient,
    session_id: bytes,
    index: int,
    opening: ImageOpening,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    check: ServiceCheck,
) -> None:
    from common.diffusion.shapes import INNER, boundary_channels
    from common.diffusion.tensors import decode_tensor, pack_tensors

    parts, body = pack_tensors(tensors, {BOUNDARY: CHECK_CODEC}, opening.codecs)
    reply_codec = opening.codecs.index(CHECK_CODEC)
    step = Step(session_id, 0, 0, index, index, parts, 0, reply_codec, STEP_DEADLINE_MS)
    _, reply = _ask(client, step, body, opening, check, is_first=index == 0)
    channels = config["out_channels"]
    if opening.route == [INNER]:
        channels = boundary_channels(config)[1]
    decode_tensor(reply, (1, channels, CHECK_SIDE, CHECK_SIDE), CHECK_CODEC)
