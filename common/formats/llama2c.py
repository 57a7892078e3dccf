"""The checkpoints of llama2.c: a header, then the tensors one after another, by kind and layer.

Version 0 is the oldest, without a name of its own; 1 and 2 begin with `ak42`. Version 2 has int8
values with a float32 scale for each group of them. Described by export.py, run.c and runq.c of
github.com/karpathy/llama2.c.

Its rotary embeddings turn neighbouring values of a head, those of Hugging Face's Llama the two
halves of it, so the rows of queries and keys stand in another order here and there.

Letters: D dim, F hidden_dim, V vocabulary, H a head's size.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from common.errors import CheckpointError

MAGIC = 0x616B3432  # "ak42", read as a number
NUMBERS = struct.Struct("<7i")
V0_BYTES, HEADER_BYTES = 28, 256
VERSIONS = (0, 1, 2)
MOST = {
    "dim": 1 << 17, "hidden_dim": 1 << 19, "layers": 1024, "heads": 1 << 12, "kv_heads": 1 << 12,
    "vocabulary": 1 << 22, "context": 1 << 22,
}  # fmt: skip
LAYER = "model.layers.{}."
EMBEDDINGS, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
ATTENTION_NORM, FFN_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
QUERY, KEY = "self_attn.q_proj.weight", "self_attn.k_proj.weight"
VALUE, OUT = "self_attn.v_proj.weight", "self_attn.o_proj.weight"
W1, W2, W3 = "mlp.gate_proj.weight", "mlp.down_proj.weight", "mlp.up_proj.weight"
FREQUENCIES = ""  # tables that every program computes by itself


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of its model. `group_size` is of version 2 only."""

    version: int
    dim: int
    hidden_dim: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    is_tied: bool
    group_size: int = 0

    @property
    def head_size(self) -> int:
        return self.dim // self.heads

    @property
    def byte_count(self) -> int:
        """Of the header itself."""
        return HEADER_BYTES if self.version else V0_BYTES


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor in a file: its name at Hugging Face, its shape, and where it begins."""

    name: str
    shape: tuple[int, ...]
    start: int  # bytes
    group_size: int  # 0: float32

    @property
    def byte_count(self) -> int:
        size = math.prod(self.shape)
        return size + 4 * (size // self.group_size) if self.group_size else 4 * size


class Llama2cFile:
    """An open checkpoint. Raises CheckpointError for what is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else None
        if self._bytes is None or len(self._bytes) < V0_BYTES:
            raise CheckpointError(f"{path} is too short for a checkpoint of llama2.c")
        self.header = read_header(bytes(self._bytes[:HEADER_BYTES]), path)
        pieces = list(list_pieces(self.header))
        want = pieces[-1].start + pieces[-1].byte_count
        if len(self._bytes) != want:
            raise CheckpointError(
                f"{path} has {len(self._bytes):,} bytes; its header, of version "
                f"{self.header.version} with {self.header.layers} layers of {self.header.dim}, "
                f"makes it {want:,}"
            )
        self.pieces = {piece.name: piece for piece in pieces if piece.name != FREQUENCIES}

    def read(self, name: str) -> Tensor:
        """A tensor, float32, as Hugging Face's Llama has it."""
        piece = self.pieces[name]
        assert self._bytes is not None
        data = self._bytes[piece.start : piece.start + piece.byte_count].tobytes()
        values = _dequantize(data, piece) if piece.group_size else np.frombuffer(data, "<f4")
        tensor = torch.from_numpy(values.astype(np.float32)).view(piece.shape)
        return _to_halves(tensor, self.header.head_size) if is_rotated(name) else tensor


def read_header(data: bytes, path: Path) -> Header:
    """Raises CheckpointError for numbers that no model has."""
    version, group_size = 0, 0
    if struct.unpack_from("<I", data)[0] != MAGIC:
        numbers = list(NUMBERS.unpack_from(data))
        is_tied = numbers[5] > 0  # a classifier of its own is a vocabulary below zero
        numbers[5] = abs(numbers[5])
    else:
        if len(data) < HEADER_BYTES:
            raise CheckpointError(f"{path} ends within its header")
        version = struct.unpack_from("<i", data, 4)[0]
        if version not in (1, 2):
            raise CheckpointError(f"{path} is of version {version}; known are {VERSIONS}")
        numbers = list(NUMBERS.unpack_from(data, 8))
        is_tied = bool(data[36])
        group_size = struct.unpack_from("<i", data, 37)[0] if version == 2 else 0
    header = Header(
        version, numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6],
        is_tied=is_tied, group_size=group_size,
    )  # fmt: skip
    _check_header(header, path)
    return header


def _check_header(header: Header, path: Path) -> None:
    for name, most in MOST.items():
        value = getattr(header, name)
        if not 0 < value <= most:
            raise CheckpointError(
                f"{path} is no checkpoint of llama2.c: its header gives {name} as {value}; "
                f"expected 1 to {most}"
            )
    if header.dim % header.heads or header.head_size % 2 or header.heads % header.kv_heads:
        raise CheckpointError(
            f"{path}: {header.dim} values do not make {header.heads} heads of an even size, of "
            f"which {header.kv_heads} have keys"
        )
    if header.version == 2:
        check_group_size(header, path)


def check_group_size(header: Header, path: Path) -> None:
    """Raise CheckpointError unless every row is whole groups."""
    size = header.group_size
    if size <= 0 or header.dim % size or header.hidden_dim % size:
        raise CheckpointError(
            f"{path}: groups of {size} do not fill rows of {header.dim} and {header.hidden_dim}"
        )


def list_pieces(header: Header) -> Iterator[Piece]:
    """A file's tensors in their order."""
    start = header.byte_count
    for name, shape in _order_v0(header) if header.version == 0 else _order(header):
        grouped = header.version == 2 and len(shape) == 2
        piece = Piece(name, shape, start, header.group_size if grouped else 0)
        yield piece
        start += piece.byte_count


Named = Iterator[tuple[str, tuple[int, ...]]]


def _order_v0(header: Header) -> Named:
    yield EMBEDDINGS, (header.vocabulary, header.dim)
    yield from _each_layer(header, ATTENTION_NORM, QUERY, KEY, VALUE, OUT, FFN_NORM, W1, W2, W3)
    yield FINAL_NORM, (header.dim,)
    for _ in ("cosines", "sines"):
        yield FREQUENCIES, (header.context, header.head_size // 2)
    if not header.is_tied:
        yield LM_HEAD, (header.vocabulary, header.dim)


def _order(header: Header) -> Named:
    yield from _each_layer(header, ATTENTION_NORM, FFN_NORM)
    yield FINAL_NORM, (header.dim,)
    yield EMBEDDINGS, (header.vocabulary, header.dim)
    yield from _each_layer(header, QUERY, KEY, VALUE, OUT, W1, W2, W3)
    if not header.is_tied:
        yield LM_HEAD, (header.vocabulary, header.dim)


def _each_layer(header: Header, *kinds: str) -> Named:
    """Tensors of these kinds, each kind over all layers."""
    wide, narrow = header.dim, header.kv_heads * header.head_size
    shapes = {
        ATTENTION_NORM: (wide,), FFN_NORM: (wide,),
        QUERY: (wide, wide), KEY: (narrow, wide), VALUE: (narrow, wide), OUT: (wide, wide),
        W1: (header.hidden_dim, wide), W2: (wide, header.hidden_dim), W3: (header.hidden_dim, wide),
    }  # fmt: skip
    for kind in kinds:
        for index in range(header.layers):
            yield LAYER.format(index) + kind, shapes[kind]


def is_rotated(name: str) -> bool:
    """Whether a tensor's rows are turned by rotary embeddings."""
    return name.endswith((QUERY, KEY))


def _to_halves(weight: Tensor, head_size: int) -> Tensor:
    """Rows (heads * H, D) of which neighbours are turned together, so that the halves are."""
    return _reorder(weight, head_size, (head_size // 2, 2))


def to_neighbours(weight: Tensor, head_size: int) -> Tensor:
    """The other way round."""
    return _reorder(weight, head_size, (2, head_size // 2))


def _reorder(weight: Tensor, head_size: int, halves: tuple[int, int]) -> Tensor:
    heads = weight.shape[0] // head_size
    return weight.view(heads, *halves, -1).transpose(1, 2).reshape(weight.shape)


def _dequantize(data: bytes, piece: Piece) -> Any:
    """float32, in rows of a group each."""
    size = math.prod(piece.shape)
    codes = np.frombuffer(data, np.int8, size).reshape(-1, piece.group_size)
    scales = np.frombuffer(data, "<f4", offset=size)
    return codes.astype(np.float32) * scales[:, None]


def pack_header(header: Header) -> bytes:
    """The bytes that a file begins with."""
    vocabulary = header.vocabulary
    if header.version == 0 and not header.is_tied:
        vocabulary = -vocabulary
    numbers = NUMBERS.pack(
        header.dim, header.hidden_dim, header.layers, header.heads, header.kv_heads, vocabulary,
        header.context,
    )  # fmt: skip
    if header.version == 0:
        return numbers
    flags = struct.pack("<B", header.is_tied)
    if header.version == 2:
        flags += struct.pack("<i", header.group_size)
    begin = struct.pack("<Ii", MAGIC, header.version) + numbers + flags
    return begin.ljust(HEADER_BYTES, b"\0")


def write_piece(file: BinaryIO, piece: Piece, tensor: Tensor, head_size: int) -> None:
    """Write a tensor, as Hugging Face's Llama has it, the way a file has it."""
    tensor = tensor.float()
    if is_rotated(piece.name):
        tensor = to_neighbours(tensor, head_size)
    if not piece.group_size:
        file.write(tensor.contiguous().numpy().astype("<f4").tobytes())
        return
    groups = tensor.reshape(-1, piece.group_size)
    scales = groups.abs().amax(dim=1) / 127
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (groups / divisors[:, None]).round().to(torch.int8)
    file.write(codes.numpy().tobytes())
    file.write(scales.numpy().astype("<f4").tobytes())


def make_frequencies(header: Header) -> tuple[Tensor, Tensor]:
    """The tables of cosines and sines, (context, H/2), that a file of version 0 holds."""
    exponents = torch.arange(0, header.head_size, 2).float() / header.head_size
    angles = torch.outer(torch.arange(header.context).float(), 1 / 10000.0**exponents)
    return angles.cos(), angles.sin()
