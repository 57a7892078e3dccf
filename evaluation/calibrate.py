"""`midspan calibrate`: measure what calibrated codecs need to know about a cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console.options import span_option, threads_option
from common.console.outputs import check_directory
from common.console.waiting import waiting
from evaluation.options import documents_option, text_option, tokens_option, window_option
from evaluation.progress import counted_work

if TYPE_CHECKING:
    from torch import Tensor

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
@tokens_option(40_000)
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

    Half of the text is measured; on the other half the step of smallest is searched, so that it
    costs 1% of perplexity. Runs the whole model with gradients, so it needs the memory for that.
    Give the directory that it writes to edges and workers alike, or leave it in the model
    directory, where both look.
    """
    from common.codecs.calibration import default_directory, save_calibration
    from common.console.processes import set_up_torch
    from common.spans.cut import parse_cut
    from common.weights.checkpoint import Checkpoint
    from common.weights.configuration import read_config
    from common.weights.demo_model import find_model
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
        f"calibrated span {cut.middle} of {checkpoint.name} on {len(ids):,} tokens: "
        f"{target} (fingerprint {fingerprint})"
    )
    click.echo(describe_budget(calibration))


def describe_budget(calibration: Calibration) -> str:
    """What became of the promise of `smallest`."""
    from common.codecs.spec import PROMISED_LOSS
    from evaluation.step_search import FEWEST_TOKENS

    if calibration.smallest_budget is None:
        return (
            f"too short to search the step of smallest: {FEWEST_TOKENS:,} tokens more than are "
            "measured; it is as fisher0.01+predict"
        )
    return (
        f"smallest: as fisher{calibration.smallest_budget:.3g}+predict, for a loss of "
        f"{PROMISED_LOSS:.0%} of perplexity"
    )


def measure_calibration(
    checkpoint: Checkpoint, cut: Cut, token_ids: list[int], window: int
) -> Calibration:
    """What `fit_calibration` says of a text's first half, and on the rest the step of `smallest`.

    Raises SettingsError for a text too short.
    """
    from common.codecs.calibration import fit_calibration
    from common.weights.configuration import context_length
    from common.weights.whole_model import find_decoder
    from evaluation.step_search import (
        FEWEST_TOKENS,
        ROUNDS,
        CodedModel,
        choose_windows,
        find_budget,
    )

    model = load_whole_model(checkpoint)
    decoder, layers_name = find_decoder(model, model.config.num_hidden_layers)
    layers = getattr(decoder, layers_name)
    least = 4 * getattr(model.config.get_text_config(), "hidden_size", 0)
    fitted = min(len(token_ids), max(least, len(token_ids) // 2))
    measured = measure_crossing(model, layers, cut, token_ids[:fitted], window)
    calibration = fit_calibration(checkpoint.fingerprint(), (cut.begin, cut.end), **measured)
    rest, context = token_ids[fitted:], context_length(model.config)
    if len(rest) < FEWEST_TOKENS:
        return calibration
    with counted_work(ROUNDS * len(choose_windows(len(rest), context)), "searching") as bar:
        coded = CodedModel(model, layers, calibration)
        return replace(calibration, smallest_budget=find_budget(coded, rest, context, bar.update))


def load_whole_model(checkpoint: Checkpoint) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with waiting(f"loading {checkpoint.name}"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        ).eval()
    model.requires_grad_(False)
    return model


def measure_crossing(
    model: Any, layers: Any, cut: Cut, token_ids: list[int], window: int
) -> dict[str, Tensor]:
    """Rows that cross the cut both ways, and gradients of the loss there, as `fit_calibration` has.

    Raises SettingsError for a text too short.
    """
    import torch

    from common.errors import SettingsError
    from evaluation.texts import cut_windows

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
    windows = cut_windows(token_ids, window)
    with counted_work(len(windows), "measuring") as bar:
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
    return measured
