"""Models of llama2.c to Hugging Face directories, and back where llama2.c computes the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from common.errors import CheckpointError, SettingsError
from common.formats.export import write_weights
from common.formats.llama2c import (
    FREQUENCIES,
    Header,
    Llama2cFile,
    Piece,
    list_pieces,
    make_frequencies,
    pack_header,
    write_piece,
)
from common.formats.part_folder import Written, new_folder
from common.formats.tokenizer_bin import (
    BEGIN_ID,
    END_ID,
    TOKENIZER_BIN,
    ScoredTokens,
    read_tokenizer,
    write_tokenizer,
)
from common.spans.parts import full
from common.weights.checkpoint import Checkpoint
from common.weights.configuration import read_config

EPSILON, THETA = 1e-5, 10_000.0  # as llama2.c has them in its source
GROUP_SIZE = 64


def import_llama2c(path: Path, tokenizer: Path, target: Path) -> Written:
    """Write a llama2.c model and its tokenizer as a directory that --model takes.

    Raises CheckpointError for files that are not what they should be.
    """
    file = Llama2cFile(path)
    header = file.header
    tokens = read_tokenizer(tokenizer)
    if len(tokens.pieces) < header.vocabulary:
        raise CheckpointError(
            f"{tokenizer} has {len(tokens.pieces)} tokens; {path} needs {header.vocabulary}"
        )
    own = ScoredTokens(
        tokens.pieces[: header.vocabulary], tokens.scores[: header.vocabulary], tokens.longest
    )
    shapes = {name: piece.shape for name, piece in file.pieces.items()}
    with new_folder(target):
        sizes = write_weights(target, shapes, file.read)
        write_tokenizer(own, target / TOKENIZER_BIN)
        ends = {"bos_token_id": BEGIN_ID, "eos_token_id": [BEGIN_ID, END_ID]}  # run.c stops at both
        for name, content in (
            ("config.json", describe(header)),
            ("generation_config.json", ends),
        ):
            (target / name).write_text(json.dumps(content, indent=2) + "\n")
    return Written(full(header.layers), sizes)


def describe(header: Header) -> dict[str, Any]:
    """The config.json of a Llama that computes what llama2.c does."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": BEGIN_ID,
        "dtype": "float32",
        "eos_token_id": END_ID,
        "head_dim": header.head_size,
        "hidden_act": "silu",
        "hidden_size": header.dim,
        "intermediate_size": header.hidden_dim,
        "max_position_embeddings": header.context,
        "mlp_bias": False,
        "num_attention_heads": header.heads,
        "num_hidden_layers": header.layers,
        "num_key_value_heads": header.kv_heads,
        "rms_norm_eps": EPSILON,
        "rope_parameters": {"rope_theta": THETA, "rope_type": "default"},
        "tie_word_embeddings": header.is_tied,
        "vocab_size": header.vocabulary,
    }


def export_llama2c(checkpoint: Checkpoint, target: Path, version: int) -> Written:
    """Write a Llama as a checkpoint of llama2.c.

    Raises SettingsError for a model that llama2.c would compute otherwise.
    """
    header = make_header(checkpoint, version)
    pieces = list(list_pieces(header))
    for piece in pieces:
        if piece.name != FREQUENCIES:
            check_tensor(checkpoint, piece)
    tables = iter(make_frequencies(header))
    with new_file(target) as file:
        file.write(pack_header(header))
        for piece in pieces:
            is_table = piece.name == FREQUENCIES
            tensor = next(tables) if is_table else checkpoint.read_once(piece.name, torch.float32)
            write_piece(file, piece, tensor, header.head_size)
    return Written(full(header.layers), {target.name: target.stat().st_size})


@contextmanager
def new_file(target: Path) -> Iterator[BinaryIO]:
    """A file to write in the block: there when all of it is, and not before."""
    draft = target.with_name(f"{target.name}.draft")
    try:
        with draft.open("wb") as file:
            yield file
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def check_tensor(checkpoint: Checkpoint, piece: Piece) -> None:
    """Raise CheckpointError unless a tensor is here, with the shape that it must have."""
    if piece.name not in checkpoint.tensor_names:
        raise CheckpointError(f"{checkpoint.directory} has no tensor {piece.name}")
    checkpoint.check_is_here(piece.name)
    if checkpoint.shape(piece.name) != piece.shape:
        raise CheckpointError(
            f"{checkpoint.directory}: tensor {piece.name} has shape "
            f"{checkpoint.shape(piece.name)}; its config.json needs {piece.shape}"
        )


def make_header(checkpoint: Checkpoint, version: int) -> Header:
    """Raises SettingsError for what llama2.c has no place for."""
    config = read_config(checkpoint)
    check_is_plain(checkpoint, config)
    header = Header(
        version, config.hidden_size, config.intermediate_size, config.num_hidden_layers,
        config.num_attention_heads, config.num_key_value_heads, config.vocab_size,
        config.max_position_embeddings, is_tied=config.tie_word_embeddings,
    )  # fmt: skip
    if version < 2:
        return header
    return replace(header, group_size=find_group_size(header))


def find_group_size(header: Header) -> int:
    """64, or the next smaller half that fills rows, as export.py does."""
    size = GROUP_SIZE
    while header.dim % size or header.hidden_dim % size:
        size //= 2
    return size


def check_is_plain(checkpoint: Checkpoint, config: Any) -> None:
    """Raise SettingsError for a model that llama2.c would compute otherwise."""
    rope = getattr(config, "rope_parameters", None) or {}
    found = {
        "model_type": config.model_type,
        "hidden_act": getattr(config, "hidden_act", None),
        "attention_bias": getattr(config, "attention_bias", None),
        "mlp_bias": getattr(config, "mlp_bias", None),
        "rms_norm_eps": getattr(config, "rms_norm_eps", None),
        "rope_type": rope.get("rope_type"),
        "rope_theta": rope.get("rope_theta"),
        "head_dim": getattr(config, "head_dim", None),
    }
    expected = {
        "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "rms_norm_eps": EPSILON, "rope_type": "default", "rope_theta": THETA,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }  # fmt: skip
    for name, want in expected.items():
        if found[name] != want:
            raise SettingsError(
                f"{checkpoint.directory} cannot be a model of llama2.c: {name} is {found[name]!r}, "
                f"and llama2.c computes with {want!r}"
            )


def export_tokenizer(checkpoint: Checkpoint, target: Path) -> None:
    """Write the tokenizer.bin of a model. Raises SettingsError if it has another tokenizer."""
    source = checkpoint.directory / TOKENIZER_BIN
    if not source.is_file():
        raise SettingsError(
            f"{checkpoint.directory} has no {TOKENIZER_BIN}; only models that came from llama2.c do"
        )
    write_tokenizer(read_tokenizer(source), target)
