"""`midspan serve`: an OpenAI-compatible endpoint, and with --with-pool the pool behind it too."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from common.adapters.choice import check_used, check_weights, parse_choices
from common.console.inputs import read_text
from common.console.neuron_options import NeuronOptions, neuron_options
from common.console.option_types import COUNT, WorkerRange
from common.console.options import (
    Logs,
    add_options,
    dtype_option,
    group_options,
    image_lora_option,
    image_model_option,
    image_weights_option,
    log_options,
    lora_option,
    model_option,
    span_option,
    span_seed_option,
    threads_option,
    workers_option,
)
from common.console.processes import freeze_loaded_objects, handle_signals, set_up_torch
from common.console.waiting import waiting
from common.errors import BrokerUnavailable, SettingsError
from common.security.keys import is_public, read_public
from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL, find_model
from common.weights.model_files import read_model_config
from edge_agent.commands.codec_options import CodecChoice, codec_options
from edge_agent.commands.connection_options import SERVED, Connection, connection_options
from edge_agent.commands.draft_options import DraftChoice, draft_options
from edge_agent.commands.prompts import read_template
from edge_agent.commands.question import describe_route, describe_source
from edge_agent.commands.run_options import (
    encrypt_option,
    exact_option,
    template_option,
    timeout_option,
)
from edge_agent.server.announcement import Announcement, announced, describe_process

ENDING = (signal.SIGTERM, signal.SIGHUP)  # SIGINT is Python's
REPORT_LIMIT_S = 2.0  # less than importing torch takes


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen, and for whom."""

    host: str
    port: int
    api_key: str | None
    api_key_file: Path | None

    def read_keys(self) -> list[str]:
        """Raises SettingsError for a host that others reach without any."""
        keys = [self.api_key] if self.api_key is not None else []
        if self.api_key_file is not None:
            keys += read_key_file(self.api_key_file)
        if any(not key.strip() or not (key.isascii() and key.isprintable()) for key in keys):
            raise SettingsError("an API key is empty or not printable ASCII")
        if not keys and is_public(f"tcp://{self.host}:{self.port}"):
            raise SettingsError(
                f"--host {self.host} can be reached from other machines; give --api-key-file, "
                "with a key on each line, so that not everybody there can ask"
            )
        return keys


address_options = group_options(
    "address",
    Address,
    click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen."),
    click.option(
        "--port",
        default=8080,
        show_default=True,
        type=click.IntRange(0, 65535),
        help="0 is any that is free.",
    ),
    click.option(
        "--api-key",
        envvar="MIDSPAN_API_KEY",
        show_envvar=True,
        help="What clients must show. As an option, `ps` shows it to everybody here.",
    ),
    click.option("--api-key-file", type=click.Path(path_type=Path), help="Keys, one on each line."),
)
bound_options = add_options(
    click.option(
        "--max-sessions",
        default=64,
        show_default=True,
        type=COUNT,
        help="Sessions at once: answers being made.",
    ),
    click.option(
        "--max-waiting",
        default=1024,
        show_default=True,
        type=click.IntRange(0, 1_000_000),
        help="Answers that wait for their turn; who comes then is told to come back.",
    ),
    click.option(
        "--keep-chats",
        default=16,
        show_default=True,
        type=click.IntRange(0, 1000),
        help="Chats whose KV is kept for the next turn.",
    ),
)


@click.command()
@model_option
@span_option(SERVED)
@span_seed_option
@image_model_option
@lora_option
@neuron_options
@image_weights_option
@image_lora_option
@connection_options
@encrypt_option
@codec_options
@draft_options
@exact_option
@address_options
@click.option("--with-pool", is_flag=True, help="Start Redis, a broker and workers as well.")
@workers_option(WorkerRange(), "; with --with-pool", default="2", show_default=True)
@bound_options
@template_option
@dtype_option
@threads_option
@timeout_option(60.0)
@log_options
def serve(
    model_name: str | None,
    span_text: str | None,
    span_seed: int | None,
    image_model: str | None,
    loras: tuple[str, ...],
    neurons: NeuronOptions,
    image_weights: Path | None,
    image_loras: tuple[str, ...],
    connection: Connection,
    pool_key: str | None,
    codecs: CodecChoice,
    drafts: DraftChoice,
    exact: bool,
    address: Address,
    with_pool: bool,
    worker_range: tuple[int, int],
    max_sessions: int,
    max_waiting: int,
    keep_chats: int,
    chat_template: Path | None,
    dtype: str,
    threads: int | None,
    timeout_s: float,
    logs: Logs,
) -> None:
    """Serve OpenAI's API: chat, completions and images, with the pool's help.

    Texts stay on this device. Rows of numbers leave it, and who holds the model's weights can turn
    those back into the prompt.
    """
    logs.set_up()
    api_keys = address.read_keys()
    neurons.check_files()
    template = read_template(chat_template) if chat_template else None
    if model_name is None and image_model is None:
        image_model = DEMO_IMAGE_MODEL
    directory = find_model(model_name)
    read_model_config(directory)  # complains now, if ever
    images = find_model(image_model) if image_model else None
    check_weights(image_weights, image_model)
    check_used(image_loras, image_model, "--image-lora", "--image-model")
    text_choices, image_choices = parse_choices(loras), parse_choices(image_loras)
    pool_public = read_public(pool_key) if pool_key else None
    connection.check(timeout_s)  # complains of options now, if ever
    source = describe_source(  # before the files are read
        directory, dtype, codecs, text_choices, neurons.read(), exact
    )
    if with_pool:
        check_own_pool()
        check_one_span(span_text)
    asked = None if with_pool or span_text else ask_for_report(connection)
    from edge_agent.server.running import DrainingServer, bind

    least, most = worker_range
    listener = bind(address.host, address.port)
    share = max(1, (os.cpu_count() or 1) // (1 + most * with_pool))
    with waiting("loading libraries"):
        set_up_torch(threads or share, images=images is not None)
        from edge_agent.server.app import make_app
        from edge_agent.server.opening import Bounds, PoolAccess, open_services
        from edge_agent.text.cuts import CutChoice
        from edge_agent.text.ends import load_cuts

    handle_signals(ENDING, end)
    with waiting(f"loading {directory.resolve().name}"):
        report = asked.result() if asked else None
        cuts = load_cuts(directory, span_text, dtype, report, text_choices, neurons.read())
    choice = CutChoice(cuts, span_seed)
    name = cuts[0].name
    with contextlib.ExitStack() as stack:
        access = PoolAccess(connection.endpoints(), connection.keys(), timeout_s, pool_public)
        if with_pool:
            from deploy.pool import PoolSettings
            from deploy.scaling.keeper import kept_pool
            from deploy.scaling.policy import ScalingSettings

            settings = PoolSettings(
                workers=least,
                model=model_name or DEMO_TEXT_MODEL,
                span=str(choice),
                image_model=image_model,
                dtype=dtype,
                threads=share,
                calibration=codecs.calibration,
                loras=loras,
                neuron_options=neurons.to_words(),
                image_loras=image_loras,
                image_weights=image_weights,
            )
            pool = stack.enter_context(kept_pool(settings, ScalingSettings(least, most)))
            access = PoolAccess([pool.edge_endpoint], None, timeout_s, None)
        services = open_services(
            cuts[0], access,
            codecs.read_settings(
                step_deadline_s=timeout_s, draft_tokens=drafts.draft_tokens, exact=exact
            ),
            bounds=Bounds(max_sessions, max_waiting, keep_chats),
            calibration=codecs.find_calibration(*cuts), choose_cut=choice,
            drafters=drafts.open(*cuts), template=template,
            image_model=images, image_loras=image_choices, image_weights=image_weights,
            api_keys=api_keys,
        )  # fmt: skip
        stack.callback(services.close)
        freeze_loaded_objects()
        announcement = Announcement(
            url_of(listener, reachable=True), name, str(choice), source,
            describe_route(list(access.brokers), access.keys, access.pool_key, timeout_s),
            api_keys[0] if api_keys else None, describe_process(),
        )  # fmt: skip

        said = stack.enter_context(contextlib.ExitStack())

        def on_ready() -> None:
            said.enter_context(announced(announcement))
            url = url_of(listener)
            click.echo(f"serving {name} at {url}\na page at {url.removesuffix('/v1')}")
            if with_pool:
                (broker,) = access.brokers
                click.echo(f"its pool, for midspan chat, image and status: --broker {broker}")

        DrainingServer(make_app(services), services.drain, on_ready, said.close).run([listener])
    click.echo("stopped")


def end(*_: object) -> None:
    """Handles a signal. What ends then, such as a pool, is not to be disturbed by another one."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def ask_for_report(connection: Connection) -> Future[dict[str, Any] | None]:
    """The broker's report, or none, asked for while libraries are imported."""

    def ask() -> dict[str, Any] | None:
        client = connection.connect(REPORT_LIMIT_S)
        try:
            return client.status(REPORT_LIMIT_S)
        except BrokerUnavailable:
            return None
        finally:
            client.close()

    thread = ThreadPoolExecutor(1, "midspan-report")
    answer = thread.submit(ask)
    thread.shutdown(wait=False)
    return answer


def url_of(listener: socket.socket, reachable: bool = False) -> str:
    """Where requests go; `reachable` from this machine, where it listens at all its addresses."""
    host, port = listener.getsockname()[:2]
    if reachable:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not bound here
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def check_one_span(span_text: str | None) -> None:
    """Raises SettingsError for more than one, which workers of one kind cannot serve."""
    if span_text is not None and "," in span_text:
        raise SettingsError(f"--with-pool serves one span; --span names {span_text}")


def check_own_pool() -> None:
    """Raises SettingsError for options that name another pool."""
    context = click.get_current_context()
    for name, option in (
        ("brokers", "--broker"), ("key", "--key"), ("broker_key", "--broker-key"),
        ("pool_key", "--encrypt-kv"),
    ):  # fmt: skip
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise SettingsError(
                f"{option} names another pool than --with-pool starts; leave one out"
            )


def read_key_file(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises SettingsError."""
    lines = [line.strip() for line in read_text(path, "--api-key-file").splitlines()]
    keys = [line for line in lines if line]
    if not keys:
        raise SettingsError(f"--api-key-file {path} has no key in it")
    return keys
