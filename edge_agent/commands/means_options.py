"""Options that say by which model and which pool, as one argument `means` of the command."""

from __future__ import annotations

import functools
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from common.adapters.choice import parse_choices
from common.console.neuron_options import NeuronOptions, neuron_options
from common.console.options import (
    Command,
    add_options,
    dtype_option,
    lora_option,
    model_option,
    span_option,
    span_seed_option,
    threads_option,
)
from common.security.keys import read_public
from common.weights.demo_model import find_model
from edge_agent.commands.codec_options import CodecChoice, codec_options
from edge_agent.commands.connection_options import SERVED, Connection, connection_options
from edge_agent.commands.draft_options import DraftChoice, draft_options
from edge_agent.commands.question import Means
from edge_agent.commands.run_options import encrypt_option, exact_option, timeout_option
from edge_agent.server.announcement import Route

OPTIONS = add_options(
    model_option,
    lora_option,
    neuron_options,
    span_option(SERVED),
    span_seed_option,
    connection_options,
    encrypt_option,
    codec_options,
    draft_options,
    exact_option,
    dtype_option,
    threads_option,
    timeout_option(60.0),
)


def means_options(command: Command) -> Command:
    """The command gets `means`, which have been checked."""

    @functools.wraps(command)
    def gather(
        *,
        model_name: str | None,
        loras: tuple[str, ...],
        neurons: NeuronOptions,
        span_text: str | None,
        span_seed: int | None,
        connection: Connection,
        pool_key: str | None,
        codecs: CodecChoice,
        drafts: DraftChoice,
        exact: bool,
        dtype: str,
        threads: int | None,
        timeout_s: float,
        tokenizer: Path | None = None,  # not every command has it
        **others: Any,
    ) -> Any:
        means = Means(
            find_model(model_name),
            span_text,
            dtype,
            codecs,
            connection,
            read_public(pool_key) if pool_key else None,
            timeout_s,
            threads,
            _list_given(Route),
            tokenizer,
            parse_choices(loras),
            span_seed,
            neurons.read(),
            drafts,
            exact,
        )
        means.check()
        return command(means=means, **others)

    return OPTIONS(gather)


def _list_given(group: type) -> frozenset[str]:
    """The fields of a group of options that somebody gave, in whatever way."""
    context = click.get_current_context()
    names = [field.name for field in fields(group)]
    return frozenset(
        name for name in names if context.get_parameter_source(name) != ParameterSource.DEFAULT
    )
