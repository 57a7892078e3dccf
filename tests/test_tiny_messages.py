"""A few hundred bytes do not make giant work: they are refused before anything is decoded.

Each message is sent to a real broker and worker, as an admitted edge could send it. It must be
refused for what it announces, nothing of it computed, and the worker's memory stay as it is.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from pools import PROMPTS, generate, reference_tokens

from common.codecs.codec import COMPRESSED, make_codec
from common.diffusion.schedulers import describe_scheduler, read_scheduler_config
from common.errors import StepRefused
from common.protocol.messages import (
    BOUNDARY,
    AnyOpening,
    ImageOpening,
    Opening,
    Part,
    Step,
)
from common.protocol.wire import encode_header
from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL, find_model
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.tokenizer import TextTokenizer

CODECS = ["fp16+zstd", "int1:tensor+zstd", "fp32+zstd"]
FLOATS, BITS, EXACT = range(3)
GROWTH_BYTES = 300 << 20  # a worker has some 500 MB
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    settings = PoolSettings(workers=1, model=DEMO_TEXT_MODEL, image_model=DEMO_IMAGE_MODEL)
    with LocalPool(settings) as running:
        yield running


@dataclass(frozen=True)
class Tensor:
    """A tensor of zeros in an image step; a gigabyte of them is a few hundred bytes."""

    name: str
    shape: list[int]
    codec: int = BITS

    @property
    def body(self) -> bytes:
        count = math.prod(self.shape)
        count = count if count < 1 << 26 else 1  # beyond that it is not looked at
        return make_codec(CODECS[self.codec], "up").encode(torch.zeros(1, count))


@dataclass(frozen=True)
class Tiny:
    """What an edge sends in one step, and a part of why it is refused."""

    words: str
    tensors: list[Tensor] = field(default_factory=list)
    opening: dict[str, Any] = field(default_factory=dict)  # of an image
    rows: list[tuple[int, bytes]] = field(default_factory=list)  # of a text, and their bodies
    codec: int = BITS


def image(words: str, *tensors: Tensor, **opening: Any) -> Tiny:
    return Tiny(words, list(tensors), opening)


def image_at_worker(words: str, *tensors: Tensor) -> Tiny:
    """In a session whose latents are the worker's to keep: an edge may hand it earlier ones."""
    scheduler = describe_scheduler(read_scheduler_config(find_model(DEMO_IMAGE_MODEL)), "euler")
    return image(words, *tensors, keeps_latents=True, scheduler=scheduler)


def text(words: str, rows: int, parts: int = 1) -> Tiny:
    body = make_codec(CODECS[BITS], "up").encode(torch.zeros(rows, 128))
    return Tiny(words, rows=[(rows, body)] * parts)


def bomb(words: str, size: int, tells_size: bool, window_log: int = 21) -> Tiny:
    """A zstd body of many zeros, which says so or does not, for 500 rows."""
    parameters = zstandard.ZstdCompressionParameters(
        compression_level=3, write_content_size=tells_size, window_log=window_log
    )
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj(
        size=size if tells_size else -1
    )
    piece = bytes(1 << 20)
    body = [COMPRESSED, *(packer.compress(piece) for _ in range(size >> 20)), packer.flush()]
    return Tiny(words, rows=[(500, b"".join(body))], codec=EXACT)


def sample(images: int, side: int) -> Tensor:
    return Tensor(BOUNDARY, [images, 4, side, side])


def conditioning(images: int) -> list[Tensor]:
    """As the demo model wants it."""
    shapes = {"prompt_embeds": [77, 128], "text_embeds": [64], "time_ids": [6]}
    return [Tensor(name, [images, *shape], FLOATS) for name, shape in shapes.items()]


MESSAGES: dict[str, Callable[[], Tiny]] = {
    "sides of a million": lambda: image("step has more than", sample(1, 2**20)),
    "sides of 2,000": lambda: image("at most 1024", sample(1, 2000)),
    "one image with a million pixels": lambda: image(
        "1 images with 1048576 pixels", sample(1, 1024), *conditioning(1)
    ),
    "one image that attends to itself": lambda: image(
        "1 images with 262144 pixels", sample(1, 512), *conditioning(1)
    ),
    "64 images, doubled": lambda: image(
        "128 images with 4096 pixels", sample(64, 64), *conditioning(128), images=64, guidance=5.0
    ),
    "images without end": lambda: image("at most 64", sample(1, 16), images=2**40),
    "inner rows without end": lambda: image(
        "1 images with 1048576 pixels", Tensor(BOUNDARY, [1, 64, 512, 512]), route=["inner"]
    ),
    "a history that is large": lambda: image_at_worker(
        "several sizes", sample(1, 16),
        *(Tensor(f"history{index}", [1, 4, 1024, 64], FLOATS) for index in range(12)),
    ),
    "a history in a few bits": lambda: image_at_worker(
        "history0 is in 'int1", sample(1, 256), Tensor("history0", [1, 4, 256, 256])
    ),
    "a history in a session without one": lambda: image(
        "keeps its latents to itself", sample(1, 16), Tensor("history0", [1, 4, 16, 16], FLOATS)
    ),
    "a prompt that is wide": lambda: image(
        "prompt_embeds has shape", sample(1, 16), Tensor("prompt_embeds", [1, 77, 50_000], FLOATS)
    ),
    "a prompt that is long": lambda: image(
        "prompt_embeds has shape", sample(1, 16), Tensor("prompt_embeds", [1, 40_000, 128], FLOATS)
    ),
    "prompts for many images": lambda: image(
        "prompt_embeds has shape", sample(64, 8),
        Tensor("prompt_embeds", [128, 3000, 128], FLOATS), images=64, guidance=5.0,
    ),
    "a prompt in a few bits": lambda: image(
        "prompt_embeds is in 'int1", sample(1, 16), Tensor("prompt_embeds", [1, 4096, 128])
    ),
    "a text embedding without end": lambda: image(
        "text_embeds has shape", sample(1, 16), Tensor("text_embeds", [1, 5_000_000], FLOATS)
    ),
    "time ids without end": lambda: image(
        "time_ids has shape", sample(1, 16), Tensor("time_ids", [1, 5_000_000], FLOATS)
    ),
    "a codec that was not opened": lambda: image("beyond the 3", Tensor(BOUNDARY, [1, 4, 8, 8], 9)),
    "65,536 rows": lambda: text("at most 8192", 65_536),
    "8,192 rows": lambda: text("the context has 512", 8192),
    "many parts": lambda: text("the context has 512", 16, parts=500),
    "a bomb that says its size": lambda: bomb("zstd body", 1 << 32, tells_size=True),
    "a bomb that does not": lambda: bomb("zstd body", 1 << 32, tells_size=False),
    "a bomb with a wide window": lambda: bomb("zstd body", 1 << 32, False, window_log=27),
}  # fmt: skip


def make_step(tiny: Tiny, services: list[dict[str, Any]]) -> tuple[Step, bytes, AnyOpening]:
    session_id = secrets.token_bytes(16)
    if tiny.rows:
        (service,) = [service for service in services if service["hidden"]]
        parts = [Part(tiny.codec, [rows], len(body)) for rows, body in tiny.rows]
        step = Step(session_id, 0, 0, 0, 0, parts, 1, 0, 30_000)
        opening = Opening(service["model"], [service["part"]], service["hidden"], CODECS, "")
        return step, b"".join(body for _, body in tiny.rows), opening
    model = next(service["model"] for service in services if not service["hidden"])
    fields = {
        "route": ["unet"], "codecs": CODECS, "images": 1, "guidance": 1.0, "timesteps": [999.0],
        "keeps_latents": False, "scheduler": "", "latents_dtype": "float32", **tiny.opening,
    }  # fmt: skip
    bodies = [tensor.body if tensor.codec < len(CODECS) else b"" for tensor in tiny.tensors]
    tensors = [
        Part(tensor.codec, tensor.shape, len(body), tensor.name)
        for tensor, body in zip(tiny.tensors, bodies, strict=True)
    ]
    step_of_image = Step(session_id, 0, 0, 0, 0, tensors, 0, 0, 30_000)
    return step_of_image, b"".join(bodies), ImageOpening(model, **fields)


def read_worker(pool: LocalPool) -> dict[str, Any]:
    client = pool.connect()
    (worker,) = client.status()["workers"]
    client.close()
    return dict(worker)


def send(pool: LocalPool, tiny: Tiny) -> int:
    """Have it refused; how many bytes it was."""
    step, body, opening = make_step(tiny, read_worker(pool)["services"])
    client = pool.connect(timeout_s=20)
    try:
        with pytest.raises(StepRefused, match=tiny.words):
            client.ask(step, body, opening, is_known=False, wait_for_worker=False)
    finally:
        client.close()
    return len(encode_header(step)) + len(body) + len(encode_header(opening))


def peak_bytes(pid: int) -> int:
    """The most memory that a process had since `forget_peak`."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@pytest.mark.parametrize("name", MESSAGES)
def test_giant_work_in_a_tiny_message_is_refused(pool: LocalPool, name: str) -> None:
    worker = read_worker(pool)
    forget_peak(worker["pid"])
    before = peak_bytes(worker["pid"])
    assert send(pool, MESSAGES[name]()) < 150_000
    assert peak_bytes(worker["pid"]) - before < GROWTH_BYTES
    now = read_worker(pool)["stats"]
    computed = ("steps", "image_steps")
    assert [now[what] for what in computed] == [worker["stats"][what] for what in computed]


@pytest.mark.long
def test_a_session_goes_on_beside_tiny_messages(
    pool: LocalPool, demo_ends: ModelEnds, whole_model: torch.nn.Module
) -> None:
    tokenizer = TextTokenizer(demo_ends.directory)
    (reference,) = reference_tokens(whole_model, tokenizer, PROMPTS[:1], NEW_TOKENS)
    pid = read_worker(pool)["pid"]
    forget_peak(pid)
    before = peak_bytes(pid)
    begun, errors = threading.Event(), list[BaseException]()

    def attack() -> None:
        torch.set_num_threads(1)
        try:
            for make in MESSAGES.values():
                send(pool, make())
                begun.set()
        except BaseException as error:  # shown in the main thread
            errors.append(error)
            begun.set()

    attacker = threading.Thread(target=attack)
    attacker.start()
    begun.wait()
    while True:
        tokens, _ = generate(pool, demo_ends, tokenizer.encode(PROMPTS[0]), NEW_TOKENS)
        assert tokens == reference
        if not attacker.is_alive():
            break
    assert errors == []
    assert peak_bytes(pid) - before < GROWTH_BYTES
    pool.check()
