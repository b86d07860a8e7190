"""The bound on any plan, against the oracle made to run the whole program in order, and against our own plans."""

from __future__ import annotations

from dataclasses import replace

import pytest

from solvers import Kind, Limits, Op, Problem, simulate, solve
from solvers.any_plan import any_plan_bound
from solvers.units import build_units
from tests.solvers.problems import at_share, random_problem
from tests.solvers.test_reference import layers


def in_order(problem: Problem) -> Problem:
    """The problem whose every program op runs once, in order; a twin of it may run again any number of times."""
    ops = [replace(op, repeatable=op.instead_of is not None or op.kind is not Kind.COMPUTE) for op in problem.ops]
    twins = [
        replace(problem.ops[o], name=f"{problem.ops[o].name}_again", instead_of=o)
        for o in problem.program[: problem.turn]
        if problem.ops[o].repeatable
    ]
    return replace(problem, ops=(*ops, *twins))


def bound(problem: Problem, step: int = 1) -> int:
    rows = range(problem.turn + 1, len(problem.program), step)
    return any_plan_bound(build_units(problem), problem.budget_bytes, rows, 10.0)


@pytest.mark.parametrize("block", range(10))
def test_never_above_a_plan_in_program_order(block: int) -> None:
    for seed in range(60_000 + 20 * block, 60_020 + 20 * block):
        problem = random_problem(seed, 1 + seed % 4)
        if len(problem.value_bytes) > 12:
            continue
        whole = in_order(problem)
        best = solve(whole, "oracle", Limits(seconds=20)).schedule
        if best is None:
            continue
        turn = best.index(whole.program[whole.turn])
        made = [v for o in best[:turn] for v in whole.ops[o].writes]
        if len(made) == len(set(made)):  # else it recomputes in the forward: another class
            cost = simulate(whole, best).cost_ns
            assert bound(problem) <= cost
            assert bound(problem, 3) <= cost


@pytest.mark.parametrize("seed", range(20))
def test_never_above_our_own_plans(seed: int) -> None:
    problem = random_problem(61_000 + seed, 10)
    for name in ("ilp", "melon", "dtr"):
        answer = solve(problem, name, Limits(seconds=3))
        if answer.schedule is not None and (name != "dtr" or _late(problem, answer.schedule)):
            assert bound(problem) <= simulate(problem, answer.schedule).cost_ns


def test_it_sees_what_the_trivial_bound_does_not() -> None:
    problem = at_share(layers(12), 0.3)
    assert bound(problem) > problem.program_cost_ns()
    dearer = replace(problem, ops=tuple(replace(op, cost_ns=3 * op.cost_ns) for op in problem.ops))
    assert abs(bound(dearer) - 3 * bound(problem)) <= 6


def _late(problem: Problem, schedule: tuple[int, ...]) -> bool:
    before = schedule[: schedule.index(problem.program[problem.turn])]
    return len(before) == len(set(before))


def test_an_op_type_is_not_needed() -> None:
    empty = Problem("one", (Op("turn", (), (0,), 0, repeatable=False),), (0,), 0, (1,), ("t",), frozenset(), 0, 5)
    assert bound(empty) == 0
