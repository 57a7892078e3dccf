"""Defaults that must meet: addresses, intervals and limits shared by edge, broker and worker.

Nothing here is read from the environment or from a file; the command lines pass other values on.
"""

from __future__ import annotations

import re

from common.errors import SettingsError

EDGE_ENDPOINT = "tcp://127.0.0.1:5555"
WORKER_ENDPOINT = "tcp://127.0.0.1:5556"
REDIS_PORT = 6379
REDIS_URL = "MIDSPAN_REDIS_URL"  # the environment variable that a command line may read

HEARTBEAT_S = 0.1
HEARTBEATS_MISSED = 3  # a worker that is silent for this many intervals is dead
MAX_SPIN_US = 1_000_000  # of waiting without sleeping; more is a busy loop

MAX_ATTEMPTS = 3  # a step that failed on this many workers is refused
MAX_QUEUED_STEPS = 4096  # in one broker, over all services
MAX_QUEUED_BYTES = 2 << 30  # of their bodies
MAX_SESSIONS_PER_EDGE = 1024
MAX_STEPS_PER_EDGE = 1024
MAX_BYTES_PER_EDGE = 512 << 20  # of its steps' bodies
MAX_DEADLINE_S = 600.0
MAX_STEP_ROWS = 8192  # of a text step, whatever it costs to send them
MAX_EXACT_PARTS = 32  # of a step of an exact session: each may take as long as a step of one row
MAX_BODY_BYTES = 64 << 20
MAX_BROKER_MB = 4096  # of resident memory; beyond that nothing new is taken
MAX_HEADER_BYTES = 16 * 1024
MAX_FRAMES = 8

DRAFT_TOKENS = 16  # guesses of the next tokens that a step takes along at most
PIECES_AHEAD = 4  # of a long prompt that are on their way at once, and as many answers
PREFILL_ROWS = 256  # rows of one step; a longer prompt goes in several
SESSION_TTL_S = 3600.0


def parse_endpoint(text: str, option: str) -> str:
    """Return `text` if it is tcp://HOST:PORT or ipc://PATH, else raise SettingsError.

    A port of * lets the system choose one, where an address is bound.
    """
    if text.startswith("ipc://") and len(text) > len("ipc://"):
        return text
    match = re.fullmatch(r"tcp://([^\s:/]+|\[[0-9a-fA-F:]+\]|\*):(\d{1,5}|\*)", text)
    if match is None or (match[2] != "*" and not 0 < int(match[2]) < 65536):
        raise SettingsError(f"{option} has value {text!r}; expected tcp://HOST:PORT")
    return text
