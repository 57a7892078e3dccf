"""What every midspan process does when it starts: log format, quiet libraries, torch threads."""

from __future__ import annotations

import gc
import logging
import os


def set_up_logging(verbose: bool) -> None:
    """Log to stderr, one line each. Prompts and texts are never logged at any level."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )


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
