"""What one peer costs the others: each figure alone and beside it, in one run.

    python benchmarks/one_against_all.py

Text beside images on one worker; a session beside an edge with many; a session right after another
edge has abandoned long steps; and a prompt over a thin link, in bytes that went up. Two cores, the
demo models, one torch thread per process.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import zmq

from chaos.bad_peers import abandon
from chaos.thin_link import ThinLink
from common.codecs.codec import make_codec
from common.protocol.messages import Opening, Part, Step, StepReply
from common.protocol.sockets import connect_dealer, receive_frames
from common.protocol.wire import decode_header, encode_header
from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL, find_model
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings

PROMPT_IDS = list(range(20, 40))
GREEDY = SamplingSettings()


def time_tokens(client: BrokerClient, ends: ModelEnds, count: int) -> list[float]:
    """Seconds from each token to the next; the first from the beginning."""
    session = Session(ends, client, uniform_settings("int8"))
    taken, last_at = [], time.perf_counter()
    for _ in session.generate(PROMPT_IDS, count, GREEDY):
        now = time.perf_counter()
        taken.append(now - last_at)
        last_at = now
    return taken


@contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Something that goes on in a thread meanwhile, after a second to begin."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,), daemon=True)
    thread.start()
    time.sleep(1.0)
    try:
        yield
    finally:
        stop.set()
        thread.join(60)


def text_beside_images(ends: ModelEnds, tokens: int) -> dict[str, float]:
    from edge_agent.image.maker import ImageMaker, ImageSettings

    settings = PoolSettings(workers=1, model=DEMO_TEXT_MODEL, image_model=DEMO_IMAGE_MODEL)
    with LocalPool(settings) as pool:
        client = pool.connect()
        alone = tokens / sum(time_tokens(client, ends, tokens))

        def paint(stop: threading.Event) -> None:
            torch.set_num_threads(1)
            maker = ImageMaker(find_model(DEMO_IMAGE_MODEL), pool.connect())
            while not stop.is_set():
                maker.make(ImageSettings(prompt="a red house", count=4, steps=10))

        with beside(paint):
            mixed = tokens / sum(time_tokens(client, ends, tokens))
        client.close()
    return {"alone_tokens_per_s": alone, "beside_tokens_per_s": mixed, "ratio": mixed / alone}


def flood_with_sessions(
    pool: LocalPool, ends: ModelEnds, sessions: int
) -> Callable[[threading.Event], None]:
    """One edge with many sessions, each of which always has a step under way."""

    def run(stop: threading.Event) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = connect_dealer(context, pool.edge_endpoint)
        body = make_codec("int8", "up").encode(torch.randn(1, ends.hidden))
        opening = encode_header(
            Opening(ends.fingerprint, [str(ends.cut.middle)], ends.hidden, ["int8"], "")
        )

        def send(session_id: bytes, number: int) -> None:
            position = number % 256
            step = Step(session_id, number // 256, 0, number, position,
                        [Part(0, [1], len(body))], 1, 0, 60_000)  # fmt: skip
            socket.send_multipart([encode_header(step), body, opening])

        for _ in range(sessions):
            send(secrets.token_bytes(16), 0)
        while not stop.is_set():
            if not socket.poll(50):
                continue
            message = decode_header(receive_frames(socket)[0])
            if isinstance(message, StepReply):
                send(message.session_id, message.step + 1)
        context.destroy(linger=0)

    return run


def session_beside_many(ends: ModelEnds, tokens: int, sessions: int) -> dict[str, float]:
    with LocalPool(PoolSettings(workers=1)) as pool:
        client = pool.connect()
        alone = statistics.median(time_tokens(client, ends, tokens)) * 1e3
        with beside(flood_with_sessions(pool, ends, sessions)):
            taken = time_tokens(client, ends, tokens)
        client.close()
    mixed = statistics.median(taken) * 1e3
    return {"alone_ms": alone, "beside_ms": mixed, "ratio": mixed / alone,
            "largest_ms": max(taken) * 1e3}  # fmt: skip


def request_after_abandoned_steps(ends: ModelEnds, steps: int) -> dict[str, float]:
    with LocalPool(PoolSettings(workers=2)) as pool:
        client = pool.connect()
        (service,) = client.status()["workers"][0]["services"]
        time_tokens(client, ends, 2)
        alone = time_tokens(client, ends, 1)[0]
        abandon(pool.edge_endpoint, service, sessions=steps)
        after = time_tokens(client, ends, 1)[0]
        client.close()
    return {"alone_ms": alone * 1e3, "after_ms": after * 1e3, "ratio": after / alone}


def prompt_over_a_thin_link(ends: ModelEnds, bytes_per_s: float) -> dict[str, float]:
    with LocalPool(PoolSettings(workers=1)) as pool:
        link = ThinLink(pool.edge_endpoint, bytes_per_s)
        client = BrokerClient([link.endpoint])
        session = Session(ends, client, uniform_settings("fp32"))
        begun_at = time.perf_counter()
        ids = [20 + index % 500 for index in range(256)]
        list(session.generate(ids, 1, GREEDY))
        taken_s = time.perf_counter() - begun_at
        body = 256 * ends.hidden * 4
        client.close()
        link.close()
    return {
        "body_bytes": body,
        "bytes_up": link.bytes_up,
        "times_sent": link.bytes_up / body,
        "seconds": taken_s,
        "of_the_links_own_time": taken_s / (2 * body / bytes_per_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ends = load_ends(find_model(None))
    results = {
        "text_beside_images": text_beside_images(ends, options.tokens),
        "session_beside_many": session_beside_many(ends, options.tokens, options.sessions),
        "after_abandoned_steps": request_after_abandoned_steps(ends, 60),
        "thin_link_70_kb_per_s": prompt_over_a_thin_link(ends, 70_000),
        "thin_link_20_kb_per_s": prompt_over_a_thin_link(ends, 20_000),
    }
    if options.json:
        print(json.dumps(results))
        return
    for name, figures in results.items():
        print(name, ", ".join(f"{key} {value:.2f}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
