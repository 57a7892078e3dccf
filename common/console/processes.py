"""What midspan processes do when they start: log format, torch threads, an eye on who started them.

A process that another one of ours started ends with it. It holds the reading end of a pipe, whose
number is in the environment, and the pipe ends when nobody can write any more: however the other
one ended, and with no thread of it involved, as there is with PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time

LIFELINE = "MIDSPAN_LIFELINE_FD"
ORPHAN_LIMIT_S = 15.0  # to drain in


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


def freeze_loaded_objects() -> None:
    """Call when models are loaded: keeps the garbage collector from walking over the libraries."""
    gc.collect()
    gc.freeze()


def set_up_torch(threads: int | None) -> None:
    """Pin torch's threads (default: all cores) and keep transformers from talking."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    import transformers

    torch.set_num_threads(threads or os.cpu_count() or 1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def take_lifeline() -> int | None:
    """The pipe from the process that started this one, if that was ours; not for our children."""
    text = os.environ.pop(LIFELINE, "")
    if not text:
        return None
    os.set_inheritable(int(text), False)
    return int(text)


def end_with_parent() -> None:
    """Have this process get a SIGTERM when the one that started it has ended, if that was ours."""
    lifeline_fd = take_lifeline()
    if lifeline_fd is not None:
        watch = threading.Thread(
            target=_wait_for_end, args=(lifeline_fd,), name="lifeline", daemon=True
        )
        watch.start()


def _wait_for_end(lifeline_fd: int) -> None:
    os.read(lifeline_fd, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_LIMIT_S)
    os._exit(1)


def read_memory_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say (Linux does)."""
    try:
        with open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
