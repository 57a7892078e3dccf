"""What HTTP adds to a token: `midspan serve` against the same engine called directly.

    python benchmarks/serve.py [--json]

Both ask one engine for the same answer, in turns and in this one call, so that a noisy machine
disturbs them alike. As in `midspan serve`, engine and server are threads of one process; the client
is a process of its own that does no more than read events from a socket. Direct is a loop over
`engine.submit(...)`, which need not even make text of its tokens.

- first_token_ms: from when the answer is asked for.
- token_ms: between a token and the next.
- delay_ms: from when the engine has a token until whoever asked has it. The clock is the machine's,
  so two processes can be compared. This is what HTTP adds where the engine does not wait for it.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import socket
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import click

MARK = b"data: {"


def read_answer(link: socket.socket, body: bytes) -> tuple[float, list[float]]:
    """When a completion was asked for and when each event came, the one that ends it left out."""
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    came: list[float] = []
    received, looked = b"", 0
    asked_at = time.monotonic()
    link.sendall(head.encode() + body)
    while b"0\r\n\r\n" not in received[-16:]:
        data = link.recv(1 << 16)
        now = time.monotonic()
        if not data:
            raise ConnectionError(received.decode())
        received += data
        while (place := received.find(MARK, looked)) >= 0:
            came.append(now)
            looked = place + len(MARK)
    if b"[DONE]" not in received:
        raise ValueError(received.decode())
    return asked_at, came[:-1]


def run_client(pipe: Connection, port: int) -> None:
    """Ask for what the pipe says, over one connection, until it says None."""
    with socket.create_connection(("127.0.0.1", port)) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while (body := pipe.recv()) is not None:
            pipe.send(read_answer(link, body))


@dataclass(slots=True)
class Times:
    """Of all answers that were asked for in one way, in ms."""

    first_token: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)
    delay: list[float] = field(default_factory=list)

    def add(self, asked_at: float, came: Sequence[float], made: Sequence[float]) -> None:
        if len(came) != len(made):
            raise ValueError(f"{len(came)} of {len(made)} tokens have come by themselves")
        self.first_token.append((came[0] - asked_at) * 1e3)
        gaps = [(b - a) * 1e3 for a, b in itertools.pairwise(came)]
        self.token.append(statistics.median(gaps))
        self.delay += [(there - here) * 1e3 for there, here in zip(came, made, strict=True)]


def measure(model: str | None, tokens: int, rounds: int, codec: str) -> dict[str, Times]:
    """Times by way: direct and http."""
    from common.console.processes import freeze_loaded_objects, set_up_torch
    from common.weights.demo_model import find_model
    from deploy.pool import LocalPool, PoolSettings
    from edge_agent.engine.streams import Token, TokenStream
    from edge_agent.server.app import make_app
    from edge_agent.server.opening import PoolAccess, open_services
    from edge_agent.server.running import DrainingServer, bind
    from edge_agent.text.ends import load_ends
    from edge_agent.text.sampling import SamplingSettings
    from edge_agent.text.session_settings import uniform_settings
    from edge_agent.text.tokenizer import TextTokenizer

    made: list[float] = []
    put = TokenStream._put

    def note_and_put(stream: TokenStream, event: Token | BaseException | None) -> None:
        if isinstance(event, Token):
            made.append(time.monotonic())
        put(stream, event)

    TokenStream._put = note_and_put  # type: ignore[assignment,method-assign]
    set_up_torch(threads=1)
    directory = find_model(model)
    ends = load_ends(directory)
    prompt_ids = TextTokenizer(directory).encode("Once upon a time, there was a brave fox.")
    bias = dict.fromkeys(ends.eos_ids, -100.0)
    body = {
        "prompt": prompt_ids, "max_tokens": tokens, "temperature": 0, "stream": True,
        "logit_bias": {str(token_id): -100 for token_id in ends.eos_ids},
    }  # fmt: skip
    spawning = multiprocessing.get_context("spawn")
    times = {"direct": Times(), "http": Times()}
    with LocalPool(PoolSettings(workers=1, model=str(directory), threads=1)) as pool:
        services = open_services(ends, PoolAccess([pool.edge_endpoint]), uniform_settings(codec))
        listener, is_ready = bind("127.0.0.1", 0), threading.Event()
        server = DrainingServer(make_app(services), services.drain, is_ready.set)
        serving = threading.Thread(target=server.run, args=([listener],), daemon=True)
        serving.start()
        is_ready.wait()
        pipe, other = spawning.Pipe()
        client = spawning.Process(
            target=run_client, args=(other, listener.getsockname()[1]), daemon=True
        )
        client.start()
        freeze_loaded_objects()

        def ask_engine() -> tuple[float, list[float]]:
            asked_at = time.monotonic()
            sampling = SamplingSettings(logit_bias=bias)
            stream = services.text.engine.submit(prompt_ids, tokens, sampling)
            return asked_at, [time.monotonic() for _ in stream]

        def ask_http() -> tuple[float, list[float]]:
            pipe.send(json.dumps(body).encode())
            answer: tuple[float, list[float]] = pipe.recv()
            return answer

        ways = {"direct": ask_engine, "http": ask_http}
        for index in range(-1, rounds):  # the first warms up
            for way, ask in list(ways.items())[
                :: -1 if index % 2 else 1
            ]:  # each goes first in turn
                made.clear()
                asked_at, came = ask()
                if index >= 0:
                    times[way].add(asked_at, came, made)
        pipe.send(None)
        client.join()
        services.drain.is_asked = True
        serving.join()
        services.close()
    return times


def summarize(times: dict[str, Times]) -> dict[str, Any]:
    """Medians by figure; added and ratio are medians of what they are in each round."""
    result: dict[str, Any] = {}
    for name in ("first_token", "token", "delay"):
        direct, http = getattr(times["direct"], name), getattr(times["http"], name)
        pairs = list(zip(direct, http, strict=True))  # of one round
        result[f"{name}_ms"] = {
            "direct": round(statistics.median(direct), 3),
            "http": round(statistics.median(http), 3),
            "added": round(statistics.median(b - a for a, b in pairs), 3),
            "ratio": round(statistics.median(b / a for a, b in pairs), 3),
        }
    return result


@click.command()
@click.option("--model", help="Hugging Face directory.  [default: the demo model]")
@click.option("--tokens", default=32, show_default=True)
@click.option("--rounds", default=60, show_default=True)
@click.option("--codec", default="int8", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(model: str | None, tokens: int, rounds: int, codec: str, as_json: bool) -> None:
    result = summarize(measure(model, tokens, rounds, codec))
    if as_json:
        click.echo(json.dumps(result | {"tokens": tokens, "rounds": rounds, "codec": codec}))
        return
    for name, figures in result.items():
        click.echo(f"{name:16} " + "  ".join(f"{way} {value}" for way, value in figures.items()))


if __name__ == "__main__":
    main()
