"""VAE and text encoders out of an SDXL checkpoint in one file.

diffusers' converters put their names and shapes right. Whether all that a model has was there is
checked here: what is missing would be random.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.diffusion.single_file import has_prefixed, read_prefixed
from common.errors import CheckpointError
from common.weights.model_files import read_json

VAE = "first_stage_model."
CLIP = "conditioner.embedders.0.transformer."
OPEN_CLIP = ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.")  # a refiner's


def load_from_file(directory: Path, weights: Path, part: str, dtype: torch.dtype) -> Any:
    """A part that has weights. Raises CheckpointError."""
    loaders: dict[str, Callable[[Path, Path], Any]] = {
        "vae": _load_vae, "text_encoder": _load_clip, "text_encoder_2": _load_open_clip,
    }  # fmt: skip
    return loaders[part](directory, weights).to(dtype).eval()


def _load_vae(directory: Path, weights: Path) -> Any:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model: Any = AutoencoderKL.from_config(read_json(directory / "vae" / "config.json"))
    return _fill(model, convert_ldm_vae_checkpoint(_read(weights, VAE), model.config), weights)


def _load_clip(directory: Path, weights: Path) -> Any:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModel

    model: Any = CLIPTextModel(_read_config(CLIPTextConfig, directory / "text_encoder"))
    tensors = convert_ldm_clip_checkpoint(_read(weights, CLIP))
    if not hasattr(model, "text_model"):  # in newer releases of transformers it is the model itself
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    return _fill(model, tensors, weights)


def _load_open_clip(directory: Path, weights: Path) -> Any:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = _read_config(CLIPTextConfig, directory / "text_encoder_2")
    model: Any = CLIPTextModelWithProjection(config)
    prefix = next((prefix for prefix in OPEN_CLIP if has_prefixed(weights, prefix)), OPEN_CLIP[0])
    tensors = _read(weights, prefix)
    return _fill(model, convert_open_clip_checkpoint(model, tensors, prefix=prefix), weights)


def _read_config(kind: Any, directory: Path) -> Any:
    return kind.from_dict(read_json(directory / "config.json"))


def _read(weights: Path, prefix: str) -> dict[str, Tensor]:
    tensors = read_prefixed(weights, prefix)
    if not tensors:
        raise CheckpointError(f"{weights} has no tensors {prefix}…, as an SDXL checkpoint has")
    return tensors


def _fill(model: Any, tensors: dict[str, Tensor], weights: Path) -> Any:
    known = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    try:
        missing, beyond = model.load_state_dict(known, strict=False)
    except RuntimeError as error:  # of another shape
        raise CheckpointError(f"{weights} does not fit its configuration: {error}") from error
    if missing or beyond:
        which = f"lacks {min(missing)}" if missing else f"also has {min(beyond)}"
        kind = type(model).__name__
        raise CheckpointError(f"{weights} {which} of the {kind} that its configuration describes")
    return model
