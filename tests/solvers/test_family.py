"""A family of budgets: each answer as good as its own search's, none dearer than that of a smaller budget."""

from __future__ import annotations

import math

import numpy as np
import pytest

from solvers import Limits, Status, least_peak, simulate, solve, solve_family
from solvers.bounds import ONE_RECOMPUTE
from solvers.relax import LinearProgram
from solvers.rounds import Rounds, Tangent
from solvers.units import build_units
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


@pytest.mark.parametrize("seed", range(12))
def test_a_tangent_bounds_other_budgets_by_no_more_than_their_own_linear_programs(seed: int) -> None:
    """The optimum of the linear program is convex in the budget, and its dual a line below it."""
    problem = random_problem(9000 + seed, 10)
    top, low = simulate(problem, problem.program).peak_bytes, least_peak(problem).single_peak_bytes
    assert low is not None
    rows = set(range(problem.turn, len(problem.program)))
    optima, tangents = {}, []
    for budget in [low + (top - low) * i // 20 for i in range(21)]:
        rounds = Rounds(build_units(problem.with_budget(budget)), budget, rows)
        program = LinearProgram(rounds.model())
        _, bound = program.solve(10.0)
        if math.isfinite(bound):
            rounds.touch(program, bound)
            optima[budget], tangents = bound, [*tangents, *rounds.tangents]
    assert len(optima) > 3
    for tangent in tangents:
        for budget, bound in optima.items():
            assert tangent.at(budget) <= bound + 1e-3 * abs(tangent.at(budget) - tangent.bound_ns) + 2
        assert tangent.at(tangent.budget_bytes) == math.ceil(tangent.bound_ns)
    assert any(t.slope < 0 for t in tangents)


def test_a_tangent_holds_only_where_its_cuts_do() -> None:
    tangent = Tangent(1000, 50.0, -0.01, below_bytes=1500)
    assert tangent.at(1400) == 46
    assert tangent.at(600) == 54
    assert tangent.at(1500) == 0


def test_hardly_any_time_leaves_valid_answers() -> None:
    """Late budgets are answered from what others proved; a bound is never above a plan, in its class or of any."""
    problem = random_problem(9003, 14)
    least = least_peak(problem)
    top, low = simulate(problem, problem.program).peak_bytes, least.least_peak_bytes
    assert low is not None
    assert least.schedule is not None
    budgets = [low + (top - low) * i // 12 for i in range(13)]
    for answer, budget in zip(
        solve_family(problem, budgets, Limits(seconds=0.01, known=(least.schedule,))), sorted(set(budgets)), strict=True
    ):
        assert answer.schedule is not None
        usage = simulate(problem, answer.schedule)
        assert usage.peak_bytes <= budget
        assert answer.any_bound_ns <= usage.cost_ns
        if answer.bound_class == ONE_RECOMPUTE:
            best = solve(problem.with_budget(budget), "ilp", Limits(seconds=10, gap=0.0))
            assert best.schedule is not None
            assert answer.lower_bound_ns <= simulate(problem, best.schedule).cost_ns


@pytest.mark.parametrize("seed", range(12))
def test_any_duals_bound_a_linear_program(seed: int) -> None:
    """So those of a search that time cut do, and the line that they leave; the optimum's own give the optimum."""
    problem = random_problem(9100 + seed, 12)
    top, low = simulate(problem, problem.program).peak_bytes, least_peak(problem).single_peak_bytes
    assert low is not None
    rows, optima = set(range(problem.turn, len(problem.program))), dict[int, float]()
    budgets = [low + (top - low) * i // 4 for i in range(5)]
    for budget in (*budgets, budgets[2]):  # the last one's line is looked at on both sides
        rounds = Rounds(build_units(problem.with_budget(budget)), budget, rows)
        program = LinearProgram(rounds.model())
        values, optimum = program.solve(10.0)
        if values is not None:
            assert program.lagrangian() == pytest.approx(optimum, rel=1e-5)
            optima[budget] = optimum
    assert optima
    noise, own = np.random.default_rng(seed), program.duals
    for scale in (0.01, 0.3, 3.0):
        program.duals = program.signed(own + noise.normal(0, scale, len(own)))
        rounds.touch(program, program.lagrangian())
        for budget, optimum in optima.items():
            assert rounds.tangents[-1].at(budget) <= optimum + 1e-5 * abs(optimum) + 2
