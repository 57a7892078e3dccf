"""Pictures of what travelled: so that one sees what the network and the workers see."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common.errors import SettingsError
from edge_agent.image.remote_unet import Travelled

SIDE = 256  # pixels that a picture has at least


class NoisePictures:
    """Writes up-NN.png and down-NN.png for every step; the directory is made if need be."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"--save-noise {directory} cannot be made: {error}") from error

    def add(self, travelled: Travelled) -> None:
        """Draw the tensors of a step; the first image of a batch."""
        for name, tensor in (("up", travelled.up), ("down", travelled.down)):
            if tensor is not None:
                file = self._directory / f"{name}-{travelled.position:03}.png"
                try:
                    draw_channels(tensor[0]).save(file)
                except OSError as error:
                    raise SettingsError(
                        f"--save-noise {file} cannot be written: {error}"
                    ) from error


def draw_channels(channels: Tensor) -> Image.Image:
    """The first three channels of (C, h, w) as red, green and blue, stretched to what they span."""
    shown = channels[:3].float().cpu()
    low, high = shown.amin(dim=(1, 2), keepdim=True), shown.amax(dim=(1, 2), keepdim=True)
    levels = ((shown - low) / (high - low).clamp(min=1e-9) * 255).round().to(torch.uint8)
    picture = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    scale = max(1, SIDE // max(picture.size))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
