"""What a load test makes of measurements: made-up times in, figures out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import SettingsError
from loadtest.answers import Answer
from loadtest.demand import Request
from loadtest.observed import COUNTED_BY_BROKER, Event, Observed, Sample, read_sample
from loadtest.percentiles import percentile, summarize
from loadtest.report import Window, find_window, list_latencies, make_report
from loadtest.slo import Slo, parse_slo

NOBODY = Observed()


def answer(due_s: float, *token_s: float, sent_s: float | None = None, failure: str = "") -> Answer:
    """One that ended with its last token."""
    made = Answer(Request(8, len(token_s)), due_s, due_s if sent_s is None else sent_s)
    made.token_s = list(token_s)
    made.ended_s = token_s[-1] if token_s else due_s
    made.failure = failure
    return made


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    want = np.percentile(values, percent, method="linear")
    assert percentile(sorted(values), percent) == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_a_summary_says_how_many_values_there_were_and_the_largest() -> None:
    values = [0.3, 0.1, 0.2]
    assert summarize(values) == {
        "p50": 0.2,
        "p95": round(float(np.percentile(values, 95)), 5),
        "p99": round(float(np.percentile(values, 99)), 5),
        "max": 0.3,
        "count": 3,
    }
    assert summarize([]) is None


def test_the_first_token_is_counted_from_when_a_session_was_due_not_from_when_it_was_sent() -> None:
    late = answer(1.0, 5.0, 5.1, sent_s=4.5)
    report = make_report([late], Window(0.0, 10.0), NOBODY)
    assert report["ttft_s"]["p50"] == 4.0
    assert report["sent_late_s"]["p50"] == 3.5


def test_gaps_are_of_all_tokens_and_the_time_per_token_is_their_mean_in_each_session() -> None:
    answers = [answer(0.0, 1.0, 1.1, 1.5), answer(0.0, 2.0, 2.2)]
    report = make_report(answers, Window(0.0, 10.0), NOBODY)
    assert report["itl_s"]["count"] == 3
    assert report["itl_s"]["max"] == 0.4
    assert report["tpot_s"]["p50"] == pytest.approx((0.25 + 0.2) / 2)
    assert report["tokens_per_s_of_a_session"]["p50"] == pytest.approx((1 / 0.25 + 1 / 0.2) / 2)


def test_throughput_is_what_came_within_the_window_and_latency_of_who_was_due_in_it() -> None:
    answers = [
        answer(0.5, 0.9, 1.5, 2.5),  # due in the warm-up
        answer(1.2, 1.6, 1.9),
        answer(2.9, 3.4, 3.6),  # ends when nothing is begun any more
    ]
    window = find_window(answers, warmup_s=1.0, duration_s=3.0)
    assert window == Window(1.0, 3.0)
    report = make_report(answers, window, NOBODY)
    assert report["tokens"] == 4
    assert report["tokens_per_s"] == 2.0
    assert report["sessions"] == 2
    assert report["ttft_s"]["max"] == 0.5


def test_without_a_duration_the_window_ends_with_the_last_answer() -> None:
    assert find_window([answer(0, 1.0), answer(0, 4.0)], 0.0, None) == Window(0.0, 4.0)
    assert find_window([answer(0, 1.0)], 0.0, 60.0) == Window(0.0, 1.0)


def test_failures_are_counted_by_kind_and_are_in_no_throughput_of_sessions() -> None:
    broken = answer(0.0, 1.0, failure="StepRefused")
    broken.reason = "three workers failed"
    answers = [broken, answer(0.0, failure="NoWorker"), answer(0.0, 1.0, 2.0)]
    report = make_report(answers, Window(0.0, 2.0), NOBODY)
    assert report["failed"] == 2
    assert report["failures"] == {"StepRefused": 1, "NoWorker": 1}
    assert "three workers failed" in report["reasons"]
    assert report["sessions_per_s"] == 0.5


def test_pieces_of_text_that_are_several_tokens_count_for_all_of_them() -> None:
    made = answer(0.0, 1.0, 2.0, 3.0)
    made.tokens_counted = 5
    report = make_report([made], Window(0.0, 4.0), NOBODY)
    assert report["tokens"] == 5
    assert report["tpot_s"]["p50"] == 0.5
    half = make_report([made], Window(0.0, 2.5), NOBODY)
    assert half["tokens"] == 3  # two of three pieces, of 5/3 tokens each


def test_goodput_is_of_sessions_within_all_bounds() -> None:
    answers = [
        answer(0.0, 1.0, 1.1),
        answer(0.0, 3.0, 3.1),  # its first token is late
        answer(0.0, 1.0, 1.1, 1.5),  # one gap is long
        answer(0.0, 1.0, 1.1, failure="NoWorker"),
    ]
    report = make_report(answers, Window(0.0, 4.0), NOBODY, parse_slo("ttft=2,itl=0.2"))
    assert report["goodput"] == {
        "slo": "ttft=2,itl=0.2",
        "sessions": 1,
        "share": 0.25,
        "sessions_per_s": 0.25,
        "tokens_per_s": 0.5,
    }
    assert Slo(tpot=0.25).is_met(answers[2])
    assert not Slo(tpot=0.24).is_met(answers[2])


@pytest.mark.parametrize("text", ["", "ttft", "ttft=0", "ttft=nan", "p99=2", "itl=1,itl=2"])
def test_an_slo_that_is_none_is_named(text: str) -> None:
    with pytest.raises(SettingsError, match="--slo has"):
        parse_slo(text)


def test_costs_that_nobody_told_are_not_zero() -> None:
    told, untold = answer(0.0, 1.0), answer(0.0, 1.0)
    told.bytes_up, told.takeovers, told.rows_replayed = 10, 1, 7
    names = ("bytes_up", "takeovers", "replays", "tokens_wrong")
    report = make_report([told, told, untold], Window(0.0, 1.0), NOBODY)
    assert [report[name] for name in names] == [20, 2, {"sessions": 2, "rows": 14}, None]
    assert [make_report([untold], Window(0.0, 1.0), NOBODY)[name] for name in names] == [None] * 4


NOTHING = dict.fromkeys(COUNTED_BY_BROKER, 0)


def sample(at_s: float, workers: dict[str, tuple[int, int]], **others: float) -> Sample:
    """By worker: batches and steps so far."""
    counts = {
        name: {"batches": b, "steps": s, "bytes_pulled": 0} for name, (b, s) in workers.items()
    }
    counters = {**NOTHING, "steps": int(others.pop("steps", 0))}
    known = {"queued": 0, "in_flight": 0, "sessions": 0, **others}
    return Sample(at_s=at_s, workers=len(workers), by_worker=counts, counters=counters, **known)  # type: ignore[arg-type]


def test_steps_per_batch_are_of_all_workers_since_the_load_began_also_of_those_that_died() -> None:
    observed = Observed(
        [
            sample(0, {"a": (100, 100), "b": (0, 0)}),
            sample(1, {"a": (110, 140), "b": (5, 10)}),
            sample(2, {"b": (10, 20), "c": (5, 40)}),  # a has died, c came
        ]
    )
    assert observed.figures()["steps_per_batch"] == (40 + 20 + 40) / (10 + 10 + 5)
    assert observed.figures()["workers"] == {"least": 2, "most": 2}


def test_a_brokers_time_per_step_leaves_out_that_it_was_started_again() -> None:
    observed = Observed(
        [
            sample(0, {}, steps=1000, cpu_s=1.0),
            sample(1, {}, steps=2000, cpu_s=1.1, queued=7),
            sample(2, {}, steps=10, cpu_s=0.3),  # another process
            sample(3, {}, steps=1010, cpu_s=0.4),
        ]
    )
    broker = observed.figures()["broker"]
    assert broker == {
        **NOTHING,
        "steps": 2000,
        "cpu_us_per_step": 100.0,
        "queued_most": 7,
        "in_flight_most": 0,
    }


def test_a_sample_is_read_from_a_brokers_report() -> None:
    report = {
        "workers": [
            {"worker_id": "a", "state": "ready", "stats": {"batches": 2, "steps": 3}},
            {"worker_id": "b", "state": "draining", "stats": {}},
        ],
        "queues": [{"queued": 2}, {"queued": 3}],
        "steps_in_flight": 4,
        "sessions": 5,
        "counters": {"steps": 6, "busy": 7, "forged_workers": 8},
    }
    assert read_sample(report, 1.5, 0.25) == Sample(
        at_s=1.5, workers=1, queued=5, in_flight=4, sessions=5, cpu_s=0.25,
        counters={**NOTHING, "steps": 6, "busy": 7},
        by_worker={
            "a": {"batches": 2, "steps": 3, "bytes_pulled": 0},
            "b": {"batches": 0, "steps": 0, "bytes_pulled": 0},
        },
    )  # fmt: skip


def test_the_series_has_the_tokens_of_each_second_and_the_pool_as_it_was_last_seen() -> None:
    observed = Observed([sample(0.0, {"a": (0, 0)}), sample(1.5, {}, queued=9)])
    made = answer(0.0, 0.5, 0.9, 2.5, 3.1)
    series = make_report([made], Window(0.0, 3.2), observed)["series"]
    assert [piece["tokens_per_s"] for piece in series] == [2.0, 0.0, 1.0]
    assert [piece["workers"] for piece in series] == [1, 0, 0]
    assert [piece["queued"] for piece in series] == [0, 9, 9]


def test_what_was_done_to_the_pool_is_counted_and_listed() -> None:
    observed = Observed(events=[Event(1.0, "killed w1"), Event(2.0, "drained w2")])
    report = make_report([answer(0.0, 1.0)], Window(0.0, 1.0), observed)
    assert (report["kills"], report["drains"]) == (1, 1)
    assert report["events"][0] == {"at_s": 1.0, "what": "killed w1"}


def test_a_plot_shows_the_latencies_that_the_report_counts() -> None:
    answers = [answer(0.0, 9.0, 9.5), answer(2.0, 2.5, 2.6)]
    shown = list_latencies(answers, Window(1.0, 3.0))
    assert shown["time to first token"] == [0.5]
    assert shown["between two tokens"] == pytest.approx([0.1])
