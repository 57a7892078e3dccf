"""How midspan processes log: to stderr, one line for each record."""

from __future__ import annotations

import logging


class OneLineFormatter(logging.Formatter):
    """What a peer calls itself may go into a message, but begins no line of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        line = super().formatMessage(record)
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def set_up_logging(verbose: bool) -> None:
    """Log to stderr, one line each. Prompts and texts are never logged at any level."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLineFormatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
