"""Random problems through every solver: 250 in CI, FUZZ=10000 (`make fuzz`) at night.

`solve` itself simulates every answer. Here the answers are held against each other, and small ones against the oracle:
never infeasible where one of the class has a plan, never better than the oracle, no bound above a plan of its class.
"""

from __future__ import annotations

import os
import random

import pytest

from solvers import Limits, Problem, Solution, Status, simulate, solve, working_set
from solvers.bounds import ANY_PLAN
from tests.solvers.problems import random_problem

BLOCKS = 20
COUNT = int(os.environ.get("FUZZ", "250"))
SINGLE = ("greedy", "chen", "melon", "moccasin", "pytorch_knapsack")  # plans with one recompute a value
MANY = ("dtr", "rotor")
ORACLE_VALUES = 11  # at most, for the oracle
QUICK = Limits(seconds=3, gap=0.0)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_fuzz(block: int) -> None:
    for i in range(block, COUNT, BLOCKS):
        rng = random.Random(i)
        problem = random_problem(100_000 + i, rng.randint(1, 12), budget=rng.random())
        try:
            check(problem, moccasin=i % 5 == 0)
        except Exception as e:
            raise AssertionError(f"instance {i}: {type(e).__name__} {e}") from e


def check(problem: Problem, *, moccasin: bool) -> None:
    """Hold every solver's answer against the others."""
    best = solve(problem, "ilp", QUICK)
    names = [n for n in (*SINGLE, *MANY, "auto") if moccasin or n != "moccasin"]
    found = {n: solve(problem, n, QUICK) for n in names}
    for name, answer in found.items():
        if answer.schedule is None:
            continue
        cost = _cost(problem, answer)
        assert simulate(problem, answer.schedule).peak_bytes >= working_set(problem).peak_bytes or name in MANY
        more = name == "auto" and best.status is Status.INFEASIBLE  # then it may recompute a value twice, and says so
        assert not more or answer.bound_class == ANY_PLAN
        if name not in MANY and not more:
            assert best.status is not Status.INFEASIBLE, name
            assert best.lower_bound_ns <= cost, name
            assert best.status is not Status.OPTIMAL or _cost(problem, best) <= cost, name
    if len(problem.value_bytes) <= ORACLE_VALUES:
        oracle = solve(problem, "oracle", Limits(seconds=20))
        lowest = None if oracle.schedule is None else _cost(problem, oracle)
        for name, answer in found.items():
            assert answer.schedule is None or (lowest is not None and lowest <= _cost(problem, answer)), name


def _cost(problem: Problem, answer: Solution) -> int:
    assert answer.schedule is not None
    return simulate(problem, answer.schedule).cost_ns
