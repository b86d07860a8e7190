"""A family of budgets: each answer as good as its own search's, none dearer than that of a smaller budget."""

from __future__ import annotations

import pytest

from solvers import Limits, Status, least_peak, simulate, solve, solve_family
from tests.solvers.problems import random_problem


@pytest.mark.parametrize("seed", range(12))
def test_a_family_reaches_what_single_searches_prove(seed: int) -> None:
    problem = random_problem(9000 + seed, 10)
    top, least = simulate(problem, problem.program).peak_bytes, least_peak(problem)
    low = least.least_peak_bytes
    assert low is not None
    assert least.schedule is not None
    budgets = [low + (top - low) * i // 5 for i in range(6)]
    found = solve_family(problem, [*reversed(budgets), top], Limits(seconds=30, gap=0.0, known=(least.schedule,)))
    assert len(found) == len(set(budgets))
    costs = []
    for budget, answer in zip(sorted(set(budgets)), found, strict=True):
        assert answer.schedule is not None
        usage = simulate(problem, answer.schedule)
        assert usage.peak_bytes <= budget
        assert answer.any_bound_ns <= usage.cost_ns
        alone = solve(problem.with_budget(budget), "ilp", Limits(seconds=10, gap=0.0))
        if alone.schedule is not None and alone.status is answer.status is Status.OPTIMAL:
            assert usage.cost_ns == simulate(problem, alone.schedule).cost_ns
        costs.append(usage.cost_ns)
    assert costs == sorted(costs, reverse=True)


def test_a_budget_below_reach_is_not_found_and_the_others_are() -> None:
    problem = random_problem(9001, 10)
    top = simulate(problem, problem.program).peak_bytes
    none, full = solve_family(problem, [1, top], Limits(seconds=5))
    assert none.status is Status.NOT_FOUND
    assert full.schedule is not None
