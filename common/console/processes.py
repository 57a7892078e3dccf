"""What midspan processes do when they start: torch threads, an eye on who started them.

A process that another one of ours started ends with it. It holds the reading end of a pipe, whose
number is in the environment, and the pipe ends when nobody can write any more: however the other
one ended, and with no thread of it involved, as there is with PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable

from common.console.libraries import import_diffusers, import_libraries

LIFELINE = "MIDSPAN_LIFELINE_FD"
ORPHAN_LIMIT_S = 15.0  # to drain in


def freeze_loaded_objects() -> None:
    """Call when models are loaded: keeps the garbage collector from walking over the libraries."""
    gc.collect(1)  # the young; among the old, looking at a million objects found nothing
    gc.freeze()


def set_up_torch(threads: int | None, images: bool = False) -> None:
    """Import libraries, pin torch's threads (default: all cores) and keep transformers silent."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import_libraries()
    if images:
        import_diffusers()
    import torch
    import transformers

    torch.set_num_threads(threads or os.cpu_count() or 1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def handle_signals(numbers: Iterable[signal.Signals], handler: Callable[..., None]) -> None:
    """Have these signals handled, but for those that are ignored, as nohup wants it."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


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
