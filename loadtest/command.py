"""`midspan loadtest`: many sessions at once against a pool or an endpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import click
from click.core import ParameterSource

from common.console.option_types import COUNT, SEED, FiniteRange, WorkerRange
from common.console.options import (
    group_options,
    image_model_option,
    key_options,
    model_option,
    span_option,
    workers_option,
)
from common.console.outputs import check_writable
from common.console.plots import require_matplotlib
from common.console.processes import set_up_torch
from common.errors import MidspanError, SettingsError
from common.security.keys import load_client_keys
from common.settings import parse_endpoint
from common.weights.demo_model import DEMO_IMAGE_MODEL, find_model
from edge_agent.commands.codec_options import CodecChoice, codec_options
from loadtest.http_stream import parse_url
from loadtest.observed import Observed
from loadtest.pacing import Clock
from loadtest.plot import plot_report
from loadtest.running import Outcome, report_load, run_load
from loadtest.settings import LoadSettings, WorkerCount
from loadtest.slo import Slo, parse_slo
from loadtest.tables import describe_run, format_report

ANSWER_LIMIT_S = 300.0  # without a broker, or without an end of an answer over HTTP

load_options = group_options(
    "settings",
    LoadSettings,
    click.option("--sessions", type=COUNT, help="Sessions, in all.  [default: 64, or --duration]"),
    click.option(
        "--concurrency",
        "concurrency_asked",
        type=COUNT,
        help="Sessions under way, at most.  [default: 8; 256 if they arrive by themselves]",
    ),
    click.option(
        "--prompt-tokens",
        "prompt_text",
        default="16,128",
        show_default=True,
        metavar="N|LOW,HIGH",
        help="Tokens of a prompt, all lengths as likely.",
    ),
    click.option(
        "--tokens",
        "tokens_text",
        default="64",
        show_default=True,
        metavar="N|LOW,HIGH",
        help="Tokens, of each answer.",
    ),
    click.option(
        "--rate",
        type=FiniteRange(1e-3, 1e6),
        help="Sessions arriving per second, at random.  [default: a closed loop]",
    ),
    click.option(
        "--duration",
        "duration_s",
        type=FiniteRange(0.1, 1e7),
        help="Seconds, after which none is begun.",
    ),
    click.option(
        "--warmup",
        "warmup_s",
        default=0.0,
        show_default=True,
        type=FiniteRange(0, 1e7),
        help="Seconds at the beginning that are not counted.",
    ),
    click.option("--seed", default=1, show_default=True, type=SEED, help="Makes it repeatable."),
    click.option(
        "--trace",
        type=click.Path(path_type=Path),
        help='JSON lines {"at": seconds, "prompt_tokens": N, "tokens": N} instead.',
    ),
)


@dataclass(frozen=True, slots=True)
class Whom:
    """Who is asked: a pool of our own, one that runs, or an endpoint."""

    brokers: tuple[str, ...]
    key: Path | None
    broker_key: str | None
    url: str | None
    api_key: str | None
    model_name: str | None
    span_text: str | None
    worker_range: tuple[int, int]
    engines: int
    images: int
    image_model: str | None
    synthetic_ms: float | None
    processes: int
    kill_every_s: float | None
    drain_every_s: float | None

    def check(self) -> None:
        """Raises SettingsError for options that do not go together."""
        if self.url is not None and self.brokers:
            raise SettingsError("--url and --broker name two that are to be asked; give one")
        if self.url is not None and self.model_name is None:
            raise SettingsError("--url wants --model, the name that the endpoint has for it")
        if self.images and (self.url is not None or self.synthetic_ms is not None):
            raise SettingsError("--images goes with a pool's own workers, not --url or --synthetic")
        if self.synthetic_ms is not None and (self.url is not None or self.brokers):
            raise SettingsError("--synthetic is a pool of our own, without --broker and --url")
        harms = self.kill_every_s is not None or self.drain_every_s is not None
        if harms and (self.url is not None or self.brokers):
            raise SettingsError(
                "--kill-every and --drain-every are for a pool of our own, which is started "
                "without --broker and --url"
            )


OF_A_POOL = {
    "key": "--key", "broker_key": "--broker-key", "span_text": "--span", "engines": "--engines",
    "codec": "--codec", "codec_prefill": "--codec-prefill", "codec_decode": "--codec-decode",
    "calibration": "--calibration",
}  # fmt: skip
OF_OUR_POOL = {"worker_range": "--workers"}


def check_idle_options(whom: Whom) -> None:
    """Raises SettingsError for an option on the command line that would do nothing."""
    given = click.get_current_context().get_parameter_source
    idle = {**OF_A_POOL, **OF_OUR_POOL} if whom.url else OF_OUR_POOL if whom.brokers else {}
    for name, option in idle.items():
        if given(name) == ParameterSource.COMMANDLINE:
            whose = "--url asks an endpoint" if whom.url else "--broker names a pool that runs"
            raise SettingsError(f"{whose}: {option} would do nothing there; leave it out")


whom_options = group_options(
    "whom",
    Whom,
    click.option(
        "--broker", "brokers", multiple=True, help="A broker's address.  [default: a pool of ours]"
    ),
    key_options,
    click.option("--url", help="An OpenAI endpoint instead of a pool, as http://HOST:PORT/v1."),
    click.option(
        "--api-key",
        envvar="OPENAI_API_KEY",
        show_envvar=True,
        help="What clients must show, with --url.",
    ),
    model_option,
    span_option("the middle half"),
    workers_option(WorkerRange(), "; of a pool of ours", default="2", show_default=True),
    click.option(
        "--engines",
        default=1,
        show_default=True,
        type=COUNT,
        help="Edges that the sessions are of.",
    ),
    click.option(
        "--images",
        default=0,
        show_default=True,
        type=click.IntRange(0, 64),
        help="Pictures that are painted meanwhile, so many at once.",
    ),
    image_model_option,
    click.option(
        "--synthetic",
        "synthetic_ms",
        type=FiniteRange(0, 1e6),
        metavar="MS",
        help="A stand-in for the model: a batch takes so long, and edges compute nothing.",
    ),
    click.option(
        "--processes",
        default=2,
        show_default=True,
        type=COUNT,
        help="That synthetic workers are in; one is killed or drained as a whole.",
    ),
    click.option(
        "--kill-every",
        "kill_every_s",
        type=FiniteRange(0.1, 1e7),
        help="kill -9 a worker of a pool of ours, every so many seconds.",
    ),
    click.option(
        "--drain-every",
        "drain_every_s",
        type=FiniteRange(0.1, 1e7),
        help="Drain a worker of a pool of ours, every so many seconds.",
    ),
)


@click.command()
@load_options
@whom_options
@codec_options
@click.option("--slo", "slo_text", help="What goodput is, as ttft=2,itl=0.2 in seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, not a table.")
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(path_type=Path),
    help="Write a PNG: latencies, and the course of it.",
)
def loadtest(
    settings: LoadSettings,
    whom: Whom,
    codecs: CodecChoice,
    slo_text: str | None,
    as_json: bool,
    plot_path: Path | None,
) -> None:
    """Put many sessions on a pool and say what they had to wait for.

    Prompts are random tokens, and answers as long as they were asked for. Latencies are counted
    from when a session was due. Exits with 1 if a session failed.
    """
    settings.check()
    whom.check()
    check_idle_options(whom)
    slo = parse_slo(slo_text) if slo_text else None
    check_writable(plot_path)
    if plot_path is not None:
        require_matplotlib()
    ask = ask_endpoint if whom.url is not None else ask_pool
    if whom.synthetic_ms is not None:
        ask = ask_synthetic_pool
    outcome = ask(settings, whom, codecs, slo)
    if plot_path is not None:
        title = describe_run(outcome.report)
        plot_report(outcome.report, outcome.latencies, plot_path, title)
    report = outcome.report
    click.echo(json.dumps(report) if as_json else format_report(report))
    if report["failed"]:
        raise MidspanError(f"{report['failed']} of {report['sessions']} sessions failed")
    if report["images"] and report["images"]["failed"]:
        raise MidspanError(f"{report['images']['failed']} images failed")
    if report["tokens_wrong"]:
        raise MidspanError(f"{report['tokens_wrong']} tokens are wrong")


def ask_endpoint(settings: LoadSettings, whom: Whom, _: CodecChoice, slo: Slo | None) -> Outcome:
    """Over HTTP, without a model of our own."""
    from loadtest.endpoint import EndpointTarget

    assert whom.url is not None
    assert whom.model_name is not None
    target = EndpointTarget(
        parse_url(whom.url), whom.model_name, whom.api_key, settings.seed, ANSWER_LIMIT_S
    )
    answers = run_load(target, Clock(), settings, Observed())
    return report_load(answers, settings, Observed(), slo)


def ask_synthetic_pool(
    settings: LoadSettings, whom: Whom, codecs: CodecChoice, slo: Slo | None
) -> Outcome:
    """Through engines, on workers that have a stand-in for the model."""
    assert whom.synthetic_ms is not None
    directory = find_model(whom.model_name)
    set_up_torch(threads=1)
    from loadtest.pool_load import Brokers, Edges, HarmSettings, load_pool, open_synthetic_pool
    from loadtest.synthetic.model import SyntheticOracle, make_ends, read_shape

    shape = read_shape(directory, whom.span_text)
    edges = Edges(
        make_ends(directory, shape), whom.engines, codecs.read_settings(), None, ANSWER_LIMIT_S,
        SyntheticOracle(),
    )  # fmt: skip
    edges.check(settings)
    count = WorkerCount(*whom.worker_range)
    harm = HarmSettings(whom.kill_every_s, whom.drain_every_s, count)
    with open_synthetic_pool(count, whom.processes, shape, directory, whom.synthetic_ms) as own:
        outcome = load_pool(Brokers([own.edge_endpoint], own=own), edges, settings, harm, slo)
    outcome.report["synthetic"] = {
        "ms": whom.synthetic_ms, "per": "batch", "edges": "compute nothing",
        "model": shape.name, "processes": whom.processes,
    }  # fmt: skip
    return outcome


def ask_pool(settings: LoadSettings, whom: Whom, codecs: CodecChoice, slo: Slo | None) -> Outcome:
    """Through engines, on a pool that runs or one that is started for it."""
    addresses = [parse_endpoint(broker, "--broker") for broker in whom.brokers]
    keys = load_client_keys(whom.key, whom.broker_key)
    directory = find_model(whom.model_name)
    set_up_torch(threads=1)
    from deploy.pool import LocalPool, PoolSettings
    from edge_agent.text.ends import load_ends
    from loadtest.pool_load import (
        Brokers,
        Edges,
        HarmSettings,
        ImageLoad,
        load_pool,
    )

    ends = load_ends(directory, whom.span_text)
    edges = Edges(
        ends, whom.engines, codecs.read_settings(), codecs.find_calibration(ends), ANSWER_LIMIT_S
    )
    edges.check(settings)
    count = WorkerCount(*whom.worker_range)
    harm = HarmSettings(whom.kill_every_s, whom.drain_every_s, count)
    images = None
    if whom.images:
        images = ImageLoad(whom.images, find_model(whom.image_model or DEMO_IMAGE_MODEL))
    if addresses:
        return load_pool(Brokers(addresses, keys), edges, settings, harm, slo, images)
    pool_settings = PoolSettings(
        workers=count.least, model=str(directory), span=str(ends.cut.middle),
        calibration=codecs.calibration,
        image_model=str(images.directory) if images else None,
    )  # fmt: skip
    with LocalPool(pool_settings) as own:
        pool = Brokers([own.edge_endpoint], own=own)
        return load_pool(pool, edges, settings, harm, slo, images)
