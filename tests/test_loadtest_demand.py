"""What a load test asks for, and when: lengths, arrivals, traces, and turns."""

from __future__ import annotations

import asyncio
import io
import statistics
from itertools import islice, pairwise
from pathlib import Path

import pytest
from rich.console import Console

from common.errors import NoWorker, SettingsError
from loadtest.answers import Answer
from loadtest.demand import Lengths, Request, draw_requests, parse_lengths, read_trace
from loadtest.live import draw_progress
from loadtest.observed import Event, Observed
from loadtest.pacing import AskFailed, Clock, Load
from loadtest.settings import LoadSettings

SETTINGS = LoadSettings(
    sessions=None, concurrency_asked=None, prompt_text="16,128", tokens_text="64", rate=None,
    duration_s=None, warmup_s=0.0, seed=1, trace=None,
)  # fmt: skip


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    requests = list(islice(draw_requests(Lengths(1, 9), Lengths(5, 5), 50.0, seed=3), 20_000))
    at = [request.at_s for request in requests if request.at_s is not None]
    pauses = [b - a for a, b in pairwise(at)]
    mean, spread = statistics.mean(pauses), statistics.stdev(pauses)
    # of 20,000 exponential pauses mean and deviation are both 1 / rate, within 1% (one sigma 0.7%)
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert spread == pytest.approx(1 / 50, rel=0.03)
    counts = [sum(second <= a < second + 1 for a in at) for second in range(100)]
    # counts per second of such a process have their mean as variance
    assert statistics.variance(counts) == pytest.approx(50, rel=0.5)


def test_lengths_are_drawn_evenly_and_by_the_seed_alone() -> None:
    lengths = Lengths(2, 4), Lengths(7, 7)
    closed = list(islice(draw_requests(*lengths, None, seed=5), 3000))
    assert {request.at_s for request in closed} == {None}
    assert {request.tokens for request in closed} == {7}
    for length in (2, 3, 4):
        assert sum(r.prompt_tokens == length for r in closed) == pytest.approx(1000, abs=120)
    arriving = islice(draw_requests(*lengths, 3.0, seed=5), 3000)
    assert [r.prompt_tokens for r in arriving] == [r.prompt_tokens for r in closed]


@pytest.mark.parametrize("text", ["", "0", "5,3", "1,2,3", "a", "-4", "1.5", str(1 << 21)])
def test_lengths_that_are_none_are_named(text: str) -> None:
    with pytest.raises(SettingsError, match="--tokens is"):
        parse_lengths(text, "--tokens")


def test_a_trace_is_read_by_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"at": 2.5, "prompt_tokens": 3, "tokens": 4}\n\n{"at": 0, "prompt_tokens": 1, "tokens": 2}'
    )
    assert read_trace(path) == [Request(1, 2, 0.0), Request(3, 4, 2.5)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "line 2 is 'nonsense'; expected"),
        ("[1, 2, 3]", "expected"),
        ('{"at": 1, "tokens": 2}', "expected"),
        ('{"at": -1, "prompt_tokens": 1, "tokens": 2}', "at is -1; expected seconds"),
        ('{"at": NaN, "prompt_tokens": 1, "tokens": 2}', "at is nan; expected seconds"),
        ('{"at": 1, "prompt_tokens": 0, "tokens": 2}', "prompt_tokens is 0; expected"),
        ('{"at": 1, "prompt_tokens": 1, "tokens": true}', "tokens is True; expected"),
    ],
)
def test_a_line_of_a_trace_that_is_none_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at": 0, "prompt_tokens": 1, "tokens": 2}\n' + line)
    with pytest.raises(SettingsError) as raised:
        read_trace(path)
    assert words in str(raised.value)


def test_a_trace_without_lines_or_without_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        read_trace(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(SettingsError, match="no line"):
        read_trace(tmp_path / "empty")


class Stand:
    """Answers when the test says so: each request waits for its turn to be let go."""

    def __init__(self) -> None:
        self.asked: list[Answer] = []
        self.gate = asyncio.Semaphore(0)
        self.failure: Exception | None = None

    async def ask(self, answer: Answer, clock: Clock) -> None:
        self.asked.append(answer)
        await self.gate.acquire()
        if self.failure is not None:
            raise self.failure
        answer.token_s = [clock.now()] * answer.request.tokens


def test_a_closed_loop_has_so_many_sessions_at_once_and_the_next_is_due_when_one_is_over() -> None:
    async def run() -> list[Answer]:
        stand = Stand()
        load = Load(stand, Clock(), concurrency=2, duration_s=None)
        running = asyncio.create_task(load.run([Request(1, 1)] * 5, is_open=False))
        for over in range(5):
            while len(stand.asked) < min(5, over + 2):
                await asyncio.sleep(0)
            for _ in range(10):
                await asyncio.sleep(0)
            assert len(stand.asked) == min(5, over + 2)
            stand.gate.release()
        await running
        return load.answers

    answers = asyncio.run(run())
    assert len(answers) == 5
    assert answers[2].due_s >= answers[0].ended_s
    assert [answer.failure for answer in answers] == [""] * 5


def test_an_arrival_that_finds_no_place_has_been_due_all_the_time_that_it_waited() -> None:
    async def run() -> list[Answer]:
        stand = Stand()
        load = Load(stand, Clock(), concurrency=1, duration_s=None)
        requests = [Request(1, 1, 0.0), Request(1, 1, 0.0)]
        running = asyncio.create_task(load.run(requests, is_open=True))
        while not stand.asked:
            await asyncio.sleep(0)
        stand.gate.release()
        stand.gate.release()
        await running
        return load.answers

    first, second = asyncio.run(run())
    assert (first.due_s, second.due_s) == (0.0, 0.0)
    assert second.sent_s >= first.ended_s
    assert second.first_token_s is not None
    assert second.first_token_s >= first.ended_s


def test_none_is_begun_that_is_due_after_the_duration() -> None:
    async def run() -> int:
        stand = Stand()
        load = Load(stand, Clock(), concurrency=9, duration_s=0.05)
        for _ in range(9):
            stand.gate.release()
        await load.run([Request(1, 1, at) for at in (0.0, 0.04, 0.06, 99.0)], is_open=True)
        return len(load.answers)

    assert asyncio.run(run()) == 2


@pytest.mark.parametrize(
    ("failure", "kind"),
    [(NoWorker("none"), "NoWorker"), (AskFailed("HTTP 429", "busy"), "HTTP 429")],
)
def test_a_session_that_fails_is_counted_by_its_kind_and_the_others_go_on(
    failure: Exception, kind: str
) -> None:
    async def run() -> list[Answer]:
        stand = Stand()
        stand.failure = failure
        load = Load(stand, Clock(), concurrency=2, duration_s=None)
        for _ in range(3):
            stand.gate.release()
        await load.run([Request(1, 1)] * 3, is_open=False)
        return load.answers

    answers = asyncio.run(run())
    assert [answer.failure for answer in answers] == [kind] * 3
    assert [answer.reason for answer in answers] == [str(failure)] * 3


def test_an_answer_that_ends_early_has_failed() -> None:
    class Curt:
        async def ask(self, answer: Answer, clock: Clock) -> None:
            answer.token_s = [clock.now()]

    load = Load(Curt(), Clock(), concurrency=1, duration_s=None)
    asyncio.run(load.run([Request(1, 3)], is_open=False))
    assert load.answers[0].failure == "incomplete"
    assert load.answers[0].reason == "1 of 3 tokens came"


def test_the_live_view_counts_what_is_running_over_and_failed() -> None:
    load = Load(Stand(), Clock(), concurrency=2, duration_s=None)
    now = load.clock.now()
    running, over, failed = (Answer(Request(1, 2), 0.0, 0.0) for _ in range(3))
    running.token_s = [now, now]
    over.token_s, over.ended_s = [now], now
    failed.failure, failed.ended_s = "NoWorker", now
    load.answers += [running, over, failed]
    text = Console(width=120, record=True, file=io.StringIO())
    text.print(draw_progress(load, Observed(events=[Event(1.0, "killed w1")])))
    names, figures = text.export_text().splitlines()
    assert names.split()[:4] == ["seconds", "running", "over", "failed"]
    assert figures.split()[1:5] == ["1", "2", "1", "2"]  # the last: 3 tokens in 2 s
    assert figures.endswith("killed w1")


def test_settings_that_contradict_each_other_are_named() -> None:
    from dataclasses import replace

    with pytest.raises(SettingsError, match="--trace says when"):
        replace(SETTINGS, trace=Path("t"), rate=2.0).check()
    with pytest.raises(SettingsError, match="nothing would be counted"):
        replace(SETTINGS, warmup_s=5.0, duration_s=5.0).check()
    SETTINGS.check()


def test_a_load_without_bounds_has_64_sessions_and_one_with_a_duration_as_many_as_fit() -> None:
    from dataclasses import replace

    assert len(list(SETTINGS.list_requests())) == 64
    assert len(list(replace(SETTINGS, sessions=3).list_requests())) == 3
    endless = iter(replace(SETTINGS, duration_s=1.0).list_requests())
    assert len(list(islice(endless, 1000))) == 1000
    assert (SETTINGS.concurrency, replace(SETTINGS, rate=1.0).concurrency) == (8, 256)
