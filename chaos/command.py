"""`midspan chaos`: break a real pool on a seeded schedule and compare every token.

Sessions generate over and over while workers are killed, paused and drained, links to them are cut,
slow, double, reorder or garble what they carry, the broker is restarted, and Redis is emptied,
filled up, paused and restarted. Every answer is compared with that of an undisturbed run of the
same prompt.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import click

from chaos.saboteur import HarmedPool, Saboteur
from common.console.option_types import COUNT, SEED, FiniteRange, WorkerRange
from common.console.options import (
    group_options,
    model_option,
    new_tokens_option,
    span_option,
    workers_option,
)
from common.console.renamed import RenamedOption
from common.console.tables import format_table
from common.errors import BrokerUnavailable, MidspanError, SettingsError
from deploy.pool import LocalPool, PoolSettings
from edge_agent.commands.draft_options import DraftChoice, draft_options

if TYPE_CHECKING:
    from edge_agent.engine.engine import Engine
    from edge_agent.text.stats import GenerationStats

PROMPTS = (
    "Once upon a time, there was a brave fox named Mia.",
    "One rainy day, a bear named Tom",
    "Long ago, near a quiet forest, there lived a kind owl named Ella.",
    "There once was a shy duck named Max who loved the lake.",
)
EDIT = " But then a little mouse came by."


@dataclass(slots=True)
class Outcome:
    """What became of all sessions. Threads add to it under its lock."""

    sessions_completed: int = 0
    sessions_failed: int = 0
    tokens: int = 0
    tokens_different: int = 0
    tokens_lost: int = 0
    tokens_doubled: int = 0
    round_trips: int = 0  # after prompts
    drafts_wrong: int = 0
    rows_replayed: int = 0
    answers_unusable: int = 0
    bytes_pulled: int = 0
    longest_stall_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(
        self, got: list[int], want: list[int], stall_s: float, costs: list[GenerationStats]
    ) -> None:
        """Count one finished answer."""
        with self.lock:
            self.sessions_completed += 1
            self.tokens += len(got)
            self.tokens_different += sum(a != b for a, b in zip(got, want, strict=False))
            self.tokens_lost += max(0, len(want) - len(got))
            self.tokens_doubled += max(0, len(got) - len(want))
            self.round_trips += sum(stats.round_trips for stats in costs)
            self.drafts_wrong += sum(
                stats.drafted.total() - stats.accepted.total() for stats in costs
            )
            self.rows_replayed += sum(stats.rows_replayed for stats in costs)
            self.answers_unusable += sum(stats.answers_unusable for stats in costs)
            self.longest_stall_s = max(self.longest_stall_s, stall_s)

    def add_failure(self, error: MidspanError) -> None:
        with self.lock:
            self.sessions_failed += 1
            self.errors.append(str(error))

    def to_json(self) -> dict[str, Any]:
        names = [n for n in self.__slots__ if n not in ("lock", "faults", "errors")]
        numbers = {name: getattr(self, name) for name in names}
        numbers["longest_stall_s"] = round(self.longest_stall_s, 2)
        return numbers | {"faults": dict(self.faults), "errors": self.errors[:10]}


class PullLedger:
    """What workers have pulled from the store, as far as they lived to tell."""

    def __init__(self) -> None:
        self._by_worker: dict[str, int] = {}

    def read(self, pool: LocalPool) -> None:
        client = pool.connect()
        with contextlib.suppress(BrokerUnavailable):
            for worker in client.status(timeout_s=1.0)["workers"]:
                pulled = worker["stats"].get("bytes_pulled", 0)
                self._by_worker[worker["worker_id"]] = pulled
        client.close()

    @property
    def bytes_pulled(self) -> int:
        return sum(self._by_worker.values())


@dataclass(frozen=True, slots=True)
class ChaosSettings:
    """What the options said."""

    sessions: int
    worker_range: tuple[int, int]
    duration_s: float
    every_s: float  # between faults, on average
    engines: int
    max_new_tokens: int  # of one answer; a session has two
    seed: int
    model_name: str | None
    span_text: str | None
    codec: str

    @property
    def workers(self) -> int:
        """Raises SettingsError for a pool that would grow and shrink."""
        least, most = self.worker_range
        if least < most:
            raise SettingsError(f"--workers is {least}..{most}; chaos keeps N of them")
        return least


chaos_options = group_options(
    "settings",
    ChaosSettings,
    click.option(
        "--sessions",
        default=16,
        show_default=True,
        type=COUNT,
        help="Sessions, that generate all the time.",
    ),
    workers_option(WorkerRange(), "; of these N only", default="4", show_default=True),
    click.option(
        "--duration",
        "duration_s",
        default=60.0,
        show_default=True,
        type=FiniteRange(0.1, 1e7),
        help="Seconds.",
    ),
    click.option(
        "--every",
        "every_s",
        default=2.0,
        show_default=True,
        type=FiniteRange(0.01, 1e7),
        help="Seconds between faults, on average.",
    ),
    click.option(
        "--engines",
        default=1,
        show_default=True,
        type=COUNT,
        help="Edges that the sessions are of.",
    ),
    new_tokens_option(60, cls=RenamedOption, old=["--tokens"]),
    click.option("--seed", default=1, show_default=True, type=SEED, help="Makes it repeatable."),
    model_option,
    span_option("the middle half"),
    click.option("--codec", default="fp32", show_default=True, help="Boundary codec."),
)


@click.command()
@chaos_options
@draft_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON, not a table.")
def chaos(settings: ChaosSettings, drafts: DraftChoice, as_json: bool) -> None:
    """Break a pool on purpose, on a seeded schedule, and compare every token.

    Exits with 1 if a session failed or a token differs from an undisturbed run without drafts.
    """
    outcome = run_chaos(settings, drafts)
    result = outcome.to_json()
    click.echo(json.dumps(result) if as_json else format_outcome(result))
    wrong = outcome.tokens_different + outcome.tokens_lost + outcome.tokens_doubled
    if outcome.sessions_failed or wrong:
        raise MidspanError("the pool did not keep its promise")


def run_chaos(settings: ChaosSettings, drafts: DraftChoice) -> Outcome:
    """Start a pool, have sessions generate in it while it is harmed, and count."""
    from common.console.processes import set_up_torch
    from common.weights.demo_model import find_model
    from edge_agent.engine.engine import Engine
    from edge_agent.text.ends import load_ends
    from edge_agent.text.session_settings import uniform_settings
    from edge_agent.text.tokenizer import TextTokenizer

    set_up_torch(threads=1)
    directory = find_model(settings.model_name)
    ends, tokenizer = load_ends(directory, settings.span_text), TextTokenizer(directory)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    edit = tokenizer.encode(EDIT)[1:]
    pool_settings = PoolSettings(
        workers=settings.workers, model=str(directory), span=str(ends.cut.middle)
    )
    codecs = uniform_settings(settings.codec)
    with HarmedPool(pool_settings, settings.seed) as pool, contextlib.ExitStack() as stack:
        addresses = [pool.edge_address() for _ in range(settings.engines)]
        with Engine(ends, addresses[:1], codecs) as undrafted:
            wanted = [
                _converse(undrafted, prompt, edit, settings.max_new_tokens)[0] for prompt in prompts
            ]
        codecs = replace(codecs, draft_tokens=drafts.draft_tokens)
        drafters = drafts.open()
        engines = [
            stack.enter_context(
                Engine(ends, [address], codecs, max_sessions=settings.sessions, drafters=drafters)
            )
            for address in addresses
        ]
        outcome = Outcome()
        stop_at = time.monotonic() + settings.duration_s

        def keep_generating(index: int) -> None:
            turn = index
            while time.monotonic() < stop_at:
                which = turn % len(prompts)
                try:
                    engine = engines[index % settings.engines]
                    answer = _converse(engine, prompts[which], edit, settings.max_new_tokens)
                except MidspanError as error:
                    outcome.add_failure(error)
                else:
                    outcome.add(answer[0], wanted[which], *answer[1:])
                turn += 1

        sessions = range(settings.sessions)
        threads = [threading.Thread(target=keep_generating, args=(index,)) for index in sessions]
        for thread in threads:
            thread.start()
        ledger = harm_until(stop_at, pool, settings, outcome.faults)
        for thread in threads:
            thread.join()
        ledger.read(pool)
        outcome.bytes_pulled = ledger.bytes_pulled
    return outcome


def harm_until(
    stop_at: float, pool: HarmedPool, settings: ChaosSettings, faults: Counter[str]
) -> PullLedger:
    """Do harm on the schedule of the seed and count the faults; what workers pulled until then."""
    rng = random.Random(settings.seed)
    saboteur, ledger = Saboteur(pool, rng), PullLedger()
    next_at = time.monotonic() + settings.every_s
    while next_at < stop_at:
        time.sleep(max(0.0, next_at - time.monotonic()))
        next_at += settings.every_s * rng.uniform(0.5, 1.5)
        ledger.read(pool)
        faults[saboteur.do_harm()] += 1
        pool.heal()  # a worker cannot start while Redis is away; as a supervisor would
    return ledger


def format_outcome(result: dict[str, Any]) -> str:
    """The table that is printed without --json; errors are in it if there are any."""
    rows = [
        (name.replace("_", " "), value)
        for name, value in result.items()
        if name != "faults" and (name != "errors" or value)
    ]
    rows += [(f"fault: {name}", count) for name, count in sorted(result["faults"].items())]
    return format_table(("what", "how many"), rows)


def _converse(
    engine: Engine, prompt_ids: list[int], edit_ids: list[int], count: int
) -> tuple[list[int], float, list[GenerationStats]]:
    """An answer, then another to a prompt that keeps half of the first and goes on otherwise.

    So every session is cut back once. Returns the tokens of both, the longest wait for one of
    them in seconds, and what each answer cost.
    """
    conversation = engine.open()
    tokens: list[int] = []
    costs: list[GenerationStats] = []
    stall_s, last_at = 0.0, time.monotonic()
    try:
        for turn in range(2):
            asked = prompt_ids if turn == 0 else prompt_ids + tokens[: count // 2] + edit_ids
            stream = conversation.submit(asked, count)
            for token in stream:
                tokens.append(token.token_id)
                now = time.monotonic()
                stall_s, last_at = max(stall_s, now - last_at), now
            costs.append(stream.stats)
    finally:
        conversation.close()
    return tokens, stall_s, costs
