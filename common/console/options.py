"""Command-line options that several commands share, and groups of them that are one value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console.log_lines import FORMATS, set_up_logging
from common.console.option_types import COUNT, COUNT_OR_ALL, MAX_COUNT, THREADS, WorkerRange
from common.console.renamed import RenamedOption
from common.settings import EDGE_ENDPOINT, MAX_SPIN_US, WORKER_ENDPOINT

if TYPE_CHECKING:
    from common.metrics.page import MetricsPage

DTYPES = ("float32", "float16", "bfloat16")
IMAGE_MODEL_HELP = "SDXL pipeline: a directory in diffusers format."
Command = Callable[..., Any]
Decorator = Callable[[Command], Command]

model_option = click.option(
    "--model",
    "model_name",
    help="Language model: a Hugging Face directory.  [default: the demo model]",
)
SPAN_HELP = "Layers that the pool computes, as a-b; 2:-2 leaves two on each side."
image_model_option = click.option("--image-model", help=IMAGE_MODEL_HELP)
lora_option = click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="PATH[@SCALE]",
    help="A LoRA's folder, as PEFT saves it, merged into the language model, on both sides; "
    "repeat it for several.",
)
image_lora_option = click.option(
    "--image-lora",
    "image_loras",
    multiple=True,
    metavar="PATH[@SCALE]",
    help="A LoRA merged into the image model, on both sides; repeat it for several.",
)
image_weights_option = click.option(
    "--image-weights",
    type=click.Path(path_type=Path),
    help="SDXL's weights in one .safetensors file; configurations and tokenizers are those of "
    "--image-model.",
)
calibration_option = click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="For calibrated codecs.  [default: the one in the model directory]",
)


def tokenizer_option(more: str, *names: str) -> Decorator:
    """--tokenizer; `more` is the end of its help, `names` are others for it."""
    return click.option(
        *names,
        "--tokenizer",
        type=click.Path(path_type=Path),
        help=f"A tokenizer.bin of llama2.c: {more}.",
    )


spin_option = click.option(
    "--spin-us",
    default=0,
    show_default=True,
    type=click.IntRange(0, MAX_SPIN_US),
    help="Microseconds for which it looks for the next message before it sleeps: takes a core "
    "meanwhile, and some wake-ups from each token where one is free.",
)
INT8 = "int8"
dtype_option = click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(DTYPES),
    help="Precision to compute in.",
)
weights_option = click.option(
    "--weights",
    type=click.Choice([INT8]),
    help="Keep the weights of the language model's layers in 8 bits.  [default: as --dtype]",
)
device_option = click.option(
    "--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, …"
)
threads_option = click.option(
    "--threads", type=THREADS, help="torch threads.  [default: all cores]"
)
insecure_option = click.option(
    "--insecure", is_flag=True, help="Bind an address that others reach, without keys."
)


def open_page(address: str | None) -> MetricsPage | None:
    """What --metrics asks for, and says where that is. Raises SettingsError."""
    if address is None:
        return None
    from common.metrics.page import MetricsPage

    page = MetricsPage(address)
    click.echo(f"metrics at http://{page.address}/metrics")
    return page


@dataclass(frozen=True, slots=True)
class Logs:
    """How much is logged, and how."""

    verbose: bool
    log_format: str

    def set_up(self) -> None:
        set_up_logging(self.verbose, self.log_format)


def span_option(default: str, **attributes: Any) -> Decorator:
    """--span, as `span_text`; `default` says what is computed without it."""
    return click.option(
        "--span",
        "span_text",
        cls=RenamedOption,
        old=["--cut"],
        help=f"{SPAN_HELP}  [default: {default}]",
        **attributes,
    )


span_seed_option = click.option(
    "--span-seed",
    type=int,
    help="With --span A-B,C-D: draws one for each session, as it would again.  [default: random]",
)


def workers_option(type_: WorkerRange, more: str = "", **attributes: Any) -> Decorator:
    """--workers, as `worker_range`: the least and the most; `more` is the end of its help."""
    return click.option(
        "--workers",
        "worker_range",
        type=type_,
        help=f"Worker processes: N, or A..B for as many as are needed{more}.",
        **attributes,
    )


def image_part_option(name: str, *, more: str, **attributes: Any) -> Decorator:
    """--image-part, as `name`; `more` is the end of its help."""
    return click.option(
        "--image-part",
        name,
        cls=RenamedOption,
        old=["--image-cut"],
        type=click.Choice(["unet", "inner"]),
        show_default=True,
        help=f"What the workers compute of an image: the whole UNet, or its inner blocks{more}",
        **attributes,
    )


def new_tokens_option(default: int, **attributes: Any) -> Decorator:
    """-n, as `max_new_tokens`."""
    return click.option(
        "-n",
        "--max-new-tokens",
        default=default,
        show_default=True,
        type=COUNT,
        help="Tokens of an answer, at most.",
        **attributes,
    )


def answer_tokens_option(default: int, *names: str) -> Decorator:
    """-n, as `max_new_tokens`, where 0 is all that fit; `names` are others for it."""
    return click.option(
        "-n",
        "--max-new-tokens",
        *names,
        default=default,
        show_default=True,
        type=COUNT_OR_ALL,
        callback=lambda context, option, value: value or MAX_COUNT,
        help="Tokens of an answer, at most; 0 is up to the end of the context.",
    )


def broker_option(address: str) -> Decorator:
    """--broker, as `brokers`: `address` if none is given."""
    return click.option(
        "--broker",
        "brokers",
        multiple=True,
        default=[address],
        show_default=True,
        help="A broker's address; repeat it for several.",
    )


def add_options(*options: Decorator) -> Decorator:
    """Options as one decorator, in the order in which --help shows them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


key_options = add_options(
    click.option(
        "--key",
        type=click.Path(path_type=Path),
        help="The secret key that the broker knows us by: a .key_secret file.",
    ),
    click.option("--broker-key", help="The broker's public key: its .key file, or the text."),
)


def endpoint_options(old_worker_endpoint: Sequence[str] = ()) -> Decorator:
    """--edge-endpoint and --worker-endpoint, where a broker listens."""
    return add_options(
        click.option(
            "--edge-endpoint",
            cls=RenamedOption,
            old=["--edges"],
            default=EDGE_ENDPOINT,
            show_default=True,
            help="Where the broker listens for edges.",
        ),
        click.option(
            "--worker-endpoint",
            cls=RenamedOption,
            old=old_worker_endpoint,
            default=WORKER_ENDPOINT,
            show_default=True,
            help="Where the broker listens for workers.",
        ),
    )


def group_options(name: str, group: type, *options: Decorator) -> Decorator:
    """Options that the command gets as one argument `name`: a dataclass with a field for each."""
    names = [field.name for field in fields(group)]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def gather(**values: Any) -> Any:
            value = group(**{field_name: values.pop(field_name) for field_name in names})
            return command(**values, **{name: value})

        return add_options(*options)(gather)

    return decorate


log_options = group_options(
    "logs",
    Logs,
    click.option("--verbose", is_flag=True, help="Log more."),
    click.option(
        "--log-format",
        type=click.Choice(FORMATS),
        default=FORMATS[0],
        show_default=True,
        help="A line of text or a JSON object for each record.",
    ),
)
metrics_option = click.option(
    "--metrics",
    metavar="[HOST:]PORT",
    help="Serve /metrics for Prometheus, /health and /ready there.",
)
