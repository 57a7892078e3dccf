"""GGUF files to Hugging Face directories, as far as transformers reads them.

The library's own tables say which tensor is which and undo what llama.cpp did to them; quantized
weights become float32. Its loader for models asks for another package and has room for all of a
model twice, so its reader is called by itself. What it passes over in silence is refused here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.errors import CheckpointError, SettingsError, in_one_line
from common.formats.export import write_weights
from common.formats.part_folder import Written, new_folder
from common.formats.part_tensors import find_part_tensors
from common.spans.parts import full
from common.weights.checkpoint import Checkpoint
from common.weights.model_files import check_plain_file
from common.weights.shapes import build_without_values

MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether a file begins as one does."""
    check_plain_file(path)
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def import_gguf(path: Path, target: Path) -> Written:
    """Write a GGUF model with its tokenizer as a directory that --model takes.

    Raises SettingsError where the package is missing, CheckpointError for what cannot be read.
    """
    check_frequencies(path)
    options = {"gguf_file": path.name, "local_files_only": True}
    with new_folder(target):
        try:
            config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False, **options)
            tensors = read_tensors(path, config)
            tokenizer = AutoTokenizer.from_pretrained(
                path.parent, trust_remote_code=False, **options
            )
        except Exception as error:  # of whatever class, for a file that anybody may have made
            raise CheckpointError(
                f"{path}: transformers cannot read it: {in_one_line(error)}"
            ) from error
        config.dtype = "float32"
        config.save_pretrained(target)
        tokenizer.save_pretrained(target)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        sizes = write_weights(target, shapes, tensors.__getitem__)
        layers = find_part_tensors(Checkpoint(target)).layers  # says what is missing, if anything
    return Written(full(layers), sizes)


def read_tensors(path: Path, config: Any) -> dict[str, Any]:
    """Tensors by today's names, float32."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    causal_lm = build_without_values(
        lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    )
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=causal_lm)
    tensors: dict[str, Any] = read["tensors"]
    return tensors


def check_frequencies(path: Path) -> None:
    """Raise CheckpointError for rotary frequencies of a kind that transformers passes over."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise SettingsError(
            f"{path} is a GGUF file, which needs another package: pip install 'midspan[gguf]'"
        ) from error
    try:
        reader = GGUFReader(path)
        tables = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
        scaled = [name for name in reader.fields if ".rope.scaling." in name]
    except Exception as error:  # it raises what it meets
        raise CheckpointError(f"{path} is no readable GGUF file: {in_one_line(error)}") from error
    if tables or scaled:
        raise CheckpointError(
            f"{path} scales its rotary frequencies ({', '.join((tables + scaled)[:3])}), which "
            "transformers does not read from such files; the model would compute otherwise"
        )
