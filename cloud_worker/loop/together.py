"""Steps are computed together, and if that fails each alone, to find the culprit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

log = logging.getLogger("midspan.worker")

T = TypeVar("T")
R = TypeVar("R")


class StepsCancelled(Exception):
    """Nobody waits for any step of the batch any more."""


def run_together(
    batch: Sequence[T],
    run: Callable[[Sequence[T]], Sequence[R]],
    clean_up: Callable[[Sequence[T]], None],
) -> list[R | str]:
    """What each step of a batch gives, or why it could not be computed.

    `clean_up` undoes what a run that failed has left. Whatever a peer's numbers do, or a device
    without memory, the worker lives on. Raises StepsCancelled if `run` does.
    """
    try:
        return list(run(batch))
    except StepsCancelled:
        raise
    except Exception as error:
        log.debug("a batch of %d failed", len(batch), exc_info=True)
        clean_up(batch)
        if len(batch) == 1:
            return [f"{type(error).__name__}: {str(error)[:500]}"]
    return [result for each in batch for result in run_together([each], run, clean_up)]
