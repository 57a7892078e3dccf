"""How many workers the broker says a service could use; times are made up."""

from __future__ import annotations

import pytest

from broker.demand import Demand, Goals, Sample

GOALS = Goals(occupancy=0.5, wait_s=0.1, steps=4)
LONG_S = 60.0  # beyond which nothing of the time before is seen


def watch(
    busy: int,
    steps: int,
    wait_s: float = 0.0,
    compute_s: float = 0.0,
    demand: Demand | None = None,
    start_s: float = 0.0,
) -> Demand:
    """A service that is like this for long, with one answer between two looks."""
    demand = demand or Demand(GOALS)
    for tick in range(round(LONG_S * 10)):
        demand.observe(wait_s, compute_s)
        demand.sample(Sample(busy, steps, [], workers=10), start_s + tick / 10)
    return demand


def test_workers_are_wanted_until_each_has_something_to_do_for_the_wished_part_of_the_time() -> (
    None
):
    assert watch(busy=3, steps=40).wanted_workers == pytest.approx(3 / GOALS.occupancy)


def test_a_worker_that_is_busy_half_of_the_time_is_half_a_busy_worker() -> None:
    demand = Demand(GOALS)
    for tick in range(600):
        busy = tick % 2
        demand.sample(Sample(busy, 20 * busy, [], workers=10), tick / 10)
    assert demand.busy_workers == pytest.approx(0.5, abs=0.02)  # one look's weight is 0.02
    assert demand.wanted_workers == pytest.approx(0.5 / GOALS.occupancy, abs=0.04)


def test_where_all_are_busy_all_the_time_steps_say_how_many_there_should_be() -> None:
    demand = Demand(GOALS)
    for tick in range(600):
        demand.sample(Sample(2, 40, [], workers=2), tick / 10)
    assert demand.wanted_workers == pytest.approx(40 / GOALS.steps)


def test_workers_that_are_all_busy_with_few_steps_each_are_too_many() -> None:
    assert watch(busy=8, steps=8).wanted_workers == pytest.approx(8 / GOALS.steps)


def test_a_session_with_long_pauses_keeps_one_worker_wanted() -> None:
    demand = Demand(GOALS)
    for tick in range(600):
        if tick % 30 == 0:  # an answer every 3 s, that nobody was seen at
            demand.observe(0.0, 0.01)
        demand.sample(Sample(0, 0, [], workers=10), tick / 10)
        assert 0 < demand.wanted_workers <= 1


def test_one_session_never_wants_more_than_one_worker() -> None:
    demand = watch(busy=1, steps=1, wait_s=10.0)
    assert 0 < demand.wanted_workers <= 1.0


def test_waiting_doubles_what_is_wanted_and_no_more() -> None:
    calm = watch(busy=2, steps=40, wait_s=0.1).wanted_workers
    assert watch(busy=2, steps=40, wait_s=0.15).wanted_workers == pytest.approx(1.5 * calm)
    assert watch(busy=2, steps=40, wait_s=60.0).wanted_workers == pytest.approx(2 * calm)


def test_waiting_for_the_batch_before_is_no_sign_of_want() -> None:
    calm = watch(busy=2, steps=40).wanted_workers
    slow = watch(busy=2, steps=40, wait_s=0.4, compute_s=0.4)
    assert slow.wanted_workers == pytest.approx(calm)


def test_steps_that_still_wait_count_as_long_as_they_have_waited() -> None:
    demand = Demand(GOALS)
    for tick in range(600):
        demand.sample(Sample(2, 40, [0.3] * 20, workers=10), tick / 10)
    assert demand.wait_s == pytest.approx(0.3)
    assert demand.wanted_workers == pytest.approx(2 * 2 / GOALS.occupancy)


def test_where_nobody_is_one_worker_is_wanted_at_once_while_something_waits() -> None:
    demand = Demand(GOALS)
    demand.sample(Sample(0, 0, [], workers=0), 0.0)
    assert demand.wanted_workers == 0.0
    demand.sample(Sample(0, 1, [0.0], workers=0), 0.05)
    assert demand.wanted_workers == 1.0
    demand.sample(Sample(0, 0, [], workers=0), 0.1)
    assert 0 < demand.wanted_workers < 1


def test_after_a_while_of_nothing_nothing_is_wanted() -> None:
    demand = watch(busy=4, steps=40)
    for tick in range(60):
        demand.sample(Sample(0, 0, [], workers=10), LONG_S + tick / 10)
    assert demand.wanted_workers == 0.0
