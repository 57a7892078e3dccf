"""The options with which commands of an edge find their brokers: --broker, --key, --broker-key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from common.errors import SettingsError
from common.security.keys import load_client_keys
from common.settings import EDGE_ENDPOINT, parse_endpoint

if TYPE_CHECKING:
    from edge_agent.engine.client import BrokerClient

MIN_TIMEOUT_S, MAX_TIMEOUT_S = 0.001, 1_000_000

Command = TypeVar("Command", bound=Callable[..., object])


def connection_options(command: Command) -> Command:
    """Add the options; the command gets brokers, key and broker_key."""
    options = (
        click.option(
            "--broker",
            "brokers",
            multiple=True,
            default=[EDGE_ENDPOINT],
            show_default=True,
            help="A broker's address for edges; repeat it for several.",
        ),
        click.option("--key", type=click.Path(path_type=Path), help="This edge's .key_secret."),
        click.option("--broker-key", help="The broker's public key: its .key file, or the text."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def connect(
    brokers: Sequence[str], key: Path | None, broker_key: str | None, timeout_s: float = 60.0
) -> BrokerClient:
    """A client as the options say. Raises SettingsError for a bad address or key."""
    from edge_agent.engine.client import BrokerClient

    if not MIN_TIMEOUT_S <= timeout_s <= MAX_TIMEOUT_S:  # nor is NaN
        raise SettingsError(
            f"--timeout is {timeout_s}; expected seconds, more than 0, at most {MAX_TIMEOUT_S:,}"
        )
    endpoints = [parse_endpoint(broker, "--broker") for broker in brokers]
    return BrokerClient(endpoints, timeout_s, load_client_keys(key, broker_key))
