"""More than one recompute a value: unrolled problems mean what their schedules mean, and the oracle is never beaten."""

from __future__ import annotations

from dataclasses import replace

import pytest

from solvers import Limits, Problem, Status, least_peak, simulate, solve, working_set
from solvers.again import unroll
from solvers.bounds import ANY_PLAN
from solvers.evaluate import keep_everything, to_schedule
from solvers.least import _known, find_least
from solvers.moves import flips
from solvers.oracle import oracle_least_peak
from solvers.units import build_units
from tests.solvers.problems import random_problem
from tests.solvers.test_reference import layers


@pytest.mark.parametrize("seed", range(30))
def test_an_unrolled_schedule_is_the_schedule(seed: int) -> None:
    problem = random_problem(80_000 + seed, 10)
    least = find_least(problem, Limits())
    for schedule in (problem.program, least.single.schedule, least.schedule):
        first, usage = schedule.index(problem.program[problem.turn]), simulate(problem, schedule)
        for turn in range(first, len(schedule), 3):
            unrolled = unroll(problem, schedule, turn)
            unrolled.problem.verify()
            assert unrolled.fold(unrolled.problem.program) == schedule
            there = simulate(unrolled.problem, unrolled.problem.program)
            assert there.cost_ns == usage.cost_ns
            assert there.peak_bytes >= usage.peak_bytes
            assert turn != first or there.peak_bytes == usage.peak_bytes


@pytest.mark.parametrize("seed", range(30))
def test_folding_never_takes_more_memory(seed: int) -> None:
    problem = random_problem(81_000 + seed, 9)
    schedule = find_least(problem, Limits()).single.schedule
    first = schedule.index(problem.program[problem.turn])
    for turn in range(first, len(schedule), 4):
        unrolled = unroll(problem, schedule, turn)
        units = build_units(unrolled.problem)
        for a, m in flips(units, keep_everything(units)):
            fates = keep_everything(units)
            fates[a] = m
            after = to_schedule(units, fates)
            there, here = simulate(unrolled.problem, after), simulate(problem, unrolled.fold(after))
            assert here.cost_ns == there.cost_ns
            assert here.peak_bytes <= there.peak_bytes


@pytest.mark.parametrize("block", range(10))
def test_the_least_peak_lies_between_the_oracle_and_one_recompute(block: int) -> None:
    for seed in range(82_000 + 10 * block, 82_010 + 10 * block):
        problem = random_problem(seed, 1 + seed % 3)
        if len(problem.value_bytes) > 12:
            continue
        least, lowest = find_least(problem, Limits()), oracle_least_peak(problem)
        assert lowest is not None
        assert max(lowest, working_set(problem).peak_bytes) <= least.peak_bytes <= least.single.peak_bytes


def test_a_chain_goes_far_below_one_recompute_a_value() -> None:
    problem = layers(40)
    least = find_least(problem, Limits())
    assert least.peak_bytes - least.floor_bytes < 0.3 * (least.single.bound_bytes - least.floor_bytes)
    runs = [least.schedule.count(o) for o in problem.program]
    assert max(runs) > 2


@pytest.mark.parametrize("share", [0.0, 0.6, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.3, 0.9))])
def test_auto_has_plans_below_one_recompute(share: float) -> None:
    problem = layers(40)
    least = find_least(problem, Limits())
    small = problem.with_budget(least.peak_bytes + round(share * (least.single.peak_bytes - 1 - least.peak_bytes)))
    answer = solve(small, "auto", Limits(seconds=20))
    assert answer.schedule is not None
    assert answer.bound_class == ANY_PLAN
    assert answer.lower_bound_ns == answer.any_bound_ns
    cost = simulate(problem, answer.schedule).cost_ns
    assert small.program_cost_ns() <= answer.lower_bound_ns <= cost <= simulate(problem, least.schedule).cost_ns


def test_below_the_least_peak_there_is_no_plan_and_it_repeats_itself() -> None:
    problem: Problem = replace(layers(40), name="again")
    first = least_peak(problem)
    _known.clear()
    assert least_peak(problem) == first
    assert first.least_peak_bytes is not None
    none = solve(problem.with_budget(first.least_peak_bytes - 1))
    assert none.schedule is None
    assert none.status in (Status.INFEASIBLE, Status.NOT_FOUND)
    assert none.least_peak_bytes == first.least_peak_bytes
