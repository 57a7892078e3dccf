"""`midspan model`: parts of a model as files, and models of other formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.console.options import span_option, tokenizer_option
from common.console.outputs import check_writable
from common.console.tables import format_bytes, format_table
from common.errors import SettingsError

if TYPE_CHECKING:
    from common.formats.part_folder import Written
    from common.spans.parts import Parts
    from common.weights.checkpoint import Checkpoint

DEVICE, WORKER = "device", "worker"
output_option = click.option(
    "-o",
    "--output",
    "target",
    required=True,
    type=click.Path(path_type=Path),
    help="What to write: a new folder, or a file with --to.",
)


@click.group()
def model() -> None:
    """Take a model apart, and convert it.

    \b
    midspan model part ./Qwen2-7B --span 7-21 -o device        what a device needs
    midspan model part ./Qwen2-7B --span 7-21 --side worker -o worker
    midspan worker --model ./worker        midspan ask "..." --model ./device
    midspan model export ./Qwen2-7B --parts "b 0-5 30-35 e" -o some
    midspan model export ./parts --format safetensors -o whole
    """


@model.command()
@click.argument("model_name", metavar="MODEL")
@span_option("the middle half")
@click.option(
    "--side",
    type=click.Choice([DEVICE, WORKER]),
    default=DEVICE,
    show_default=True,
    help="Whose part of the model it is.",
)
@output_option
def part(model_name: str, span_text: str | None, side: str, target: Path) -> None:
    """Write the folder that a device, or a worker, needs of MODEL.

    It has the fingerprint of the whole model, and --model takes it like one.
    """
    from common.spans.cut import parse_cut
    from common.spans.parts import ends_of, middle_of

    checkpoint, num_layers = open_model(model_name)
    cut = parse_cut(span_text, num_layers)
    parts = ends_of(cut, num_layers) if side == DEVICE else middle_of(cut)
    write(checkpoint, parts, "parts", target)


@model.command("export")
@click.argument("model_name", metavar="MODEL")
@click.option(
    "--parts",
    "words",
    default="f",
    show_default=True,
    help="Parts of the model: b for its beginning, layers as a-b, e for its end, or f for all.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["parts", "pth", "safetensors"]),
    default="parts",
    show_default=True,
    help="A file for each part, the same for torch's loader, or one Hugging Face directory.",
)
@output_option
def export_command(model_name: str, words: str, format_: str, target: Path) -> None:
    """Write MODEL in files of another format.

    It may be stored as safetensors, .bin or .pth, in one file, several, or a folder of parts.
    """
    from common.spans.parts import read_parts

    checkpoint, num_layers = open_model(model_name)
    write(checkpoint, read_parts(words, num_layers), format_, target)


@model.command()
@click.argument("source", metavar="MODEL", type=click.Path(path_type=Path))
@tokenizer_option("the one to read, or with --to the one to write")
@click.option("--to", type=click.Choice(["llama2c"]), help="Write this instead of a directory.")
@click.option(
    "--version",
    type=click.IntRange(0, 2),
    default=0,
    show_default=True,
    help="Of llama2.c's files: 0 is what run reads, 2, in int8, what runq reads.",
)
@output_option
def convert(
    source: Path, tokenizer: Path | None, to: str | None, version: int, target: Path
) -> None:
    """Make a directory that --model takes of MODEL, a file; with --to the reverse.

    The file is one of llama2.c, whose tokenizer is taken over to the last id, or a GGUF of a kind
    that transformers reads.
    """
    if to is None:
        click.echo(import_file(source, tokenizer, target))
    else:
        click.echo(export_file(str(source), tokenizer, version, target))


def import_file(source: Path, tokenizer: Path | None, target: Path) -> str:
    """What has been written."""
    from common.console.processes import set_up_torch

    if not source.is_file():
        raise SettingsError(f"{source} is no file; expected one of llama2.c, or a GGUF")
    set_up_torch(1)
    from common.formats.gguf_conversion import import_gguf, is_gguf
    from common.formats.llama2c_conversion import import_llama2c
    from common.weights.checkpoint import Checkpoint

    if is_gguf(source):
        if tokenizer is not None:
            raise SettingsError(f"--tokenizer does not go with {source}, which has one inside")
        written = import_gguf(source, target)
    elif tokenizer is None:
        raise SettingsError(f"{source} needs the --tokenizer that it was trained with")
    else:
        written = import_llama2c(source, tokenizer, target)
    return describe(written, Checkpoint(target), target)


def export_file(source: str, tokenizer: Path | None, version: int, target: Path) -> str:
    """What has been written."""
    check_targets(target, tokenizer)
    checkpoint, _ = open_model(source)
    from common.formats.llama2c_conversion import export_llama2c, export_tokenizer

    if tokenizer is not None:
        export_tokenizer(checkpoint, tokenizer)
    written = export_llama2c(checkpoint, target, version)
    return f"{target} holds {checkpoint.name}, {format_bytes(sum(written.file_bytes.values()))}."


def check_targets(target: Path, tokenizer: Path | None) -> None:
    """Refuse a device or a pipe, which a file would replace, and one file for both.

    Raises SettingsError, CheckpointError.
    """
    from common.weights.model_files import check_plain_file

    for file in (target, tokenizer):
        if file is not None:
            check_plain_file(file)
    if target == tokenizer:
        raise SettingsError(f"--output and --tokenizer are both {target}; expected two files")
    check_writable(target, tokenizer)


def open_model(name: str) -> tuple[Checkpoint, int]:
    """A model, and how many layers it has. Raises CheckpointError."""
    from common.console.processes import set_up_torch

    set_up_torch(1)
    from common.weights.checkpoint import Checkpoint
    from common.weights.configuration import read_config
    from common.weights.demo_model import find_model

    checkpoint = Checkpoint(find_model(name))
    return checkpoint, read_config(checkpoint).num_hidden_layers


def write(checkpoint: Checkpoint, parts: Parts, format_: str, target: Path) -> None:
    """Write parts, and say what has been written."""
    from common.formats.export import export

    written = export(checkpoint, parts, format_, target)
    click.echo(describe(written, checkpoint, target))


def describe(written: Written, checkpoint: Checkpoint, target: Path) -> str:
    """The files, and how to go on."""
    rows = [(name, format_bytes(size)) for name, size in written.file_bytes.items()]
    total = format_bytes(sum(written.file_bytes.values()))
    return "\n".join(
        [
            format_table(("file", "size"), rows),
            "",
            f"{target} holds {written.parts} of {checkpoint.name}, {total} "
            f"(fingerprint {checkpoint.fingerprint()}).",
        ]
    )
