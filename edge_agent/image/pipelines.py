"""diffusers' own SDXL pipelines of a directory, around a stand-in for the UNet.

One makes pictures of a prompt alone, one of a prompt and a picture; they share all that they are
made of. A refiner has the second only, and one text encoder instead of two.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.diffusion.lora import TEXT_ENCODERS, ImageLora
from common.diffusion.schedulers import make_scheduler
from common.diffusion.shapes import FROM_PICTURE, FROM_TEXT, SCORED, read_index
from common.errors import CheckpointError
from common.weights.model_files import check_plain_files
from edge_agent.image.single_file import load_from_file

FLAG = "force_zeros_for_empty_prompt"
# part of a directory -> the library and the class that read it
PARTS = {
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
}
OPTIONAL = ("text_encoder", "tokenizer")  # a refiner has none

# transformers changes its classes while it loads a model: two at once leave them changed, and what
# is loaded afterwards has weights untied that belong together
LOADING = threading.Lock()


class Pipelines:
    """Of one directory. Raises CheckpointError for what cannot be loaded."""

    def __init__(
        self,
        directory: Path,
        unet: Any,
        scheduler_config: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device | str,
        loras: Sequence[ImageLora] = (),
        weights: Path | None = None,
    ) -> None:
        self._index = read_index(directory)
        self._scheduler = make_scheduler(scheduler_config, "ddim", 1)  # until a picture is made
        with LOADING:
            parts = self._load_parts(directory, dtype, weights)
        for lora in loras:
            for name in TEXT_ENCODERS:
                adapt_module(parts[name], lora, name)
        self._parts = parts | {"unet": unet}
        self._device = device
        self._made: dict[str, Any] = {}
        self.vae = self._parts["vae"].to(device)
        self.tokenizer = self._parts["tokenizer"] or self._parts["tokenizer_2"]

    @property
    def are_scored(self) -> bool:
        """Whether this is a refiner: its UNet is told a score, and it needs a picture."""
        return bool(self._index.get(SCORED))

    @property
    def from_text(self) -> Any:
        """Makes a picture of a prompt."""
        return self._find(FROM_TEXT, {})

    @property
    def from_picture(self) -> Any:
        """Makes a picture of a prompt and a picture."""
        return self._find(FROM_PICTURE, {SCORED: self.are_scored})

    def _find(self, class_name: str, flags: dict[str, Any]) -> Any:
        import diffusers

        if class_name not in self._made:
            if FLAG in self._index:
                flags = flags | {FLAG: bool(self._index[FLAG])}
            pipeline = getattr(diffusers, class_name)(
                **self._parts, scheduler=self._scheduler, add_watermarker=False, **flags
            )
            pipeline.to(self._device)
            pipeline.set_progress_bar_config(disable=True)
            self._made[class_name] = pipeline
        return self._made[class_name]

    def _load_parts(
        self, directory: Path, dtype: torch.dtype, weights: Path | None
    ) -> dict[str, Any]:
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        missing = [part for part in OPTIONAL if self._index.get(part, [None])[0] is None]
        wanted = [part for part in PARTS if part not in missing]
        for part in wanted:
            check_plain_files(directory / part)
        try:
            loaded = {part: _load_part(directory, part, dtype, weights) for part in wanted}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory} cannot be loaded: {error}") from error
        return loaded | dict.fromkeys(missing)


def adapt_module(module: Any, lora: ImageLora, part: str) -> None:
    """Change a text encoder's weights. Raises CheckpointError for what it has not."""
    weights = dict(module.named_parameters()) if module is not None else {}
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    adapter = lora.for_text_encoder(part, names)
    for name in adapter.names:
        weight = weights[name]
        adapter.check(name, tuple(weight.shape))
        weight.data = adapter.apply(name, weight.data).to(weight.dtype)


def _load_part(directory: Path, part: str, dtype: torch.dtype, weights: Path | None) -> Any:
    import diffusers
    import transformers

    if weights is not None and not part.startswith("tokenizer"):
        return load_from_file(directory, weights, part, dtype)
    library, class_name = PARTS[part]
    if library == "diffusers":
        # the other way empties modules of other threads meanwhile, where accelerate is
        return getattr(diffusers, class_name).from_pretrained(
            directory / part, torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False
        )
    own: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if not part.startswith("tokenizer"):
        own["dtype"] = dtype
    return getattr(transformers, class_name).from_pretrained(directory / part, **own)
