"""`midspan plan`: which spans of which models fit on which devices, and the workers for it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console.option_types import COUNT
from common.console.options import dtype_option, span_option
from common.console.processes import set_up_torch
from common.console.tables import format_bytes, format_table
from common.errors import CheckpointError, SettingsError
from evaluation.options import json_option
from evaluation.placement import Layers, Placement, place

if TYPE_CHECKING:
    from common.spans.cut import Span
    from common.weights.needs import ModelNeeds

MIB = 1 << 20
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": MIB, "GIB": 1 << 30, "TIB": 1 << 40}
# what a worker of text takes without weights and KV, on a CPU: 318 MB resident after its first step
# (benchmarks/cold_start.py), and what large batches and the check of a new model's twin leave
WORKER_BYTES = 350 * 10**6


@dataclass(frozen=True, slots=True)
class Planned:
    """A model, its middle, and what its layers need."""

    directory: Path
    name: str
    needs: ModelNeeds
    middle: Span


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--devices",
    required=True,
    metavar="SIZES",
    help='Memory of each device that workers may use, as "24GB,24GB".',
)
@click.option(
    "--kv-tokens",
    type=COUNT,
    default=16_384,
    show_default=True,
    help="Tokens of all sessions of a model together whose KV is kept warm.",
)
@span_option("the middle half")
@dtype_option
@json_option
def plan(
    models: tuple[str, ...],
    devices: str,
    kv_tokens: int,
    span_text: str | None,
    dtype: str,
    as_json: bool,
) -> None:
    """Propose which spans of MODELS fit on which devices, and print the workers' commands.

    Reads configurations and the headers of files. Counts weights, warm KV, and 350 MB for each
    worker, which is what one takes on a CPU; on a GPU the driver takes its own, and a batch takes
    some: give less than the device has.
    """
    sizes = read_sizes(devices)
    set_up_torch(1)
    planned = [read_model(name, span_text, dtype) for name in models]
    names = [each.name for each in planned]
    if len(set(names)) < len(names):
        raise SettingsError(f"{' and '.join(names)}: expected models of different names")
    placed = place([layers_of(each, kv_tokens) for each in planned], sizes, WORKER_BYTES)
    facts = describe_plan(placed, {each.name: each for each in planned}, sizes, kv_tokens, dtype)
    click.echo(json.dumps(facts, indent=2) if as_json else format_plan(facts))


def read_sizes(text: str) -> list[int]:
    """Bytes of each device. Raises SettingsError."""
    sizes = []
    for each in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,3})?)\s*([KMGT]i?B)\s*", each, re.IGNORECASE)
        if match is None:
            raise SettingsError(
                f"--devices {each.strip()!r} is no size; expected sizes such as 24GB, 512MiB"
            )
        sizes.append(round(float(match[1]) * UNITS[match[2].upper()]))
    return sizes


def read_model(name: str, span_text: str | None, dtype: str) -> Planned:
    """What there is to place of a model. Raises CheckpointError, SettingsError."""
    from common.spans.cut import parse_cut
    from common.spans.twin_check import check_twin
    from common.weights.checkpoint import Checkpoint
    from common.weights.configuration import read_config
    from common.weights.demo_model import find_model
    from common.weights.loading import parse_dtype
    from common.weights.needs import measure_needs

    directory = find_model(name)
    checkpoint = Checkpoint(directory)
    config = read_config(checkpoint)
    cut = parse_cut(span_text, config.num_hidden_layers)
    check_twin(config)
    needs = measure_needs(checkpoint, parse_dtype(dtype))
    return Planned(directory, checkpoint.name, needs, cut.middle)


def layers_of(model: Planned, kv_tokens: int) -> Layers:
    """What each layer of the middle takes, with KV. Raises CheckpointError if that is unknown."""
    each = []
    for index in range(model.middle.first, model.middle.last):
        kept = model.needs.kv_bytes[index]
        if kept is None:
            raise CheckpointError(f"{model.name} does not say what its layer {index} keeps")
        each.append(model.needs.weight_bytes[index] + kept * kv_tokens)
    each[-1] += model.needs.behind * model.middle.with_end
    return Layers(model.name, model.middle.first, each)


def describe_plan(
    placed: list[Placement],
    models: dict[str, Planned],
    sizes: list[int],
    kv_tokens: int,
    dtype: str,
) -> dict[str, Any]:
    """The workers, and what is left on each device."""
    workers = []
    for part in placed:
        model = models[part.model]
        is_last = part.span.last == model.middle.last
        span = replace(part.span, with_end=is_last and model.middle.with_end)
        needs = model.needs.of(span)
        kv_bytes = (needs.kv_bytes or 0) * kv_tokens
        command = ["midspan", "worker", "--model", str(model.directory), "--span", str(span),
                   "--dtype", dtype, "--cache-mb", str(max(1, -(-kv_bytes // MIB)))]  # fmt: skip
        workers.append(
            {
                "device": part.device,
                "model": part.model,
                "span": str(span),
                "weight_bytes": needs.weight_bytes,
                "kv_bytes": kv_bytes,
                "bytes": part.layer_bytes + WORKER_BYTES,
                "command": shlex.join(command),
            }
        )
    used = [0] * len(sizes)
    for part in placed:
        used[part.device] += part.layer_bytes + WORKER_BYTES
    return {
        "kv_tokens": kv_tokens,
        "devices": [
            {"bytes": size, "free_bytes": size - taken}
            for size, taken in zip(sizes, used, strict=True)
        ],
        "workers": workers,
    }


def format_plan(facts: dict[str, Any]) -> str:
    """For people: a table, what is left, and commands to be copied."""
    table = format_table(
        ["device", "model", "span", "weights", "KV", "in all"],
        [
            [str(w["device"]), w["model"], w["span"], format_bytes(w["weight_bytes"]),
             format_bytes(w["kv_bytes"]), format_bytes(w["bytes"])]
            for w in facts["workers"]
        ],
    )  # fmt: skip
    free = ", ".join(
        f"{format_bytes(device['free_bytes'])} of device {index}"
        for index, device in enumerate(facts["devices"])
    )
    lines = [table, "", f"Left free: {free}."]
    for index in range(len(facts["devices"])):
        commands = [w["command"] for w in facts["workers"] if w["device"] == index]
        lines += ["", f"# on device {index}", *commands] if commands else []
    return "\n".join(lines)
