"""The picture that another one begins with: read, and made as large as it shall be."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import SettingsError

SIDE_MULTIPLE = 8  # the pipeline's own rule
MAX_PIXELS = 1 << 22  # workers take no larger latents
MAX_READ_PIXELS = 1 << 25  # of a file, which has to be decoded whole
DEFAULT_STRENGTH = 0.3  # diffusers' own


def read_picture(source: Path | IO[bytes], what: str) -> Image.Image:
    """A picture as it is to be looked at, in RGB. Raises SettingsError, which names it `what`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as opened:
                if opened.width * opened.height > MAX_READ_PIXELS:
                    raise ValueError(f"it has more than {MAX_READ_PIXELS} pixels")
                picture = ImageOps.exif_transpose(opened)
                if picture.has_transparency_data:
                    picture = picture.convert("RGBA")
                    ground = Image.new("RGBA", picture.size, "white")
                    picture = Image.alpha_composite(ground, picture)
                return picture.convert("RGB")
    except (
        OSError, ValueError, SyntaxError, UnidentifiedImageError,
        Image.DecompressionBombError, Image.DecompressionBombWarning,
    ) as error:  # fmt: skip
        raise SettingsError(f"{what} cannot be read as a picture: {error}") from error


def fit_picture(picture: Image.Image, width: int | None, height: int | None) -> Image.Image:
    """As large as is wanted, else as it is but for a few pixels: sides are multiples of 8.

    Resized as diffusers does it. Raises SettingsError for one that is too large or too small.
    """
    size = (
        width or picture.width // SIDE_MULTIPLE * SIDE_MULTIPLE,
        height or picture.height // SIDE_MULTIPLE * SIDE_MULTIPLE,
    )
    if not all(size) or size[0] * size[1] > MAX_PIXELS:
        raise SettingsError(
            f"the init image has {picture.width} x {picture.height} pixels; expected sides of "
            f"{SIDE_MULTIPLE} or more and {MAX_PIXELS} pixels in all, or the size that it shall get"
        )
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def digest_picture(picture: Image.Image) -> str:
    """16 hex digits of its size and pixels."""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:16]
