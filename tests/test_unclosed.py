"""Who forgets to close a client is not punished: neither when it is collected nor at exit."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, sys
from edge_agent.engine.client import BrokerClient

class Ring:
    pass

for _ in range(3):
    ring = Ring()
    ring.client, ring.itself = BrokerClient(["tcp://127.0.0.1:1"]), ring  # garbage in a circle
    ring.client.end_session(b"s" * 16)
    del ring
    gc.collect()
kept = BrokerClient(["tcp://127.0.0.1:1"])
print("done", flush=True)
"""


def test_a_client_that_nobody_closes_hangs_neither_the_collector_nor_the_exit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
