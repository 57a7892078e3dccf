"""`midspan calibrate`: measure what calibrated codecs need to know about a cut."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console.options import span_option, threads_option
from common.console.outputs import check_directory
from common.console.waiting import progress_bar, waiting
from evaluation.options import documents_option, text_option, tokens_option, window_option

if TYPE_CHECKING:
    from common.codecs.calibration import Calibration
    from common.spans.cut import Cut
    from common.weights.checkpoint import Checkpoint


@click.command()
@click.argument("model")
@text_option
@span_option("the middle half")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path),
    help="What to write: a directory.  [default: calibration/A-B in the model directory]",
)  # fmt: skip
@tokens_option(20_000)
@window_option(256)
@documents_option
@threads_option
def calibrate(
    model: str,
    text: Path,
    span_text: str | None,
    output: Path | None,
    tokens: int,
    window: int,
    documents: bool,
    threads: int | None,
) -> None:
    """Measure MODEL at one cut for the codecs that need it: compact, smallest, +norm, +predict.

    Runs the whole model with gradients, so it needs the memory for that. Give the directory that it
    writes to edges and workers alike, or leave it in the model directory, where both look.
    """
    from common.codecs.calibration import default_directory, save_calibration
    from common.console.processes import set_up_torch
    from common.spans.cut import parse_cut
    from common.weights.checkpoint import Checkpoint
    from common.weights.demo_model import find_model
    from common.weights.loading import read_config
    from edge_agent.text.tokenizer import TextTokenizer
    from evaluation.texts import read_tokens

    set_up_torch(threads)
    directory = find_model(model)
    checkpoint = Checkpoint(directory)
    cut = parse_cut(span_text, read_config(checkpoint).num_hidden_layers)
    ids = read_tokens(text, TextTokenizer(directory), documents, tokens)
    target = output or default_directory(directory, (cut.begin, cut.end))
    check_directory(target)
    calibration = measure_calibration(checkpoint, cut, ids, window)
    fingerprint = save_calibration(calibration, target)
    click.echo(
        f"calibrated span {cut.middle} of {checkpoint.name} on {calibration.tokens:,} tokens: "
        f"{target} (fingerprint {fingerprint})"
    )


def measure_calibration(
    checkpoint: Checkpoint, cut: Cut, token_ids: list[int], window: int
) -> Calibration:
    """Rows that cross the cut both ways, and gradients of the loss there, over a text."""
    import torch
    from transformers import AutoModelForCausalLM

    from common.codecs.calibration import fit_calibration
    from common.errors import SettingsError
    from common.weights.loading import find_decoder

    with waiting(f"loading {checkpoint.name}"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        ).eval()
    model.requires_grad_(False)
    decoder, layers_name = find_decoder(model, model.config.num_hidden_layers)
    layers = getattr(decoder, layers_name)
    crossing: dict[str, torch.Tensor] = {}

    def catch_up(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        crossing["up"] = arguments[0].detach().requires_grad_(True)
        return (crossing["up"], *arguments[1:])

    def catch_down(_: Any, arguments: tuple[Any, ...], output: Any) -> None:
        rows = output[0] if isinstance(output, tuple) else output
        rows.retain_grad()
        crossing["down"] = rows

    hooks = [
        layers[cut.begin].register_forward_pre_hook(catch_up),
        layers[cut.end - 1].register_forward_hook(catch_down),
    ]
    generator = torch.Generator().manual_seed(0)
    caught: dict[str, list[torch.Tensor]] = {n: [] for n in ("up", "down", "up_grad", "down_grad")}
    windows = [token_ids[at : at + window] for at in range(0, len(token_ids), window)]
    with progress_bar(len(windows), "measuring") as bar:
        for ids in windows:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
            probabilities = torch.softmax(logits.detach(), dim=-1)
            drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
            torch.autograd.backward(loss)
            for name in ("up", "down"):
                grad = crossing[name].grad
                assert grad is not None
                caught[name].append(crossing[name].detach()[0])
                caught[f"{name}_grad"].append(grad[0])
            bar.update(1)
    for hook in hooks:
        hook.remove()
    measured = {name: torch.cat(parts) for name, parts in caught.items()}
    hidden = measured["up"].shape[1]
    if len(token_ids) < 4 * hidden:
        raise SettingsError(
            f"{len(token_ids)} tokens are too few to calibrate {hidden} channels; "
            f"give a longer text or --tokens: at least {4 * hidden}"
        )
    return fit_calibration(checkpoint.fingerprint(), (cut.begin, cut.end), **measured)
