"""Command-line options that several commands share, and groups of them that are one value."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console.log_lines import FORMATS, set_up_logging
from common.console.option_types import THREADS

if TYPE_CHECKING:
    from common.metrics.page import MetricsPage

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]

model_option = click.option(
    "--model", "model_name", help="Hugging Face directory.  [default: the demo model]"
)
cut_option = click.option(
    "--cut", "cut_text", help="Where the middle begins and ends, as A:B.  [default: middle half]"
)
image_model_option = click.option(
    "--image-model", help="SDXL pipeline: a directory in diffusers format."
)
calibration_option = click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="For calibrated codecs.  [default: the one in the model directory]",
)
dtype_option = click.option(
    "--dtype", default="float32", show_default=True, help="float32, float16 or bfloat16."
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


def broker_option(address: str, peers: str) -> Decorator:
    """--broker, as `brokers`: the addresses for `peers`, `address` if none is given."""
    return click.option(
        "--broker",
        "brokers",
        multiple=True,
        default=[address],
        show_default=True,
        help=f"A broker's address for {peers}; repeat it for several.",
    )


def key_options(owner: str) -> Decorator:
    """--key and --broker-key, as `key` and `broker_key`."""
    return add_options(
        click.option("--key", type=click.Path(path_type=Path), help=f"{owner}'s .key_secret."),
        click.option("--broker-key", help="The broker's public key: its .key file, or the text."),
    )


def add_options(*options: Decorator) -> Decorator:
    """Options as one decorator, in the order in which --help shows them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


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
    click.option("--log-format", type=click.Choice(FORMATS), default=FORMATS[0], show_default=True),
)
metrics_option = click.option(
    "--metrics",
    metavar="[HOST:]PORT",
    help="Serve /metrics for Prometheus, /health and /ready there.",
)
