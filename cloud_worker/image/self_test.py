"""What a worker proves before it announces images: a real step through UNet and codec."""

from __future__ import annotations

import torch

from cloud_worker.image.executor import ImageExecutor, ImageInput
from common.diffusion.shapes import WHOLE, boundary_channels
from common.diffusion.tensors import decode_tensor, encode_tensor
from common.diffusion.unet import Conditioning
from common.errors import MidspanError, NonFiniteError

CODEC = "int8"
SIDE = 8  # of the latents


def compute_test_image(executor: ImageExecutor) -> bytes:
    """Compute a step of a tiny image, and encode what comes out. Raises MidspanError."""
    config, sizes = executor.model.config, executor.model.sizes
    channels = config.in_channels if executor.part == WHOLE else boundary_channels(config)[0]
    generator = torch.Generator().manual_seed(0)
    conditioning = Conditioning(
        torch.randn(1, 2, sizes.prompt, generator=generator),
        torch.randn(1, sizes.pooled, generator=generator),
        torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0][: sizes.time_ids]]),
    )
    sample = torch.randn(1, channels, SIDE, SIDE, generator=generator)
    (result,) = executor.run([ImageInput(sample, 1.0, conditioning)])
    if isinstance(result, str):
        raise MidspanError(f"this worker cannot compute its own test step: {result}")
    try:
        body = encode_tensor(result, CODEC)
        decode_tensor(body, result.shape, CODEC)
    except NonFiniteError as error:
        raise MidspanError(f"this worker's own test step: {error}") from error
    return body
