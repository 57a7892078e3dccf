"""`midspan eval codec`: quality against bytes, over the real path and counted at the socket."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console.options import calibration_option, span_option
from common.console.outputs import check_writable
from common.console.plots import require_matplotlib, save_figure
from common.console.tables import format_table
from common.console.waiting import waiting
from common.link import Link
from evaluation.images import image_command
from evaluation.importance.command import importance_command
from evaluation.layers import layers_command
from evaluation.leakage.command import leakage_command
from evaluation.neuron_commands import hardware, speed, tasks
from evaluation.options import (
    codecs_option,
    csv_option,
    documents_option,
    json_option,
    mbit_option,
    plot_option,
    rtt_option,
    text_option,
    tokens_option,
    window_option,
)
from evaluation.progress import counted_work
from evaluation.split.command import split_command

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from edge_agent.text.ends import ModelEnds
    from edge_agent.text.session import Session
    from edge_agent.text.stats import GenerationStats

DEFAULT_CODECS = ("fp16", "int8", "int6", "int5", "int4", "compact", "smallest")
BASELINE = "fp32"
PROMPT_TOKENS = 512
ANSWER_TOKENS = 17  # of which the first comes with the prompt


@dataclass(frozen=True, slots=True)
class Measurement:
    """One codec at one span. Its fields are the columns of table and CSV."""

    codec: str
    span: str
    window_tokens: int
    wire_bits_per_value: float
    perplexity: float
    loss_percent: float


@dataclass(frozen=True, slots=True)
class LinkMeasurement(Measurement):
    """The same, and what a link would take for the bytes of a session, headers included."""

    link_ms_per_token: float  # of an answer
    link_ms_per_prompt: float  # of PROMPT_TOKENS


@click.group("eval")
def evaluate() -> None:
    """Measure quality against cost."""


evaluate.add_command(image_command)
evaluate.add_command(importance_command)
evaluate.add_command(layers_command)
evaluate.add_command(leakage_command)
evaluate.add_command(split_command)
evaluate.add_command(speed)
evaluate.add_command(hardware)
evaluate.add_command(tasks)


@evaluate.command()
@click.argument("model")
@text_option
@codecs_option
@span_option("the middle half; repeat it for several", multiple=True)
@calibration_option
@window_option(None, "  [default: the context]")
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    help="Tokens from one window to the next.  [default: half a window]",
)
@tokens_option(None, "  [default: all]")
@documents_option
@mbit_option
@rtt_option
@csv_option
@plot_option
@json_option
def codec(
    model: str,
    text: Path,
    codecs: tuple[str, ...],
    span_text: tuple[str, ...],
    calibration: Path | None,
    window: int | None,
    stride: int | None,
    tokens: int | None,
    documents: bool,
    mbit: float | None,
    rtt_ms: float,
    csv_path: Path | None,
    plot_path: Path | None,
    as_json: bool,
) -> None:
    """Perplexity of MODEL on a text against bits on the wire, for each codec and span.

    Starts a broker and a worker for every span and sends each window through them, so the bits are
    those that the edge's socket counted, headers included, up and down over all values.
    loss_percent is the rise of perplexity over that with fp32. With --mbit two columns say what
    such a link would take for a token of an answer and for a prompt of 512, by the bytes that a
    session took: round trip + bytes / bandwidth.
    """
    from common.codecs.spec import parse_codec
    from common.console.processes import set_up_torch
    from common.weights.demo_model import find_model
    from edge_agent.text.ends import load_ends
    from edge_agent.text.tokenizer import TextTokenizer
    from evaluation.texts import FEWEST_TOKENS, read_tokens

    names = list(dict.fromkeys([BASELINE, *(codecs or DEFAULT_CODECS)]))
    for name in names:
        for direction in name.split(","):
            parse_codec(direction)
    check_writable(csv_path, plot_path)
    if plot_path is not None:
        require_matplotlib()
    set_up_torch(threads=1)
    directory = find_model(model)
    ids = read_tokens(text, TextTokenizer(directory), documents, tokens, least=FEWEST_TOKENS)
    measured: list[Measurement] = []
    for span in span_text or (None,):
        with waiting(f"loading {directory.resolve().name}", is_shown=not as_json):
            ends = load_ends(directory, span)
        length = min(window or ends.context or 1024, ends.context or 1 << 30, len(ids))
        measured += measure_codecs(
            ends, names, ids, length, stride or max(1, length // 2), calibration, not as_json,
            Link(mbit, rtt_ms) if mbit else None,
        )  # fmt: skip
    rows = [tuple(asdict(m).values()) for m in measured]
    headers = [field.name for field in fields(measured[0])]
    if csv_path is not None:
        with csv_path.open("w", newline="") as file:
            csv.writer(file).writerows([headers, *rows])
    if plot_path is not None:
        plot_rate_distortion(measured, plot_path)
    click.echo(
        json.dumps([asdict(m) for m in measured]) if as_json else format_table(headers, rows)
    )


def measure_codecs(
    ends: ModelEnds,
    names: list[str],
    token_ids: list[int],
    window: int,
    stride: int,
    calibration_directory: Path | None,
    is_shown: bool = True,
    link: Link | None = None,
) -> list[Measurement]:
    """All codecs at one span; the first one is the baseline of the loss.

    `is_shown`: how far it is. With a `link`, LinkMeasurements.
    """
    from deploy.pool import LocalPool, PoolSettings
    from edge_agent.commands.codec_options import CodecChoice
    from edge_agent.engine.client import BrokerClient
    from edge_agent.text.perplexity import PerplexityMeter, sliding_windows
    from edge_agent.text.session import Session

    choices = [CodecChoice(name, calibration=calibration_directory) for name in names]
    calibration = choices[0].find_calibration(ends)
    windows = list(sliding_windows(len(token_ids), window, stride))
    settings = [choice.read_settings() for choice in choices]
    client = BrokerClient(["tcp://127.0.0.1:1"])
    for setting in settings:
        Session(ends, client, setting, calibration)  # refuses what is missing before we start
    client.close()
    options = ["--calibration", str(calibration_directory)] if calibration_directory else []
    pool_settings = PoolSettings(
        workers=1, model=str(ends.directory), span=str(ends.cut.middle), worker_options=options
    )
    measured: list[Measurement] = []
    work = list(zip(names, settings, strict=True))
    with (
        LocalPool(pool_settings) as pool,
        counted_work(
            len(work) * len(windows), f"span {ends.cut.middle}", is_shown=is_shown,
        ) as bar,
    ):  # fmt: skip
        for name, setting in work:
            client = pool.connect()
            meter = PerplexityMeter()
            values = 0
            for part in windows:
                ids = token_ids[part.begin : part.end]
                meter.add(Session(ends, client, setting, calibration).score(ids), ids, part.scored)
                values += 2 * len(ids) * ends.hidden
                bar.update(1)
            bits = (client.bytes_up + client.bytes_down) * 8 / values
            base = measured[0].perplexity if measured else meter.perplexity
            loss = (meter.perplexity / base - 1) * 100 + 0.0
            found = Measurement(
                name, str(ends.cut.middle), window, round(bits, 3), round(meter.perplexity, 5),
                round(loss, 3),
            )  # fmt: skip
            if link is not None:
                session = Session(ends, client, setting, calibration)
                stats = write_answer(session, ends, token_ids)
                found = LinkMeasurement(**asdict(found), **time_link(link, stats))
            measured.append(found)
            client.close()
    return measured


def write_answer(session: Session, ends: ModelEnds, token_ids: Sequence[int]) -> GenerationStats:
    """What a prompt of PROMPT_TOKENS, or all there are, and a short greedy answer to it cost."""
    from edge_agent.text.sampling import BAN, SamplingSettings

    room = (ends.context or 1 << 30) - ANSWER_TOKENS
    goes_on = SamplingSettings(logit_bias=dict.fromkeys(ends.eos_ids, BAN))
    for _ in session.generate(token_ids[: min(PROMPT_TOKENS, room)], ANSWER_TOKENS, goes_on):
        pass
    return session.stats


def time_link(link: Link, stats: GenerationStats) -> dict[str, Any]:
    """The columns that LinkMeasurement adds, by what an answer has cost."""
    prompt_bytes = stats.prompt_bytes_up + stats.prompt_bytes_down
    answer_bytes = stats.bytes_up + stats.bytes_down - prompt_bytes
    token_ms = link.take_ms(answer_bytes / max(1, stats.new_tokens - 1))
    prompt_ms = link.take_ms(prompt_bytes / stats.prompt_tokens * PROMPT_TOKENS)
    return {
        "link_ms_per_token": round(token_ms, 3),
        "link_ms_per_prompt": round(prompt_ms, 3),
    }


def find_frontier(points: Sequence[Measurement]) -> list[Measurement]:
    """Those that no other beats in bits without losing more, by rising bits."""
    best: list[Measurement] = []
    for point in sorted(points, key=lambda m: (m.wire_bits_per_value, m.loss_percent)):
        if not best or point.loss_percent < best[-1].loss_percent:
            best.append(point)
    return best


def plot_rate_distortion(measured: list[Measurement], path: Path) -> None:
    """Write `draw_rate_distortion` as a PNG."""
    require_matplotlib()
    save_figure(draw_rate_distortion(measured), path)


def draw_rate_distortion(measured: list[Measurement]) -> Figure:
    """Loss against bits: numbered points, the names beside them, each span's Pareto frontier."""
    from matplotlib import pyplot as plt

    names = [name for name in dict.fromkeys(m.codec for m in measured) if name != BASELINE]
    figure, axes = plt.subplots(figsize=(11, 6))
    for span in dict.fromkeys(m.span for m in measured):
        _draw_span(
            axes, span, [m for m in measured if m.span == span and m.codec != BASELINE], names
        )
    axes.axhline(0, color="gray", linewidth=0.5)
    axes.set_yscale("symlog", linthresh=0.1)
    lowest = min(m.loss_percent for m in measured)
    highest = max(m.loss_percent for m in measured)
    axes.set_ylim(min(1.5 * lowest, -0.02), max(4 * highest, 0.1))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("bits on the wire per value, headers and scales included")
    axes.set_ylabel("rise of perplexity over fp32, %")
    axes.legend()
    legend = "\n".join(f"{number:2}  {name}" for number, name in enumerate(names, start=1))
    axes.text(1.02, 1, legend, transform=axes.transAxes, va="top", fontsize=8, family="monospace")
    return figure


def _draw_span(axes: Any, span: str, points: list[Measurement], names: list[str]) -> None:
    """One span's points, the numbers of those that lie together in one label, and its frontier."""
    frontier = find_frontier(points)
    (line,) = axes.plot(
        [m.wire_bits_per_value for m in frontier], [m.loss_percent for m in frontier],
        "-", linewidth=1, alpha=0.6, label=f"span {span}: no other is smaller and loses less",
    )  # fmt: skip
    axes.plot(
        [m.wire_bits_per_value for m in points], [m.loss_percent for m in points],
        "o", markersize=4, color=line.get_color(),
    )  # fmt: skip
    axes.set_yscale("symlog", linthresh=0.1)
    for numbers, bits, loss in gather_labels(points, names):
        axes.annotate(numbers, (bits, loss), fontsize=7, xytext=(4, 4), textcoords="offset points")


def gather_labels(
    points: Sequence[Measurement], names: list[str]
) -> list[tuple[str, float, float]]:
    """Labels and where they go: points that would lie on each other's label share one."""
    groups: list[list[Measurement]] = []
    for point in sorted(points, key=lambda m: (m.wire_bits_per_value, m.loss_percent)):
        for group in groups:
            if _are_close(group[0], point):
                group.append(point)
                break
        else:
            groups.append([point])
    return [
        (
            ", ".join(str(number) for number in sorted(names.index(m.codec) + 1 for m in group)),
            max(m.wire_bits_per_value for m in group),
            max(m.loss_percent for m in group),
        )
        for group in groups
    ]


def _are_close(a: Measurement, b: Measurement) -> bool:
    """Within the size of a label, on an axis that is linear up to 0.1% and logarithmic beyond."""

    def height(loss: float) -> float:
        return math.copysign(min(abs(loss), 0.1) * 10 + math.log10(max(abs(loss), 0.1) * 10), loss)

    near = abs(a.wire_bits_per_value - b.wire_bits_per_value) < 0.3
    return near and abs(height(a.loss_percent) - height(b.loss_percent)) < 0.2
