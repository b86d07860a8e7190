"""Every solver against the oracle, and the exact ones against brute force over all fate vectors."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from solvers import SOLVERS, Limits, Problem, Status, least_peak, simulate, solve, working_set
from solvers.bounds import ANY_PLAN
from solvers.evaluate import exact, profiles
from solvers.least import find_least
from solvers.oracle import oracle_least_peak
from solvers.tables import CLASH_NS
from solvers.units import build_units
from tests.solvers.problems import random_problem

EXACT = Limits(seconds=20, gap=0.0)


def brute_force(problem: Problem) -> list[tuple[int, int]]:
    """(cost, simulated peak) of every fate vector; checks that `profiles` is never optimistic on the way."""
    units = build_units(problem)
    vectors = list(product(*(range(len(u.fates)) for u in units.units)))
    every = np.array(vectors, np.int16).reshape(len(vectors), len(units.units))
    fast = profiles(units, every)
    found = []
    for fates, cost, peak in zip(every, fast.cost_ns, fast.peak_bytes(), strict=True):
        if cost >= CLASH_NS:
            continue
        usage = exact(units, fates)
        assert usage.cost_ns == cost
        assert usage.peak_bytes <= peak
        found.append((usage.cost_ns, usage.peak_bytes))
    return found


def plans(problem: Problem) -> int:
    return int(np.prod([len(u.fates) for u in build_units(problem).units], dtype=np.float64))


def check_against_brute_force(problem: Problem, *, proof: bool = True) -> None:
    """Compare costs and least peaks; without `proof` the search for the least peak may end unproven."""
    found = brute_force(problem)
    costs = [cost for cost, peak in found if peak <= problem.budget_bytes]
    for name in ("ilp", "auto"):
        answer = solve(problem, name, EXACT)
        if costs:
            assert answer.schedule is not None
            assert simulate(problem, answer.schedule).cost_ns == min(costs) == answer.lower_bound_ns
            assert answer.status is Status.OPTIMAL
        elif answer.schedule is None:
            assert answer.status is Status.INFEASIBLE
        else:  # it recomputes a value twice
            assert name == "auto"
            assert answer.bound_class == ANY_PLAN
    for name in ("greedy", "chen", "keep_all"):
        answer = solve(problem, name, EXACT)
        if answer.schedule is not None:
            assert answer.lower_bound_ns <= min(costs) <= simulate(problem, answer.schedule).cost_ns
    least, lowest = find_least(problem, EXACT), min(peak for _, peak in found)
    assert least.single.peak_bytes == lowest
    assert least.single.bound_bytes == lowest or not proof
    assert working_set(problem).peak_bytes <= least.peak_bytes <= lowest


@pytest.mark.parametrize("block", range(20))
def test_exact_solvers_reach_brute_force(block: int) -> None:
    for seed in range(10 * block, 10 * block + 10):
        problem = random_problem(seed, 3 + seed % 4)
        if plans(problem) <= 600:
            check_against_brute_force(problem)


@pytest.mark.parametrize("block", range(15))
def test_no_solver_beats_the_oracle(block: int) -> None:
    for seed in range(1000 + 10 * block, 1010 + 10 * block):
        problem = random_problem(seed, 1 + seed % 3)
        if len(problem.value_bytes) > 13:
            continue
        oracle = solve(problem, "oracle", EXACT)
        assert oracle.status in (Status.OPTIMAL, Status.INFEASIBLE)
        for name in SOLVERS:
            answer = solve(problem, name, EXACT)
            if answer.schedule is not None:
                assert oracle.schedule is not None
                assert simulate(problem, oracle.schedule).cost_ns <= simulate(problem, answer.schedule).cost_ns
        reached, lowest = least_peak(problem, EXACT).least_peak_bytes, oracle_least_peak(problem)
        assert reached is not None
        assert lowest is not None
        assert lowest <= reached
        assert solve(problem.with_budget(lowest), "oracle", EXACT).schedule is not None
        assert solve(problem.with_budget(lowest - 1), "oracle", EXACT).status is Status.INFEASIBLE


@pytest.mark.slow
@pytest.mark.parametrize("block", range(40))
def test_exact_solvers_reach_brute_force_on_many(block: int) -> None:
    for seed in range(5000 + 50 * block, 5050 + 50 * block):
        problem = random_problem(seed, 4 + seed % 6)
        if plans(problem) <= 3000:
            check_against_brute_force(problem, proof=False)
