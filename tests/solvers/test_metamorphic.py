"""What must not change, or must change in a known way, when the problem does."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings

from solvers import Limits, Problem, Progress, Solution, Status, least_peak, simulate, solve
from tests.solvers.problems import at_share, problems, random_problem

EXACT = Limits(seconds=20, gap=0.0)


def cost(problem: Problem, solver: str = "auto", limits: Limits = EXACT) -> int | None:
    answer: Solution = solve(problem, solver, limits)
    return None if answer.schedule is None else simulate(problem, answer.schedule).cost_ns


def relabelled(problem: Problem, seed: int) -> Problem:
    """The same problem with its ops and values numbered differently."""
    rng = random.Random(seed)
    op, value = list(range(len(problem.ops))), list(range(len(problem.value_bytes)))
    rng.shuffle(op)
    rng.shuffle(value)
    ops = list(problem.ops)
    for o, old in enumerate(problem.ops):
        reads, writes = tuple(value[v] for v in old.reads), tuple(value[v] for v in old.writes)
        stands = None if old.instead_of is None else op[old.instead_of]
        taken = None if old.takes_over is None else value[old.takes_over]
        ops[op[o]] = replace(old, reads=reads, writes=writes, instead_of=stands, takes_over=taken)
    sizes, names = [0] * len(value), [""] * len(value)
    for v, new in enumerate(value):
        sizes[new], names[new] = problem.value_bytes[v], problem.value_names[v]
    return replace(
        problem,
        ops=tuple(ops),
        program=tuple(op[o] for o in problem.program),
        value_bytes=tuple(sizes),
        value_names=tuple(names),
        keep=frozenset(value[v] for v in problem.keep),
    )


@pytest.mark.parametrize("block", range(6))
def test_more_budget_never_costs_more(block: int) -> None:
    for seed in range(2000 + 4 * block, 2004 + 4 * block):
        problem = random_problem(seed, 10)
        found = [cost(at_share(problem, share)) for share in (0.05, 0.2, 0.4, 0.6, 0.8, 1.0)]
        fitting = [c for c in found if c is not None]
        assert fitting == sorted(fitting, reverse=True)
        assert found == [None] * (len(found) - len(fitting)) + fitting


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems(9))
def test_doubled_bytes_doubled_budget(problem: Problem) -> None:
    double = replace(
        problem,
        ops=tuple(replace(op, workspace_bytes=2 * op.workspace_bytes) for op in problem.ops),
        value_bytes=tuple(2 * b for b in problem.value_bytes),
        fixed_bytes=2 * problem.fixed_bytes,
        budget_bytes=2 * problem.budget_bytes,
    )
    assert cost(double) == cost(problem)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems(9))
def test_tripled_costs_triple_the_cost(problem: Problem) -> None:
    ops = tuple(replace(op, cost_ns=3 * op.cost_ns) for op in problem.ops)
    once = cost(problem)
    assert cost(replace(problem, ops=ops)) == (None if once is None else 3 * once)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems(9))
def test_names_do_not_matter(problem: Problem) -> None:
    other = relabelled(problem, 1)
    other.verify()
    assert simulate(other, other.program).peak_bytes == simulate(problem, problem.program).peak_bytes
    assert cost(other) == cost(problem)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems(9))
def test_the_least_peak_is_a_promise(problem: Problem) -> None:
    least = least_peak(problem).least_peak_bytes
    assert least is not None
    assert solve(problem.with_budget(least)).schedule is not None
    assert solve(problem.with_budget(least - 1)).status is Status.INFEASIBLE
    answer = solve(problem)
    assert (answer.schedule is None) == (problem.budget_bytes < least)


@pytest.mark.parametrize("seed", range(12))
def test_auto_is_never_worse_than_greedy_and_repeats_itself(seed: int) -> None:
    problem = random_problem(3000 + seed, 16, budget=0.5)
    limits = Limits(seconds=30, threads=1)
    first, again = solve(problem, "auto", limits), solve(problem, "auto", limits)
    assert first == again
    greedy = cost(problem, "greedy")
    assert greedy is None or (cost(problem) or 0) <= greedy


def test_progress_improves_and_a_cancel_is_obeyed() -> None:
    problem = random_problem(4, 20, budget=0.4)
    seen: list[Progress] = []
    answer = solve(problem, "auto", Limits(progress=seen.append))
    costs = [p.cost_ns for p in seen if p.cost_ns is not None]
    assert answer.schedule is not None
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == simulate(problem, answer.schedule).cost_ns
    stopped = solve(problem, "ilp", Limits(cancelled=lambda: True))
    assert stopped.status in (Status.NOT_FOUND, Status.FEASIBLE)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_more_budget_never_costs_more_at_size(seed: int) -> None:
    problem = random_problem(9000 + seed, 60)
    limits = Limits(seconds=20)
    found = [cost(at_share(problem, share), "auto", limits) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    fitting = [c for c in found if c is not None]
    for less, more in pairwise(fitting):
        assert more <= less * (1 + limits.gap)
