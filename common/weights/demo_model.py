"""Where the models that come with midspan are: in the checkout, or in the installed package."""

from __future__ import annotations

from pathlib import Path

from common.errors import CheckpointError

DEMO_TEXT_MODEL = "stories-llama"
DEMO_IMAGE_MODEL = "landscapes-sdxl"


def find_model(name: str | None) -> Path:
    """The directory of a model: a path as given, or the name of one that comes with midspan.

    Such a name means ours, also where a directory is called the same: both sides of a pool have it
    as their default, and would else take what happens to lie where they were started. With a
    slash it is a path.
    """
    if name is not None and "/" in name:
        return Path(name)
    common = Path(__file__).resolve().parents[1]
    places = [common / "models", common.parent / "models"]  # installed, or in the checkout
    place = next((place for place in places if place.is_dir()), None)
    shipped = {path.name: path for path in place.iterdir()} if place else {}
    wanted = name or DEMO_TEXT_MODEL
    if wanted in shipped:
        return shipped[wanted]
    if _exists(Path(wanted)):
        return Path(wanted)
    raise CheckpointError(
        f"model {wanted!r} is no directory here and none that comes with midspan "
        f"({', '.join(sorted(shipped)) or 'none found'}); give a Hugging Face model directory"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False
