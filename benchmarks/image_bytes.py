"""What an image of SDXL base costs in bytes and seconds of network, from its configuration.

    python benchmarks/image_bytes.py UNET_CONFIG.json > docs/image-bytes.md

Nothing is computed: bodies are sized by the codecs' own rules, headers and frame heads counted as
they are encoded. One image of 1024 x 1024, 30 steps, with guidance (so two halves of a batch).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from common.codecs.codec import make_codec
from common.diffusion.shapes import boundary_channels
from common.protocol.messages import ImageOpening, Part, Step, StepReply
from common.protocol.sockets import wire_bytes
from common.protocol.wire import encode_header

SIDE, STEPS, TOKENS = 1024, 30, 77
CODECS = ("fp32", "fp16", "int8", "int4", "int2")
MBITS = (20, 100, 1000)


def body_bytes(shape: tuple[int, ...], codec: str) -> int:
    """Size of a tensor's body, (n, C, h, w)."""
    rows, columns = shape[0] * shape[1], math.prod(shape[2:])
    size = make_codec(codec, "up")._fixed_size(rows, columns)
    assert size is not None
    return size


def step_bytes(tensors: list[Part], opening: ImageOpening | None) -> int:
    """On the wire, up: header, body, and the first step's opening."""
    step = Step(b"s" * 16, 0, 0, 15, 15, tensors, 0, 1, 60000)
    frames = [encode_header(step), bytes(sum(t.body_bytes for t in tensors))]
    if opening is not None:
        frames.append(encode_header(opening))
    return wire_bytes(frames)


def count(config: dict[str, object], path: str, codec: str, reuse: int) -> tuple[int, int]:
    """Bytes up and down of one image."""
    latent = SIDE // 8
    up_channels, down_channels = boundary_channels(config)
    if path == "inner":
        up = (2, up_channels, latent // 2, latent // 2)
        down = (2, down_channels, latent // 2, latent // 2)
    else:
        up = down = (1, 4, latent, latent)
    width = config["cross_attention_dim"]
    assert isinstance(width, int)
    itemsize = 4 if codec == "fp32" else 2  # the zeros of an empty negative prompt go as nothing
    halves = 2 if codec == "fp32" else 1
    conditioning = [
        Part(1, [2, TOKENS, width], halves * TOKENS * width * itemsize, "prompt_embeds"),
        Part(1, [2, 1280], halves * 1280 * itemsize, "text_embeds"),
        Part(0, [2, 6], 48, "time_ids"),
    ]
    times = [float(t) for t in range(1000, 0, -1000 // STEPS)][:STEPS]
    opening = ImageOpening(
        "f" * 16, [path[:5]], ["fp32", codec], 1, 5.0, times, False, "euler " * 3, "float32"
    )
    sample = Part(1, list(up), body_bytes(up, codec))
    total_up = step_bytes(conditioning, opening)
    if path == "unet-cloud":
        latents = Part(0, list(up), body_bytes(up, "fp32"), "latents")
        total_up = step_bytes([*conditioning, latents], opening) + (STEPS - 1) * step_bytes(
            [], None
        )
        calls = STEPS
    else:
        calls = -(-STEPS // reuse)
        total_up = step_bytes([*conditioning, sample], opening)
        total_up += (calls - 1) * step_bytes([sample], None)
    reply = StepReply(b"s" * 16, 0, 15, 1, 0, 0, "w-01234567", 500, 500_000)
    total_down = calls * wire_bytes([encode_header(reply), bytes(body_bytes(down, codec))])
    return total_up, total_down


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    config = json.loads(parser.parse_args().config.read_text())
    head = " | ".join(f"s at {rate} Mbit/s" for rate in MBITS)
    print(f"| path | reuse | codec | MB up | MB down | {head} |")
    print("|---|---|---|---|---|" + "---|" * len(MBITS))
    for path, reuse in (("unet", 1), ("unet-cloud", 1), ("inner", 1), ("inner", 2), ("inner", 3)):
        for codec in CODECS:
            up, down = count(config, path, codec, reuse)
            seconds = " | ".join(f"{(up + down) * 8 / rate / 1e6:.1f}" for rate in MBITS)
            print(f"| {path} | {reuse} | {codec} | {up / 1e6:.2f} | {down / 1e6:.2f} | {seconds} |")


if __name__ == "__main__":
    main()
