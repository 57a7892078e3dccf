"""Messages that no peer should send, and a command that sends many of them to a live pool.

    python tests/fuzzing.py --messages 200000

Half of them go through the decoder in this process; the others to a broker, from both of its sides,
and to a worker, from the broker that it believes in. Prints the memory of both before and after.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import msgpack
import zmq

from common.errors import ProtocolError
from common.protocol.messages import (
    KINDS,
    CodecNames,
    Count,
    Dispatch,
    ImageRoute,
    Joined,
    Names,
    Number,
    Numbers,
    Opening,
    Part,
    Parts,
    Route,
    Sealed,
    Service,
    Services,
    SessionId,
    Stats,
    Step,
    Text,
    Units,
)  # fmt: skip
from common.protocol.sockets import Context, Socket
from common.protocol.wire import check_frames, decode_header, encode_header
from common.settings import MAX_FRAMES
from deploy.child import Child, midspan_command
from deploy.pool import LocalPool, PoolSettings

TEXTS = ("", "w1", "fp32", "int8", "int4:group:32", "compact", "int8:group:" + "9" * 40, "x" * 300)
ODD: tuple[Any, ...] = (
    None, True, -1, 2**53, 2**64 - 1, float("nan"), "", b"", [], {}, [[]], {"a": {}}, "\x00" * 99,
    msgpack.ExtType(5, b"x"), msgpack.Timestamp(0), [[0, 1, 2]] * 600, b"\xff" * 16,
)  # fmt: skip


def valid_value(rng: random.Random, kind: Any) -> Any:
    values: dict[Any, Any] = {
        Count: lambda: rng.choice((0, 1, 2, 7, 511, 2**20, 2**53)),
        Text: lambda: rng.choice(TEXTS),
        SessionId: lambda: rng.randbytes(16) if rng.random() < 0.5 else b"s" * 16,
        Sealed: lambda: rng.randbytes(rng.choice((0, 80))),
        bool: lambda: rng.random() < 0.5,
        Number: lambda: rng.choice((0.0, 2.5, 999.0)),
        Numbers: lambda: [999.0] * rng.randrange(4),
        Route: lambda: ["2-6", "6-8"][: rng.randrange(1, 3)],
        ImageRoute: lambda: [rng.choice(("unet", "inner"))],
        Names: lambda: [rng.choice(TEXTS) for _ in range(rng.randrange(3))],
        Services: lambda: [Service("m", "n", "2-6", 8)],
        Parts: lambda: [
            rng.choice(
                (
                    Part(0, [rng.choice((0, 1, 2**40))], rng.choice((0, 512, 2**50))),
                    Part(0, [2, 4, 16, 16], 2**20, rng.choice(("", "latents", "x"))),
                )
            )
            for _ in range(rng.randrange(1, 4))
        ],
        CodecNames: lambda: [rng.choice(TEXTS) for _ in range(rng.randrange(1, 4))],
        Stats: lambda: {"a": 1},
        Units: lambda: [rng.choice((0, 1, 2, 2**40)) for _ in range(rng.randrange(4))],
    }
    return values[kind]()


def valid_header(rng: random.Random) -> bytes:
    message = rng.choice(list(KINDS.values()))
    types = get_type_hints(message, include_extras=True)
    names = message.__struct_fields__
    return encode_header(message(**{name: valid_value(rng, types[name]) for name in names}))


def spoilt_header(rng: random.Random) -> bytes:
    """A header that is nearly right."""
    header = valid_header(rng)
    match rng.randrange(5):
        case 0:
            return header
        case 1:
            flipped = bytearray(header)
            flipped[rng.randrange(len(header))] = rng.randrange(256)
            return bytes(flipped)
        case 2:
            return header[: rng.randrange(len(header))]
        case 3:
            fields = msgpack.unpackb(header)
            fields[rng.randrange(len(fields))] = rng.choice(ODD)
            packed: bytes = msgpack.packb(fields)
            return packed
        case _:
            return rng.randbytes(rng.randrange(400))


def messages(seed: int, count: int) -> Iterator[list[bytes]]:
    """Frames of `count` messages: nearly right ones, wrong counts, and noise."""
    rng = random.Random(seed)
    for _ in range(count):
        match rng.randrange(6):
            case 0:
                frames = rng.choice((0, 2, MAX_FRAMES, MAX_FRAMES + 1, 60))
                yield [spoilt_header(rng), *[b"x"] * frames]
            case 1:
                yield [spoilt_header(rng)]
            case 2:
                yield [spoilt_header(rng), rng.randbytes(rng.choice((0, 512, 5000)))]
            case 3:
                yield [spoilt_header(rng), b"", spoilt_header(rng)]
            case 4:
                yield [
                    spoilt_header(rng),
                    spoilt_header(rng),
                    rng.randbytes(512),
                    spoilt_header(rng),
                ]
            case _:
                step = Step(rng.randbytes(16), 0, 0, 0, 0, [Part(0, [1], 512)], 1, 0, 100)
                opening = Opening("f" * 16, ["2-6"], 128, [rng.choice(TEXTS)], "")
                frames_of_step = [encode_header(step), rng.randbytes(512), encode_header(opening)]
                yield [encode_header(Dispatch(1, 0, "")), *frames_of_step]


def fuzz_decoder(seed: int, count: int) -> int:
    """Decode every frame; anything but a message or a ProtocolError is raised. Returns refusals."""
    refused = 0
    for frames in messages(seed, count):
        try:
            check_frames(frames)
            for frame in frames:
                decode_header(frame)
        except ProtocolError:
            refused += 1
    return refused


def fuzz_endpoint(endpoint: str, seed: int, count: int) -> None:
    """Send messages to a ROUTER, over a new connection every thousand."""
    context: Context = zmq.Context()
    socket: Socket | None = None
    for index, frames in enumerate(messages(seed, count)):
        if index % 1000 == 0:
            if socket is not None:
                socket.close(linger=5000)
            socket = context.socket(zmq.DEALER)
            socket.connect(endpoint)
        assert socket is not None
        socket.send_multipart(frames)
        while socket.poll(0):
            socket.recv_multipart()
    context.destroy(linger=5000)


def fuzz_worker(pool: LocalPool, seed: int, count: int) -> tuple[int, int]:
    """Be the broker of a worker and send it messages; its memory before and after, in KB.

    Raises ProcessFailed if the worker ends.
    """
    context: Context = zmq.Context()
    broker = context.socket(zmq.ROUTER)
    broker.setsockopt(zmq.ROUTER_MANDATORY, 1)
    port = broker.bind_to_random_port("tcp://127.0.0.1")
    options = ["--broker", f"tcp://127.0.0.1:{port}", "--redis-url", pool.redis_url]
    with tempfile.TemporaryDirectory() as directory:
        command = midspan_command("worker", *options, "--threads", "1", "--id", "fuzzed")
        child = Child("fuzzed", command, Path(directory))
        peer = b""
        while not peer:  # the connection that takes steps is the one that announces
            address, *frames = broker.recv_multipart()
            with contextlib.suppress(ProtocolError):
                peer = address if decode_header(frames[0]).kind == "announce" else b""
        broker.send_multipart([peer, encode_header(Joined())])
        child.wait_for("worker fuzzed ready")
        before = memory_kb(child.pid)
        for frames in messages(seed, count):
            child.check()
            broker.send_multipart([peer, *frames])
            while broker.poll(0):
                broker.recv_multipart()
        give_up_at = time.monotonic() + 60
        heard = 0
        while heard < 5:  # it still announces itself, from its main loop
            assert time.monotonic() < give_up_at, "the worker hangs"
            child.check()
            if broker.poll(100):
                address, *frames = broker.recv_multipart()
                heard += decode_header(frames[0]).kind == "announce"
        after = memory_kb(child.pid)
        child.stop()
    context.destroy(linger=0)
    return before, after


def memory_kb(pid: int) -> int:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise AssertionError(f"process {pid} is gone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    count, seed = arguments.messages, arguments.seed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = fuzz_decoder(seed, count // 2)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"decoder: {count // 2:,} messages, {refused:,} refused, RSS {before:,} -> {after:,} KB")
    with LocalPool(PoolSettings(workers=1)) as pool:
        assert pool.broker is not None
        each = count // 6
        for side in (pool.edge_endpoint, pool.worker_endpoint):
            fuzz_endpoint(side, seed, 15_000)  # buffers that bursts take once are no growth
        before = memory_kb(pool.broker.pid)
        fuzz_endpoint(pool.edge_endpoint, seed + 1, each)
        fuzz_endpoint(pool.worker_endpoint, seed + 2, each)
        pool.check()
        after = memory_kb(pool.broker.pid)
        print(f"broker: {2 * each:,} messages, RSS {before:,} -> {after:,} KB")
        before, after = fuzz_worker(pool, seed + 3, each)
        print(f"worker: {each:,} messages, RSS {before:,} -> {after:,} KB")
        client = pool.connect()
        report = client.status(timeout_s=10)
        client.close()
        print(f"the broker answers; it dropped {report['bad_messages']:,} messages")


if __name__ == "__main__":
    sys.exit(main())
