"""Which process listens at an address: what Linux tells in /proc, for messages to people.

/proc/net/tcp and /proc/net/unix have the socket's inode, and a process that holds it links to that
in its fd directory; those of other users cannot be read. Command lines are not shown, they may
hold secrets.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

PROC = Path("/proc")
LISTENING = "0A"


def name_listener(endpoint: str) -> str:
    """`process 123 (midspan broker)`, or nothing when it cannot be found out."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(endpoint)}
    if not inodes:
        return ""
    for process in PROC.glob("[0-9]*"):
        if inodes & _open_files(process):
            return f"process {process.name} ({_name(process)})"
    return ""


def _listening_inodes(endpoint: str) -> set[str]:
    if endpoint.startswith("ipc://"):
        path = endpoint.removeprefix("ipc://")
        lines = [line for line in _lines("net/unix") if line[7:8] == [path]]
        return {line[6] for line in lines}
    port = f"{int(endpoint.rpartition(':')[2]):04X}"
    lines = [*_lines("net/tcp"), *_lines("net/tcp6")]
    return {
        line[9] for line in lines if line[3] == LISTENING and line[1].rpartition(":")[2] == port
    }


def _lines(name: str) -> list[list[str]]:
    try:
        return [line.split() for line in (PROC / name).read_text().splitlines()[1:]]
    except OSError:
        return []


def _open_files(process: Path) -> set[str]:
    files = set()
    try:
        for link in (process / "fd").iterdir():
            files.add(str(link.readlink()))
    except OSError:  # not ours to read, or just ended
        pass
    return files


def _name(process: Path) -> str:
    """The program's name; of midspan's own, the subcommand as well."""
    try:
        arguments = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        comm = (process / "comm").read_text().strip()
    except OSError:
        return "?"
    for program, command in itertools.pairwise(arguments):
        if Path(program).name == "midspan" and re.fullmatch("[a-z]+", command):
            return f"midspan {command}"
    return comm
