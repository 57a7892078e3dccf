"""A far link between two network namespaces: IP packets wait for their turn, and half a round trip.

What `tc netem delay … rate …` does, for kernels that have none: the namespaces have a TUN device
each, and packets go from one to the other through this process, so TCP on both sides sees a far
link as it is, with its windows and acknowledgements. Linux, as root:

    python -m chaos.tun_link

makes a namespace of its own, which is the far side, and prints its process id; the near side is
where it was started. A line `ROUND_TRIP_MS MBIT` on its standard input sets the link. It ends with
that input.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import queue
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from common.errors import SettingsError

NEAR, FAR = "10.77.0.1", "10.77.0.2"
CLONE_NEWNET = 0x4000_0000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x4004_54CA, 1, 0x1000
MOST_BYTES = 65_536  # of a packet
MOST_QUEUED = 1000  # packets, as netem; what comes then is lost

_libc = ctypes.CDLL(None, use_errno=True)


def _check(status: int, what: str) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise SettingsError(f"{what} needs root and Linux: {os.strerror(number)}")


def leave_network() -> None:
    """A network namespace of its own for this thread, and all that it starts from now on."""
    _check(_libc.unshare(CLONE_NEWNET), "a network namespace")
    run_ip("link", "set", "lo", "up")


@contextlib.contextmanager
def in_network_of(process_id: int) -> Iterator[None]:
    """This thread, and all that it starts meanwhile, are in the namespace of a process."""
    with open("/proc/thread-self/ns/net") as here, open(f"/proc/{process_id}/ns/net") as there:
        _check(_libc.setns(there.fileno(), CLONE_NEWNET), "another network namespace")
        try:
            yield
        finally:
            _check(_libc.setns(here.fileno(), CLONE_NEWNET), "a network namespace")


def run_ip(*words: str) -> None:
    """A command of iproute2's. Raises SettingsError."""
    ip = shutil.which("ip")
    if ip is None:
        raise SettingsError("a link between namespaces needs iproute2's `ip`, which is not there")
    subprocess.run([ip, *words], check=True, capture_output=True)


def open_tun(name: str, own: str, other: str) -> int:
    """The descriptor of a new device of this namespace, from which `other` is reached."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    run_ip("addr", "add", own, "peer", other, "dev", name)
    run_ip("link", "set", name, "up")
    return device


@dataclass(slots=True)
class Way:
    """How it goes in one direction."""

    seconds: float = 0.0  # that each packet is on its way
    bytes_per_s: float = float("inf")


def forward(source: int, sink: int, way: Way) -> None:
    """Pass packets on, in two threads, as long as both devices are there."""
    on_its_way: queue.Queue[tuple[float, bytes]] = queue.Queue(MOST_QUEUED)

    def take_in() -> None:
        free_at = 0.0
        while True:
            packet = os.read(source, MOST_BYTES)
            free_at = max(free_at, time.monotonic()) + len(packet) / way.bytes_per_s
            with contextlib.suppress(queue.Full):
                on_its_way.put_nowait((free_at + way.seconds, packet))

    def give_out() -> None:
        while True:
            due_at, packet = on_its_way.get()
            time.sleep(max(0.0, due_at - time.monotonic()))
            os.write(sink, packet)

    for work in (take_in, give_out):
        threading.Thread(target=work, daemon=True).start()


class TunLink:
    """The process, for who starts it; `close` it. Raises SettingsError where it cannot be."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "chaos.tun_link"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        if not said.isdecimal():
            self.close()
            raise SettingsError(f"no link between two namespaces: {said or 'it ended at once'}")
        self.far_process = int(said)

    def set(self, rtt_ms: float, mbit: float) -> None:
        """From now on, for packets that come."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{rtt_ms} {mbit}\n")
        stdin.flush()
        stdout.readline()  # it is set

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    try:
        near = open_tun("midspan-near", NEAR, FAR)
        leave_network()
        far = open_tun("midspan-far", FAR, NEAR)
    except (OSError, SettingsError, subprocess.CalledProcessError) as error:
        sys.exit(print(error, flush=True))
    way = Way()
    forward(near, far, way)
    forward(far, near, way)
    print(os.getpid(), flush=True)
    for line in sys.stdin:
        rtt_ms, mbit = (float(word) for word in line.split())
        way.seconds, way.bytes_per_s = rtt_ms / 2e3, mbit * 125e3
        print("set", flush=True)


if __name__ == "__main__":
    main()
