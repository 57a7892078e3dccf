"""The options with which commands of an edge find their brokers: --broker, --key, --broker-key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.console.options import broker_option, group_options, key_options
from common.errors import SettingsError
from common.security.keys import ClientKeys, load_client_keys
from common.settings import EDGE_ENDPOINT, parse_endpoint

if TYPE_CHECKING:
    from edge_agent.engine.client import BrokerClient

SERVED = "one that the pool serves, else the middle half"  # what --span is by default
MIN_TIMEOUT_S, MAX_TIMEOUT_S = 0.001, 1_000_000


@dataclass(frozen=True, slots=True)
class Connection:
    """What the options said."""

    brokers: tuple[str, ...]
    key: Path | None
    broker_key: str | None

    def connect(self, timeout_s: float) -> BrokerClient:
        """A client as the options say. Raises what `check` raises."""
        from edge_agent.engine.client import BrokerClient

        self.check(timeout_s)
        return BrokerClient(self.endpoints(), timeout_s, self.keys())

    def check(self, timeout_s: float) -> None:
        """Raises SettingsError for a bad address or key, or a time that is none."""
        self.endpoints()
        self.keys()
        if not MIN_TIMEOUT_S <= timeout_s <= MAX_TIMEOUT_S:  # nor is NaN
            raise SettingsError(
                f"--timeout is {timeout_s}; expected seconds, more than 0, "
                f"at most {MAX_TIMEOUT_S:,}"
            )

    def endpoints(self) -> list[str]:
        """Raises SettingsError for what is no address."""
        return [parse_endpoint(broker, "--broker") for broker in self.brokers]

    def keys(self) -> ClientKeys | None:
        """Raises SettingsError for keys that are not there."""
        return load_client_keys(self.key, self.broker_key)


connection_options = group_options(
    "connection", Connection, broker_option(EDGE_ENDPOINT), key_options
)
