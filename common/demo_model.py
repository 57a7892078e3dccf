"""Where the models that come with midspan are: in the checkout, or in the installed package."""

from __future__ import annotations

from pathlib import Path

from common.errors import CheckpointError

DEMO_TEXT_MODEL = "stories-llama"
DEMO_IMAGE_MODEL = "landscapes-sdxl"


def find_model(name: str | None) -> Path:
    """The directory of a model: a path as given, or the name of one that comes with midspan."""
    if name is not None and (Path(name).exists() or "/" in name):
        return Path(name)
    wanted = name or DEMO_TEXT_MODEL
    here = Path(__file__).resolve().parent
    places = [here.parent / "models", here / "models"]
    for place in places:
        if (place / wanted).is_dir():
            return place / wanted
    shipped = sorted({p.name for place in places if place.is_dir() for p in place.iterdir()})
    raise CheckpointError(
        f"model {wanted!r} is no directory here and none that comes with midspan "
        f"({', '.join(shipped) or 'none found'}); give a Hugging Face model directory"
    )
