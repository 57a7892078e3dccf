"""Tensors of image steps as bytes: each is a matrix to its codec, with one row per channel.

(n, C, h, w) becomes (n C, h w), so a codec's `token` granularity, the default, is one scale for
each channel of each image, and `tensor` one for all. What steers the picture and is sent once
(prompt embeddings, latents that are handed over) goes as it is, in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from torch import Tensor

from common.codecs.codec import Codec, make_codec
from common.codecs.lambda_split import PREFIX, LambdaSplitCodec
from common.codecs.spec import EXACT, parse_codec
from common.errors import ProtocolError, SettingsError
from common.protocol.messages import Part

MAX_VALUES = 1 << 28


@functools.lru_cache(maxsize=64)
def make_image_codec(name: str) -> Codec | LambdaSplitCodec:
    """A codec by name; besides those for text there are Lambda-Split's. Raises SettingsError."""
    return LambdaSplitCodec(name) if name.startswith(PREFIX) else make_codec(name, "up")


def check_image_codec(name: str) -> None:
    """Raises SettingsError for a codec that has no sense for images."""
    if name.startswith(PREFIX):
        make_image_codec(name)
        return
    spec = parse_codec(name)
    if spec.needs_calibration:
        raise SettingsError(
            f"codec {name!r} is calibrated on a language model and does not go with images; "
            "take one that is not, as int8, int6 or int4"
        )
    make_image_codec(name)
    if spec.granularity == "channel":
        raise SettingsError(
            f"codec {name!r}: for images a row is a channel, so `token` (the default) is per "
            "channel; expected token, tensor or group:G"
        )


def encode_tensor(tensor: Tensor, codec: str) -> bytes:
    """Encode a tensor of any shape. Raises NonFiniteError if a value has no code."""
    return make_image_codec(codec).encode(_as_matrix(tensor))


def decode_tensor(body: bytes, shape: Sequence[int], codec: str) -> Tensor:
    """Decode into float32. Raises ProtocolError or NonFiniteError."""
    if not all(shape) or math.prod(shape) > MAX_VALUES:
        raise ProtocolError(f"a tensor has shape {list(shape)}; at most {MAX_VALUES} values")
    rows, columns = _matrix_shape(shape)
    decoder = make_image_codec(codec)
    decoder.check_body(len(body), rows, columns)
    return decoder.decode(body, rows, columns).view(*shape)


def pack_tensors(
    tensors: dict[str, Tensor], codecs: dict[str, str], names: list[str]
) -> tuple[list[Part], bytes]:
    """A step's tensors, by name, each with its codec (EXACT if none is given), and the body.

    `names` are the opening's codecs.
    """
    parts, bodies = [], []
    for name, tensor in tensors.items():
        codec = codecs.get(name, EXACT)
        body = encode_tensor(tensor, codec)
        parts.append(Part(names.index(codec), list(tensor.shape), len(body), name))
        bodies.append(body)
    return parts, b"".join(bodies)


def unpack_tensors(parts: list[Part], body: bytes, names: list[str]) -> dict[str, Tensor]:
    """The reverse. Raises ProtocolError or NonFiniteError."""
    announced = sum(part.body_bytes for part in parts)
    if len(body) != announced:
        raise ProtocolError(f"body has {len(body)} bytes; its tensors need {announced}")
    tensors: dict[str, Tensor] = {}
    at = 0
    for part in parts:
        if part.codec >= len(names):
            raise ProtocolError(f"step names a codec beyond the {len(names)} it opened")
        piece = body[at : at + part.body_bytes]
        tensors[part.name] = decode_tensor(piece, part.shape, names[part.codec])
        at += part.body_bytes
    return tensors


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) == 4:
        return shape[0] * shape[1], shape[2] * shape[3]
    return math.prod(shape[:-1]), shape[-1]


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().reshape(*_matrix_shape(tensor.shape))


def to_blob(tensors: dict[str, Tensor]) -> bytes:
    """For the store."""
    from safetensors.torch import save

    blob: bytes = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return blob


def from_blob(blob: bytes) -> dict[str, Tensor]:
    """The reverse; empty if the blob is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(blob) if blob else {}
    except (SafetensorError, ValueError):
        return {}
