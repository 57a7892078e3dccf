"""How much memory this process holds."""

from __future__ import annotations

import os


def read_memory_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say (Linux does)."""
    try:
        with open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
