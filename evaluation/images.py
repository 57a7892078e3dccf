"""`midspan eval image`: how codecs, cuts and reuse change pictures, and what they save in bytes."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import click

from common.codecs.spec import EXACT
from common.console.option_types import COUNT, SEED
from common.console.outputs import check_writable
from common.console.plots import require_matplotlib, save_figure
from common.console.tables import format_table
from common.console.waiting import waiting
from common.errors import SettingsError
from common.weights.demo_model import DEMO_IMAGE_MODEL
from edge_agent.commands.prompts import check_text
from evaluation.options import codecs_option, csv_option, json_option, plot_option
from evaluation.progress import counted_work

if TYPE_CHECKING:
    from PIL.Image import Image

    from edge_agent.image.maker import ImageMaker, ImageSettings

DEFAULT_PROMPTS = (
    "a red house on a green hill under a blue sky with the sun",
    "a boat with a red sail on the sea under an orange sunset",
    "a mountain behind a snowy field under a blue sky with clouds",
    "two trees on a yellow desert under a night sky with the moon",
)
DEFAULT_CODECS = (
    "fp16", "int8", "int6", "int5", "int4", "int4:tensor", "int3", "int2", "bool", "fp8-e4m3",
    "fp8-e5m2", "lambda-int8", "lambda-int4", "lambda-e4m3",
)  # fmt: skip
PATHS = {"unet": ("unet", "edge"), "unet-cloud": ("unet", "cloud"), "inner": ("inner", "edge")}
MAX_PSNR = 99.0  # stands for equal pictures in means and files


@dataclass(frozen=True, slots=True)
class ImageMeasurement:
    """One way to make pictures, over all prompts and seeds. Its fields are the columns."""

    path: str
    reuse: int
    codec: str
    bytes_up: int  # per picture
    bytes_down: int
    share: float  # of the bytes with fp32 on this path, without reuse
    psnr: float
    ssim: float
    ssim_min: float
    vif: float


@click.command("image")
@click.argument("model", default=DEMO_IMAGE_MODEL)
@click.option("--prompt", "prompts", multiple=True, help="Prompt; repeat it for several.")
@click.option(
    "--seed",
    "seeds",
    multiple=True,
    type=SEED,
    default=(0, 1),
    show_default=True,
    help="Makes it repeatable; repeat it for several.",
)
@codecs_option
@click.option(
    "--path",
    "paths",
    multiple=True,
    type=click.Choice(list(PATHS)),
    default=list(PATHS),
    show_default=True,
    help="Part unet with sync edge or cloud, or part inner.",
)
@click.option(
    "--reuse",
    "reuses",
    multiple=True,
    type=COUNT,
    default=(1, 2, 3),
    show_default=True,
    help="Ask the pool every so many steps only, with path inner.",
)
@click.option("--steps", default=15, show_default=True, type=COUNT, help="Of denoising.")
@click.option("--guidance", default=2.5, show_default=True, help="Scale; 1 is none.")
@csv_option
@plot_option
@click.option(
    "--sheet",
    "sheet_path",
    type=click.Path(path_type=Path),
    help="Write a contact sheet: rows are prompts, columns codecs of the last path.",
)
@json_option
def image_command(
    model: str,
    prompts: tuple[str, ...],
    seeds: tuple[int, ...],
    codecs: tuple[str, ...],
    paths: tuple[str, ...],
    reuses: tuple[int, ...],
    steps: int,
    guidance: float,
    csv_path: Path | None,
    plot_path: Path | None,
    sheet_path: Path | None,
    as_json: bool,
) -> None:
    """Pictures of MODEL against those made with fp32, for codecs, paths and reuse.

    Starts a broker and a worker and makes every picture through them, so bytes are those that the
    edge's socket counted. psnr, ssim and vif are means over prompts and seeds.
    """
    from common.console.processes import set_up_torch
    from common.diffusion.tensors import check_image_codec

    names = list(dict.fromkeys([EXACT, *(codecs or DEFAULT_CODECS)]))
    for name in names:
        check_image_codec(name)
    for prompt in prompts:
        check_text("--prompt", prompt)
    _require("skimage", "eval")
    if sheet_path is not None and 1 not in reuses:
        raise SettingsError("--sheet shows pictures without reuse: add --reuse 1")
    check_writable(csv_path, plot_path, sheet_path)
    if plot_path is not None:
        require_matplotlib()
    set_up_torch(threads=1)
    measured, pictures = measure_images(
        model,
        prompts or DEFAULT_PROMPTS,
        seeds,
        names,
        paths,
        reuses,
        steps,
        guidance,
        not as_json,
    )
    headers = [field.name for field in fields(ImageMeasurement)]
    rows = [tuple(asdict(m).values()) for m in measured]
    if csv_path is not None:
        with csv_path.open("w", newline="") as file:
            csv.writer(file).writerows([headers, *rows])
    if plot_path is not None:
        plot_quality(measured, plot_path)
    if sheet_path is not None:
        draw_sheet(pictures, names, prompts or DEFAULT_PROMPTS).save(sheet_path)
    click.echo(
        json.dumps([asdict(m) for m in measured]) if as_json else format_table(headers, rows)
    )


def measure_images(
    model: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    codecs: Sequence[str],
    paths: Sequence[str],
    reuses: Sequence[int],
    steps: int,
    guidance: float,
    is_shown: bool = True,
) -> tuple[list[ImageMeasurement], dict[str, list[Image]]]:
    """All combinations; also the pictures of the first seed on the last path, by codec.

    `is_shown`: how far it is.
    """
    from common.weights.demo_model import find_model
    from deploy.pool import LocalPool, PoolSettings
    from edge_agent.image.maker import ImageMaker, ImageSettings

    directory = find_model(model)
    ways = [
        (path, reuse, codec)
        for path in paths
        for reuse in reuses
        if reuse == 1 or path == "inner"
        for codec in codecs
    ]
    wanted = [
        ImageSettings(prompt, steps=steps, guidance=guidance, seed=seed)
        for seed, prompt in itertools.product(seeds, prompts)
    ]
    measured: list[ImageMeasurement] = []
    shown: dict[str, list[Image]] = {}
    with LocalPool(PoolSettings(workers=1, image_model=str(directory))) as pool:
        makers: dict[str, ImageMaker] = {}

        def maker_of(cut: str) -> ImageMaker:
            if cut not in makers:
                makers[cut] = ImageMaker(directory, pool.connect(), cut)
            return makers[cut]

        with waiting("making the reference", is_shown=is_shown):
            reference = _make_all(maker_of("unet"), wanted, "unet", 1, EXACT)[0]
            full = {
                path: sum(_make_all(maker_of(PATHS[path][0]), wanted[:1], path, 1, EXACT)[1:])
                for path in paths
            }
        with counted_work(len(ways), "measuring", is_shown=is_shown) as bar:
            for path, reuse, codec in ways:
                pictures, up, down = _make_all(maker_of(PATHS[path][0]), wanted, path, reuse, codec)
                measured.append(
                    _compare(reference, pictures, path, reuse, codec, up, down, full[path])
                )
                if path == paths[-1] and reuse == 1:
                    shown[codec] = pictures[: len(prompts)]
                bar.update(1)
    return measured, shown


def _make_all(
    maker: ImageMaker, wanted: list[ImageSettings], path: str, reuse: int, codec: str
) -> tuple[list[Image], int, int]:
    """The pictures, and the mean bytes of one, up and down."""
    cut, sync = PATHS[path]
    pictures, up, down = [], [], []
    for settings in wanted:
        changed = replace(
            settings, cut=cut, sync=sync, reuse=reuse, codec_up=codec, codec_down=codec
        )
        pictures += maker.make(changed)
        up.append(maker.stats.bytes_up)
        down.append(maker.stats.bytes_down)
    return pictures, round(mean(up)), round(mean(down))


def _compare(
    reference: list[Image],
    pictures: list[Image],
    path: str,
    reuse: int,
    codec: str,
    up: int,
    down: int,
    full: int,
) -> ImageMeasurement:
    from evaluation.image_metrics import psnr, ssim, vif

    def over_all(measure: Callable[[Image, Image], float]) -> list[float]:
        return [measure(a, b) for a, b in zip(reference, pictures, strict=True)]

    alike = over_all(ssim)
    return ImageMeasurement(
        path=path,
        reuse=reuse,
        codec=codec,
        bytes_up=up,
        bytes_down=down,
        share=round((up + down) / full, 4),
        psnr=round(mean(min(value, MAX_PSNR) for value in over_all(psnr)), 2),
        ssim=round(mean(alike), 4),
        ssim_min=round(min(alike), 4),
        vif=round(mean(over_all(vif)), 4),
    )


def plot_quality(measured: list[ImageMeasurement], file: Path) -> None:
    """SSIM against bytes per picture, a line for each path and reuse."""
    require_matplotlib()
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for path, reuse in dict.fromkeys((m.path, m.reuse) for m in measured):
        points = sorted(
            (m.bytes_up + m.bytes_down, m.ssim)
            for m in measured
            if (m.path, m.reuse) == (path, reuse)
        )
        label = path if reuse == 1 else f"{path}, reuse {reuse}"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=label)
    axes.axhline(0.99, color="grey", linewidth=0.7, linestyle=":")
    axes.set(xscale="log", xlabel="bytes per picture, up and down", ylabel="SSIM")
    axes.legend()
    figure.tight_layout()
    save_figure(figure, file)


def draw_sheet(
    pictures: dict[str, list[Image]], codecs: Sequence[str], prompts: Sequence[str]
) -> Image:
    """Rows are prompts, columns codecs, each with its name above."""
    from PIL import Image as Images
    from PIL import ImageDraw

    side, gap, head = 128, 4, 18
    width = gap + len(codecs) * (side + gap)
    height = head + len(prompts) * (side + gap + head)
    sheet = Images.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, codec in enumerate(codecs):
        x = gap + column * (side + gap)
        pen.text((x, 3), codec, fill="black")
        for row, picture in enumerate(pictures[codec]):
            y = head + row * (side + gap + head)
            sheet.paste(picture.resize((side, side), Images.Resampling.NEAREST), (x, y + head))
    for row, prompt in enumerate(prompts):
        pen.text((gap, head + row * (side + gap + head) + 4), prompt, fill="black")
    return sheet


def _require(module: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise SettingsError(f"this needs {module}: pip install 'midspan[{extra}]'")
