"""Repeats without need go, no other change; and roundings of the linear program are schedules."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from solvers import Limits, Problem, simulate, solve
from solvers.any_plan import relax_any, spaced_rows
from solvers.least import find_least
from solvers.problem import Schedule
from solvers.roundings import round_any
from solvers.search import Search
from solvers.spare import Lives, spare
from solvers.units import build_units
from tests.solvers.problems import at_share, random_problem
from tests.solvers.test_reference import layers


def spared(problem: Problem, schedule: Schedule) -> Schedule:
    return spare(Search(problem, Limits(), "test"), schedule)


def schedules(problem: Problem) -> list[Schedule]:
    """Schedules that repeat steps: of the least peak, and what an online eviction did."""
    found = [find_least(problem, Limits()).schedule, solve(problem, "dtr", Limits(seconds=3)).schedule]
    return [schedule for schedule in found if schedule is not None]


@pytest.mark.parametrize("seed", range(60))
def test_what_is_spared_still_fits_and_costs_no_more(seed: int) -> None:
    problem = random_problem(84_000 + seed, 10)
    for schedule in schedules(problem):
        usage = simulate(problem, schedule)
        for budget in (usage.peak_bytes, math.ceil(1.3 * usage.peak_bytes)):
            after = simulate(problem, spared(problem.with_budget(budget), schedule))
            assert after.peak_bytes <= budget
            assert after.cost_ns <= usage.cost_ns


@pytest.mark.parametrize("seed", range(60))
def test_bytes_without_a_repeat_are_those_that_simulate_finds(seed: int) -> None:
    tried = 0
    for problem in (random_problem(84_500 + seed, 10), layers(8 + seed % 8)):
        for schedule in schedules(problem):
            usage = simulate(problem, schedule)
            tight = problem.with_budget(int(usage.peak_bytes * (1 + seed % 4 / 20)))
            lives, level, gone = Lives(tight, schedule), np.array(usage.bytes_at, np.int64), set[int]()
            for step in lives.repeats:
                left = [t for t in range(len(schedule)) if t not in gone | {step}]
                found = simulate(tight, tuple(schedule[t] for t in left))
                tried += 1
                if not lives.leave_out(step, level):
                    assert found.peak_bytes > tight.budget_bytes
                    continue
                gone.add(step)
                assert tuple(level[left]) == found.bytes_at
                assert all(not any(x.reads for x in lives.written[t]) for t in lives.unread_since(step))
    assert tried


@pytest.mark.parametrize("seed", range(20))
def test_with_room_for_all_nothing_is_repeated(seed: int) -> None:
    problem = random_problem(85_000 + seed, 10)
    for schedule in schedules(problem):
        roomy = problem.with_budget(10 * simulate(problem, problem.program).peak_bytes)
        after = spared(roomy, schedule)
        repeatable = [o for o in after if problem.ops[o].repeatable]
        assert len(repeatable) == len(set(repeatable))


def test_a_step_that_the_budget_needs_stays() -> None:
    problem = at_share(layers(12), 0.3)
    schedule = solve(problem, "auto", Limits(seconds=5)).schedule
    assert schedule is not None
    assert spared(problem, schedule) == schedule
    doubled = tuple(o for o in schedule for _ in range(2 if problem.ops[o].repeatable else 1))
    assert simulate(problem, spared(problem, doubled)).cost_ns == simulate(problem, schedule).cost_ns


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_a_rounding_is_a_schedule(seed: int, threshold: float) -> None:
    problem = random_problem(86_000 + seed, 12)
    tight = at_share(problem, 0.4)
    units = build_units(tight)
    relaxation = relax_any(units, tight.budget_bytes, spaced_rows(tight), 10.0)
    if relaxation is not None:
        assert simulate(tight, round_any(units, relaxation, threshold)).cost_ns >= problem.program_cost_ns() // 2


def test_with_room_for_all_the_rounding_is_the_program() -> None:
    problem = layers(12)
    units = build_units(problem)
    budget = simulate(problem, problem.program).peak_bytes
    relaxation = relax_any(units, budget, spaced_rows(problem), 10.0)
    assert relaxation is not None
    assert relaxation.bound_ns <= problem.program_cost_ns()
    assert round_any(units, relaxation, 0.5) == problem.program


def test_what_the_relaxation_does_not_hold_is_computed_again() -> None:
    problem = layers(12)
    units = build_units(problem)
    relaxation = relax_any(units, simulate(problem, problem.program).peak_bytes, spaced_rows(problem), 10.0)
    assert relaxation is not None
    nothing = replace(relaxation, held={v: (0.0,) * len(held) for v, held in relaxation.held.items()})
    usage = simulate(problem, round_any(units, nothing, 0.5))
    assert usage.cost_ns > problem.program_cost_ns()
    assert usage.peak_bytes < simulate(problem, problem.program).peak_bytes
