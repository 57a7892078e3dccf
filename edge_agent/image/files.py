"""Pictures as files; a PNG says how it was made, and its prompt only if that is wanted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from common.adapters.choice import LoraChoice
from common.errors import SettingsError
from edge_agent.image.init_picture import digest_picture
from edge_agent.image.maker import ImageSettings

KEY = "midspan"  # of the text in a PNG: a JSON object


def describe_picture(
    settings: ImageSettings,
    model: str,
    index: int,
    with_prompt: bool,
    loras: Sequence[LoraChoice] = (),
) -> dict[str, Any]:
    """How picture `index` of `settings` can be made again."""
    prompts = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt}
    return (prompts if with_prompt else {}) | {
        "model": model,
        "seed": settings.seeds[index],
        "steps": settings.steps,
        "guidance": settings.guidance,
        "scheduler": settings.scheduler,
        "cut": settings.cut,
        "sync": settings.sync,
        "codec_up": settings.codec_up,
        "codec_down": settings.codec_down,
        "reuse": settings.reuse,
        **describe_init_image(settings),
        **({"loras": [f"{lora.path.name}@{lora.scale:g}" for lora in loras]} if loras else {}),
    }


def describe_init_image(settings: ImageSettings) -> dict[str, Any]:
    """What a picture began with, if it was not noise alone: a digest says whether it is at hand."""
    if settings.init_image is None:
        return {}
    return {"init_image": digest_picture(settings.init_image), "strength": settings.strength}


def save_pictures(
    pictures: Sequence[Image], output: Path, descriptions: Sequence[dict[str, Any]] = ()
) -> list[Path]:
    """Write pictures; several get numbers. Raises SettingsError if that cannot be done."""
    files = [output]
    if len(pictures) > 1:
        count = len(pictures)
        files = [output.with_stem(f"{output.stem}-{index}") for index in range(1, count + 1)]
    try:
        for index, (picture, file) in enumerate(zip(pictures, files, strict=True)):
            if descriptions and file.suffix.lower() == ".png":
                info = PngInfo()
                info.add_text(KEY, json.dumps(descriptions[index]))
                picture.save(file, pnginfo=info)
            else:
                picture.save(file)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{output} cannot be written: {error}") from error
    return files
