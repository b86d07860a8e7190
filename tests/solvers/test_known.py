"""What one search hands to the next: the least peak, schedules that are known, the clock."""

from __future__ import annotations

import time
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from solvers import InvalidSchedule, Limits, Status, least, least_peak, simulate, solve, working_set
from solvers.evaluate import allowed, fates_of, profiles, to_schedule
from solvers.units import build_units
from tests.solvers.problems import at_share, random_problem


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(s, marks=pytest.mark.slow) for s in range(4, 8))])
def test_a_known_schedule_is_never_beaten_by_the_answer(seed: int) -> None:
    """However little time there is: at every budget at which it fits, the answer costs no more than it."""
    problem = random_problem(7000 + seed, 40)
    found = least_peak(problem, Limits(seconds=5))
    known = found.schedule
    assert known is not None
    assert found.least_peak_bytes == simulate(problem, known).peak_bytes
    costs = []
    for share in (0.0, 0.2, 0.5, 0.8):
        top = simulate(problem, problem.program).peak_bytes
        budget = found.least_peak_bytes + round(share * (top - found.least_peak_bytes))
        answer = solve(problem.with_budget(budget), "auto", Limits(seconds=0.3, known=(known,)))
        assert answer.schedule is not None
        known = answer.schedule
        costs.append(simulate(problem, known).cost_ns)
    assert costs == sorted(costs, reverse=True)


def test_a_known_schedule_of_another_problem_is_refused() -> None:
    problem = random_problem(7, 12, budget=0.3)
    with pytest.raises(InvalidSchedule):
        solve(problem, "auto", Limits(known=(problem.program[1:],)))


@pytest.mark.parametrize("seed", range(20))
def test_fates_of_reads_back_what_to_schedule_wrote(seed: int) -> None:
    problem = random_problem(7100 + seed, 12)
    units = build_units(problem)
    random = np.random.default_rng(seed)
    for _ in range(10):
        fates = allowed(units, np.array([random.integers(len(u.fates)) for u in units.units], np.int16))
        schedule = to_schedule(units, fates)
        again = fates_of(units, schedule)
        assert again is not None
        assert to_schedule(units, again) == schedule
        assert profiles(units, again[None, :]).peak_bytes()[0] <= profiles(units, fates[None, :]).peak_bytes()[0]
    assert fates_of(units, problem.program) is not None


@pytest.mark.parametrize("seconds", [0.01, 0.5])
def test_the_least_peak_obeys_the_clock(seconds: float) -> None:
    problem = random_problem(7200, 150)
    started = time.monotonic()
    found = least_peak(problem, Limits(seconds=seconds))
    assert time.monotonic() - started < seconds + 3
    assert found.status in (Status.FEASIBLE, Status.OPTIMAL)
    assert found.least_peak_bytes is not None
    assert working_set(problem).peak_bytes <= found.least_peak_bytes
    # More time never takes back what was reached.
    more = least_peak(problem, Limits(seconds=2 * seconds + 1)).least_peak_bytes
    assert more is not None
    assert more <= found.least_peak_bytes


def test_the_least_peak_repeats_itself() -> None:
    problem = at_share(random_problem(7300, 30), 0.0)
    first = least_peak(problem)
    least._known.clear()
    assert least_peak(problem) == first


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 5))])
def test_the_least_peak_is_the_same_however_long_ops_took(seed: int) -> None:
    problem = at_share(random_problem(7400 + seed, 40), 0.0)
    random = Random(seed)
    ops = tuple(replace(op, cost_ns=round(op.cost_ns * random.uniform(0.5, 2))) for op in problem.ops)
    first = least_peak(problem)
    least._known.clear()
    other = least_peak(replace(problem, ops=ops))
    assert other.least_peak_bytes == first.least_peak_bytes
    assert other.schedule == first.schedule
    assert solve(replace(problem, ops=ops).with_budget(first.least_peak_bytes or 0)).schedule is not None
