"""The solvers of the papers: each does its own thing on a case worked out by hand, and none is believed."""

from __future__ import annotations

import pytest

from solvers import SOLVERS, Limits, Op, Problem, Status, simulate, solve
from solvers.restorers import restorers
from solvers.rotor import chain
from tests.solvers.problems import at_share, random_problem

REFERENCE = ("chen", "melon", "dtr", "checkmate", "moccasin", "rotor", "pytorch_knapsack")
QUICK = Limits(seconds=4)


def layers(count: int, size: int = 10, cost: int = 10) -> Problem:
    """A chain of equal layers, each of whose backward ops reads its input, output and the gradient."""
    ops = [Op("x", (), (0,), 0, repeatable=False)]
    ops += [Op(f"f{i}", (i,), (i + 1,), cost) for i in range(count)]
    turn, grad = len(ops), count + 1
    ops.append(Op("turn", (count,), (grad,), 0, repeatable=False))
    for i in reversed(range(count)):
        ops.append(Op(f"b{i}", (grad, i, i + 1), (grad + 1,), cost))
        grad += 1
    ops.append(Op("end", (grad,), (grad + 1,), 0, repeatable=False))
    names = tuple(f"v{v}" for v in range(grad + 2))
    keep = frozenset({grad + 1})
    return Problem("layers", tuple(ops), tuple(range(len(ops))), turn, (size,) * (grad + 2), names, keep, 0, 0)


def test_a_value_comes_back_by_its_op_or_by_a_variant() -> None:
    for seed in range(40):
        problem = random_problem(seed, 8)
        for v, o in restorers(problem).items():
            op = problem.ops[o]
            assert v in op.writes
            assert op.repeatable
            assert op.instead_of is None or not problem.ops[op.instead_of].repeatable


@pytest.mark.parametrize("name", REFERENCE)
def test_it_keeps_all_where_that_fits(name: str) -> None:
    problem = layers(8)
    problem = problem.with_budget(simulate(problem, problem.program).peak_bytes)
    answer = solve(problem, name, QUICK)
    assert answer.schedule is not None
    assert simulate(problem, answer.schedule).cost_ns == problem.program_cost_ns()


@pytest.mark.parametrize("name", [n for n in REFERENCE if n != "pytorch_knapsack"])
def test_it_finds_a_plan_for_a_chain_at_seven_tenths(name: str) -> None:
    problem = at_share(layers(12), 0.7)
    answer = solve(problem, name, Limits(seconds=20))
    assert answer.schedule is not None, name
    usage = simulate(problem, answer.schedule)
    assert usage.peak_bytes <= problem.budget_bytes
    assert usage.cost_ns <= 1.5 * problem.program_cost_ns()


@pytest.mark.parametrize("block", range(12))
def test_none_beats_the_oracle(block: int) -> None:
    for seed in range(7000 + 6 * block, 7006 + 6 * block):
        problem = random_problem(seed, 1 + seed % 3)
        if len(problem.value_bytes) > 12:
            continue
        best = solve(problem, "oracle", Limits(seconds=20))
        for name in REFERENCE:
            answer = solve(problem, name, QUICK)
            if answer.schedule is not None:
                assert best.schedule is not None
                assert simulate(problem, answer.schedule).cost_ns >= simulate(problem, best.schedule).cost_ns


@pytest.mark.parametrize("seed", range(10))
def test_checkmate_reaches_the_oracle_without_codecs_and_take_overs(seed: int) -> None:
    problem = layers(3 + seed % 2, size=1 + seed % 3, cost=1 + seed)
    problem = at_share(problem, (seed % 5) / 5)
    best, answer = solve(problem, "oracle", Limits(seconds=20)), solve(problem, "checkmate", Limits(seconds=20))
    assert (best.schedule is None) == (answer.schedule is None)
    if best.schedule is None or answer.schedule is None:
        assert answer.status is Status.INFEASIBLE
    else:
        assert simulate(problem, answer.schedule).cost_ns == simulate(problem, best.schedule).cost_ns


def test_moccasin_reaches_our_optimum_of_the_same_class() -> None:
    for seed in range(8000, 8030):
        problem = random_problem(seed, 5, budget=0.6)
        problem = _without_codecs(problem)
        ours, theirs = solve(problem, "ilp", QUICK), solve(problem, "moccasin", QUICK)
        if theirs.schedule is not None:
            assert ours.schedule is not None
            assert simulate(problem, ours.schedule).cost_ns <= simulate(problem, theirs.schedule).cost_ns


def test_the_knapsack_drops_the_cheapest_bytes_and_does_not_see_chains() -> None:
    # Values of equal size, each computed from x alone and read once in the backward: it drops the cheapest ones.
    costs = (50, 10, 40, 20, 30)
    ops = [Op("x", (), (0,), 0, repeatable=False)]
    ops += [Op(f"f{i}", (0,), (i + 1,), cost) for i, cost in enumerate(costs)]
    ops += [Op("turn", (5,), (6,), 0, repeatable=False)]
    ops += [Op(f"b{i}", (5 - i, 6 + i), (7 + i,), 5) for i in range(5)]
    ops.append(Op("end", (11, 0), (12,), 0, repeatable=False))
    names = tuple(f"v{v}" for v in range(13))
    problem = Problem("star", tuple(ops), tuple(range(len(ops))), 6, (10,) * 13, names, frozenset({12}), 0, 0)
    top = simulate(problem, problem.program).peak_bytes
    answer = solve(problem.with_budget(top - 20), "pytorch_knapsack", QUICK)
    assert answer.schedule is not None
    again = {problem.ops[o].cost_ns for o in set(answer.schedule) if answer.schedule.count(o) > 1}
    assert again == {10, 20}
    # Equal layers in a chain: it drops neighbours, which then need each other at once, and no ratio fits.
    assert solve(at_share(layers(12), 0.7), "pytorch_knapsack", QUICK).status is Status.NOT_FOUND


def test_rotor_cuts_a_chain_at_every_layer_and_keeps_few_inputs() -> None:
    problem = layers(16)
    stages = chain(problem)
    assert len(stages) >= 16
    assert sum(len(s.forward) for s in stages) == problem.turn + 1
    assert sum(len(s.backward) for s in stages) == len(problem.program) - problem.turn - 1
    tight = at_share(problem, 0.4)
    answer = solve(tight, "rotor", QUICK)
    assert answer.schedule is not None
    assert len(answer.schedule) > len(problem.program)


def test_dtr_recomputes_more_than_once_where_one_recompute_is_not_enough() -> None:
    problem = layers(24)
    single = solve(at_share(problem, 0.02), "ilp", QUICK)
    assert single.schedule is None
    lowest = next(
        share for share in (i / 50 for i in range(50)) if solve(at_share(problem, share), "dtr", QUICK).schedule
    )
    answer = solve(at_share(problem, lowest), "dtr", QUICK)
    assert answer.schedule is not None
    assert max(answer.schedule.count(o) for o in set(answer.schedule)) > 2


def test_every_reference_solver_is_in_the_table() -> None:
    assert set(REFERENCE) < set(SOLVERS)


def _without_codecs(problem: Problem) -> Problem:
    from dataclasses import replace

    from solvers import Kind

    last = max(i for i, op in enumerate(problem.ops) if op.kind is Kind.COMPUTE)
    costly = tuple(op if op.kind is Kind.COMPUTE else replace(op, cost_ns=10_000_000) for op in problem.ops[: last + 1])
    return replace(problem, ops=(*costly, *problem.ops[last + 1 :]))
