"""`midspan check`: whether a model can be cut, and what its parts need and send."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from common.console.options import dtype_option, lora_option, span_option
from common.console.tables import format_bytes, format_table
from evaluation.options import json_option

if TYPE_CHECKING:
    from common.weights.needs import Needs, PartNeeds

CODEC = "int8"


@click.command()
@click.argument("model", required=False)
@span_option("the middle half")
@lora_option
@dtype_option
@json_option
def check(
    model: str | None, span_text: str | None, loras: tuple[str, ...], dtype: str, as_json: bool
) -> None:
    """Say whether MODEL can be cut, what device and workers need for it, and what is sent.

    Reads its configuration and the headers of its files. A small twin of it, with random weights,
    is run whole and cut; a model whose twin comes out otherwise is refused, here as by all others.
    """
    from common.adapters.choice import parse_choices
    from common.adapters.peft import adapt_text_model
    from common.console.processes import set_up_torch
    from common.spans.cut import parse_cut
    from common.spans.twin_check import check_twin
    from common.weights.checkpoint import Checkpoint
    from common.weights.configuration import context_length, read_config
    from common.weights.demo_model import find_model
    from common.weights.loading import parse_dtype
    from common.weights.needs import measure_needs

    set_up_torch(1)
    checkpoint = Checkpoint(find_model(model))
    adapt_text_model(checkpoint, parse_choices(loras))  # says what does not fit
    config = read_config(checkpoint)
    cut = parse_cut(span_text, config.num_hidden_layers)
    packs = check_twin(config)
    needs = measure_needs(checkpoint, parse_dtype(dtype)).cut(cut)
    facts: dict[str, Any] = {
        "model": checkpoint.name,
        "family": config.model_type,
        "layers": config.num_hidden_layers,
        "span": str(cut.middle),
        "dtype": dtype,
        "context": context_length(config),
        "sessions_together": packs,
        "row_bytes": measure_row(needs.boundary),
        "parts": {
            name: {
                "layers": str(part.span),
                "weight_bytes": part.weight_bytes,
                "kv_bytes_per_token": part.kv_bytes,
                "state_bytes_per_session": part.state_bytes,
            }
            for name, part in _parts(needs)
        },
    }
    click.echo(json.dumps(facts, indent=2) if as_json else describe(facts, needs))


def measure_row(width: int) -> int:
    """Bytes of one boundary row of so many values, with the default codec."""
    import torch

    from common.codecs.codec import make_codec

    rows = torch.linspace(-1, 1, width)[None]
    return len(make_codec(CODEC, "up").encode(rows))


def describe(facts: dict[str, Any], needs: Needs) -> str:
    """What a person wants to know."""
    together = (
        "sessions of many devices share each pass of a worker"
        if facts["sessions_together"]
        else "a worker computes its sessions one after another"
    )
    table = format_table(
        ["part", "layers", "weights", "KV of a token"],
        [
            [name, str(part.span), format_bytes(part.weight_bytes), format_bytes(part.kv_bytes)]
            for name, part in _parts(needs)
        ],
    )
    row = facts["row_bytes"]
    context = facts["context"]
    states = [f"{format_bytes(p.state_bytes)} in the {name}" for name, p in _parts(needs)]
    has_states = any(part.state_bytes for _, part in _parts(needs))
    return "\n".join(
        [
            f"{facts['model']} ({facts['family']}, {facts['layers']} layers) can be cut: a small "
            f"twin of it gives the logits of the whole one; {together}.",
            "",
            table,
            "",
            f"The device has head and tail, a worker the middle, in {facts['dtype']}; KV is kept "
            f"for each token of each session. A token of a prompt sends {format_bytes(row)} up, "
            f"one of an answer as many up {_say_down(facts)} (codec {CODEC}).",
            *(
                [f"A session's state takes {', '.join(states)}, up to four times."]
                if has_states
                else []
            ),
            f"A text has at most {context:,} tokens." if context else "It names no longest text.",
        ]
    )


def _say_down(facts: dict[str, Any]) -> str:
    if not facts["span"].endswith("e"):
        return "and down"
    return "and has its logits, of all the vocabulary or with topK of the likeliest, down"


def _parts(needs: Needs) -> list[tuple[str, PartNeeds]]:
    return [("head", needs.head), ("middle", needs.middle), ("tail", needs.tail)]
