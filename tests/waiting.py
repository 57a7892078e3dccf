"""Waiting for what other processes and threads do."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(is_so: Callable[[], object], limit_s: float = 60.0) -> None:
    """Raises AssertionError when it does not come true."""
    give_up_at = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < give_up_at, "it did not come"
        time.sleep(0.01)
