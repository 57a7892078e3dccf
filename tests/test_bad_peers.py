"""Peers that send garbage, wrong sizes or NaN stop neither a broker nor a worker."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq
from msgspec import structs
from pools import PROMPTS, generate
from safetensors.torch import load_file, save_file

from common.errors import ProcessFailed, StepRefused
from common.protocol.messages import Dispatch, Opening, Part, Step
from common.protocol.wire import encode_header
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2)) as running:
        yield running


def send_all(endpoint: str, messages: list[list[bytes]]) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(endpoint)
    for frames in messages:
        socket.send_multipart(frames)
    context.destroy(linger=2000)


def garbage(count: int) -> list[list[bytes]]:
    """Random frames, and valid steps with bytes flipped, frames missing or frames too many."""
    rng = random.Random(1)
    step = encode_header(Step(b"s" * 16, 0, 0, 0, 0, [Part(0, [1], 32)], 1, 0, 100))
    opening = encode_header(Opening("m", ["2-6"], 8, ["fp32"], ""))
    messages = []
    for _ in range(count):
        flipped = bytearray(step)
        flipped[rng.randrange(len(step))] = rng.randrange(256)
        messages += [
            [rng.randbytes(rng.randrange(300)) for _ in range(rng.randrange(1, 12))],
            [step[: rng.randrange(len(step))], b""],
            [bytes(flipped), rng.randbytes(32)],
            [step],
            [step, b"", b""],
            [step, b"", opening],
            [encode_header(Dispatch(1, 0, "")), step, b"", opening],
        ]
    return messages


def works(pool: LocalPool, ends: ModelEnds) -> bool:
    ids = TextTokenizer(ends.directory).encode(PROMPTS[0])
    return len(generate(pool, ends, ids, 5)[0]) == 5


def test_garbage_on_both_sides_of_a_broker_stops_nothing(
    pool: LocalPool, demo_ends: ModelEnds
) -> None:
    messages = garbage(500)
    send_all(pool.edge_endpoint, messages)
    send_all(pool.worker_endpoint, messages)
    assert works(pool, demo_ends)
    client = pool.connect()
    assert client.status()["bad_messages"] > 1000
    client.close()
    pool.check()


def ask(
    pool: LocalPool,
    ends: ModelEnds,
    body: bytes,
    step: dict[str, object],
    opening: dict[str, object],
) -> None:
    """Send one step of one row as fp32, with some fields changed."""
    client = pool.connect(timeout_s=20)
    span = str(ends.cut.middle)
    part = Part(0, [1], ends.hidden * 4)
    good_step = Step(random.randbytes(16), 0, 0, 0, 0, [part], 1, 0, 30_000)
    good_opening = Opening(ends.fingerprint, [span], ends.hidden, ["fp32"], "")
    client.ask(
        structs.replace(good_step, **step),
        body,
        structs.replace(good_opening, **opening),
        is_known=False,
        wait_for_worker=False,
    )
    client.close()


@pytest.mark.parametrize(
    ("step", "opening", "body_bytes", "words"),
    [
        ({}, {}, 7, "body has 7 bytes; its parts need 512"),
        ({"parts": [Part(0, [1], 7)]}, {}, 7, r"body has 7 bytes; fp32 \(1, 128\) needs 512"),
        ({"parts": [Part(0, [2**40], 512)]}, {}, 512, f"the step has {2**40} rows; at most 8192"),
        ({"parts": [Part(9, [1], 512)]}, {}, 512, "names a codec beyond the 1 it opened"),
        ({"reply_codec": 9}, {}, 512, "names a codec beyond the 1 it opened"),
        ({"reply_rows": 3}, {}, 512, "wants 3 of its 1 rows"),
        ({"parts": [Part(0, [0], 0)]}, {}, 0, "wants 1 of its 0 rows"),
        ({"position": 600}, {}, 512, "the context has 512"),
        ({}, {"hidden": 64}, 512, "session has hidden 64; the model has 128"),
        ({}, {"codecs": ["int9"]}, 512, "codec 'int9' is unknown"),
        ({}, {"codecs": ["int8:group:\u00b2"]}, 512, "group needs a size"),
        ({}, {"codecs": ["int8:group:1" + "0" * 30]}, 512, "group needs a size"),
        ({}, {"codecs": ["compact"]}, 512, "names a calibrated codec but no calibration"),
        ({}, {"calibration": "f" * 16}, 512, f"the edge has calibration {'f' * 16} and this"),
    ],
)
def test_a_step_that_cannot_be_computed_is_refused_with_the_reason(
    pool: LocalPool,
    demo_ends: ModelEnds,
    step: dict[str, object],
    opening: dict[str, object],
    body_bytes: int,
    words: str,
) -> None:
    with pytest.raises(StepRefused, match=words):
        ask(pool, demo_ends, bytes(body_bytes), step, opening)
    assert works(pool, demo_ends)
    pool.check()


def test_rows_of_nan_are_refused_by_the_worker(pool: LocalPool, demo_ends: ModelEnds) -> None:
    body = torch.full((1, demo_ends.hidden), float("nan")).numpy().tobytes()
    with pytest.raises(StepRefused, match="fp32 body decodes to NaN or infinity"):
        ask(pool, demo_ends, body, {}, {})


def test_a_worker_whose_model_computes_nan_never_announces_itself(
    demo_directory: Path, tmp_path: Path
) -> None:
    for file in filter(Path.is_file, demo_directory.iterdir()):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.4.mlp.down_proj.weight"].fill_(float("nan"))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    words = "cannot compute its own test step: .*NaN or infinity"
    with (
        pytest.raises(ProcessFailed, match=words),
        LocalPool(PoolSettings(workers=1, model=str(tmp_path))),
    ):
        pass
