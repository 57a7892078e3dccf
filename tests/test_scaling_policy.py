"""When a pool grows and shrinks; times are made up."""

from __future__ import annotations

import random

import pytest

from common.errors import SettingsError
from deploy.scaling.autoscaler import Autoscaler, choose_leaving, count_others, count_wanted
from deploy.scaling.policy import ScalingPolicy, ScalingSettings

SETTINGS = ScalingSettings(least=1, most=8, cool_down_s=30.0, idle_s=300.0)


def run(policy: ScalingPolicy, wanted: float, seconds: range, present: int) -> int:
    """One look a second; how many workers there are at the end."""
    for now in seconds:
        present = policy.decide(present, wanted, float(now))
    return present


def test_a_pool_grows_at_once_and_within_its_bounds() -> None:
    policy = ScalingPolicy(SETTINGS)
    assert policy.decide(1, 2.3, 0.0) == 3
    assert policy.decide(3, 20.0, 1.0) == 8
    assert ScalingPolicy(SETTINGS).decide(0, 0.0, 0.0) == 1


def test_a_hair_more_than_there_is_starts_nobody() -> None:
    assert ScalingPolicy(SETTINGS).decide(2, 2.05, 0.0) == 2


def test_a_pool_shrinks_when_less_was_enough_for_the_whole_cool_down() -> None:
    policy = ScalingPolicy(SETTINGS)
    assert run(policy, 6.0, range(10), present=1) == 6
    assert run(policy, 2.0, range(10, 39), present=6) == 6
    assert run(policy, 2.0, range(39, 41), present=6) == 2


def test_a_peak_within_the_cool_down_keeps_what_it_needed() -> None:
    policy = ScalingPolicy(SETTINGS)
    present = run(policy, 6.0, range(10), present=1)
    present = run(policy, 2.0, range(10, 30), present)
    present = run(policy, 4.0, range(30, 31), present)
    assert run(policy, 2.0, range(31, 59), present) == 4
    assert run(policy, 2.0, range(59, 62), present) == 2


def test_load_that_swings_within_the_cool_down_moves_nobody() -> None:
    policy = ScalingPolicy(SETTINGS)
    present = 5
    for now in range(200):
        present = policy.decide(present, 5.0 if now % 20 < 10 else 1.5, float(now))
        assert present == 5


def test_nothing_shrinks_before_it_was_watched_for_the_cool_down() -> None:
    policy = ScalingPolicy(SETTINGS)
    assert run(policy, 1.0, range(30), present=6) == 6
    assert run(policy, 1.0, range(30, 31), present=6) == 1


def test_the_last_worker_leaves_only_after_the_idle_time_and_comes_back_for_the_least_work() -> (
    None
):
    policy = ScalingPolicy(ScalingSettings(0, 8, 30.0, 300.0))
    present = run(policy, 3.0, range(10), present=0)
    assert present == 3
    present = run(policy, 0.0, range(10, 100), present)
    assert present == 1
    assert run(policy, 0.0, range(100, 309), present) == 1
    assert run(policy, 0.0, range(309, 311), present) == 0
    assert policy.decide(0, 0.06, 400.0) == 1


def test_it_agrees_with_a_policy_that_keeps_everything_it_saw() -> None:
    rng = random.Random(1)
    policy = ScalingPolicy(ScalingSettings(0, 8, 7.0, 19.0))
    seen: list[tuple[float, int]] = []
    present, now = 0, 0.0
    for _ in range(3000):
        now += rng.choice([0.1, 0.5, 1.0, 3.0])
        wanted = rng.choice([0.0, 0.0, 0.0, 0.3, 1.0, 2.7, 9.0])
        need = min(8, max(0 if wanted == 0 else 1, -int(-(wanted - 0.1) // 1)))
        seen.append((now, need))
        if need < present:
            highest = max(n for at, n in seen if at >= now - 7.0) if now - 7.0 >= seen[0][0] else 8
            recent = max(n for at, n in seen if at >= now - 19.0) if now - 19 >= seen[0][0] else 8
            want = min(present, max(highest, 1 if recent else 0))
        else:
            want = need
        present = policy.decide(present, wanted, now)
        assert present == want


@pytest.mark.parametrize(("least", "most"), [(-1, 3), (4, 3), (0, 0)])
def test_bounds_that_make_no_sense_are_refused(least: int, most: int) -> None:
    with pytest.raises(SettingsError, match=r"expected A\.\.B"):
        ScalingSettings(least, most)


# --- what reports say

TEXT, IMAGE = ("a" * 16, "2-6"), ("b" * 16, "unet")


def queue(part: tuple[str, str], wanted: float, workers: int = 1) -> dict[str, object]:
    return {"model": part[0], "part": part[1], "wanted_workers": wanted, "workers": workers}


def worker(
    name: str, *parts: tuple[str, str], warm: int = 0, state: str = "ready"
) -> dict[str, object]:
    services = [{"model": model, "part": part} for model, part in parts]
    return {"worker_id": name, "state": state, "services": services, "warm_sessions": warm}


NEW = worker("new", TEXT, state="starting")


def test_only_what_our_workers_serve_is_counted_and_before_we_know_what_nobody_serves() -> None:
    reports = [
        {"queues": [queue(TEXT, 1.5), queue(IMAGE, 2.0, workers=0)]},
        {"queues": [queue(TEXT, 0.25)]},
    ]
    assert count_wanted(reports, {TEXT}) == 1.75
    assert count_wanted(reports, {TEXT, IMAGE}) == 3.75
    assert count_wanted(reports, set()) == 2.0


def test_ready_workers_of_others_are_taken_off_once_however_many_brokers_know_them() -> None:
    reports = [
        {"workers": [worker("ours", TEXT), worker("theirs", TEXT), NEW]},
        {"workers": [worker("theirs", TEXT), worker("elsewhere", IMAGE)]},
    ]  # fmt: skip
    assert count_others(reports, {TEXT}, ["ours"]) == 1


def test_those_leave_first_that_are_warm_for_the_fewest_and_of_these_the_newest() -> None:
    workers = [worker("a", warm=2), worker("b"), worker("c", warm=1), worker("d")]
    assert choose_leaving([{"workers": workers}], ["a", "b", "c", "d"], 3) == ["d", "b", "c"]
    assert choose_leaving([{"workers": workers}], ["a", "b"], -1) == []


class Workers:
    """A fleet that keeps a list."""

    def __init__(self) -> None:
        self.here: list[str] = []
        self.started = 0

    def names(self) -> list[str]:
        return list(self.here)

    def start_worker(self) -> str:
        self.started += 1
        self.here.append(f"w{self.started}")
        return self.here[-1]

    def begin_drain(self, name: str) -> None:
        self.here.remove(name)


def test_brokers_that_do_not_answer_change_nothing() -> None:
    fleet = Workers()
    reports: list[dict[str, object]] = [{"queues": [queue(TEXT, 1.0, workers=0)], "workers": []}]
    scaler = Autoscaler(fleet, ScalingPolicy(ScalingSettings(0, 4, 1.0, 1.0)), lambda: reports)
    assert scaler.step(0.0) == ["0 -> 1 workers: the pool could use 1.0; starting w1"]
    reports.clear()
    assert scaler.step(100.0) == []
    assert fleet.here == ["w1"]


def test_a_pool_with_enough_workers_of_others_needs_none_of_ours() -> None:
    fleet = Workers()
    fleet.start_worker()
    reports = [
        {"queues": [queue(TEXT, 2.0)], "workers": [worker(name, TEXT) for name in ("w1", "x", "y")]}
    ]
    scaler = Autoscaler(fleet, ScalingPolicy(ScalingSettings(0, 4, 1.0, 2.0)), lambda: reports)
    for now in range(4):
        scaler.step(float(now))
    assert fleet.here == []
