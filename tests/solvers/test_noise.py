"""Lossy encodes in the Problem: the cap on their noise holds in every answer, and the exact solvers are exact."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from solvers import (
    SOLVERS,
    InvalidSchedule,
    Kind,
    Limits,
    MalformedProblem,
    Problem,
    Status,
    least_peak,
    simulate,
    solve,
)
from solvers.bounds import ANY_PLAN
from solvers.evaluate import allowed, exact, profiles
from solvers.oracle import oracle_least_peak
from solvers.tables import CLASH_NS
from solvers.units import build_units
from tests.solvers.problems import noisy_problem

EXACT = Limits(seconds=20, gap=0.0)


def noise_of(problem: Problem, schedule: tuple[int, ...]) -> int:
    """What the checker says, beside the plain sum over the encodes."""
    usage = simulate(problem, schedule)
    assert usage.noise_ppb == sum(problem.ops[o].noise_ppb for o in set(schedule))
    return usage.noise_ppb


def brute_force(problem: Problem) -> list[tuple[int, int]]:
    """(cost, peak) of every fate vector within the noise limit; the evaluator and `simulate` agree on which are."""
    units = build_units(problem)
    vectors = list(product(*(range(len(u.fates)) for u in units.units)))
    every = np.array(vectors, np.int16).reshape(len(vectors), len(units.units))
    fast, found = profiles(units, every), []
    for fates, cost, noisy in zip(every, fast.cost_ns, fast.refused, strict=True):
        if cost >= CLASH_NS:
            continue
        if noisy:
            with pytest.raises(InvalidSchedule, match="noise"):
                exact(units, fates)
            fates = allowed(units, fates)
        usage = exact(units, fates)
        if not noisy:
            assert usage.cost_ns == cost
            found.append((usage.cost_ns, usage.peak_bytes))
    return found


@pytest.mark.parametrize("block", range(3))
def test_exact_solvers_reach_brute_force(block: int) -> None:
    tried = chosen = 0
    for seed in range(60 * block, 60 * block + 60):
        problem = noisy_problem(seed, 2 + seed % 3, joint=seed % 2 == 0)
        if np.prod([len(u.fates) for u in build_units(problem).units], dtype=np.float64) > 800:
            continue
        found = brute_force(problem)
        costs = [cost for cost, peak in found if peak <= problem.budget_bytes]
        for name in ("ilp", "auto"):
            answer = solve(problem, name, EXACT)
            if costs:
                assert answer.schedule is not None
                assert simulate(problem, answer.schedule).cost_ns == min(costs), seed
                chosen += noise_of(problem, answer.schedule) > 0
            elif answer.schedule is not None:  # it recomputes a value twice
                assert answer.bound_class == ANY_PLAN
                noise_of(problem, answer.schedule)
        tried += 1
    assert tried >= 20
    assert chosen >= 2


@pytest.mark.parametrize("block", range(4))
def test_no_solver_breaks_the_cap_or_beats_the_oracle(block: int) -> None:
    for seed in range(500 + 10 * block, 510 + 10 * block):
        problem = noisy_problem(seed, 1 + seed % 2, joint=True)
        if len(problem.value_bytes) > 14:
            continue
        oracle = solve(problem, "oracle", EXACT)
        for name in SOLVERS:
            answer = solve(problem, name, EXACT)  # itself simulates the answer, noise and all
            if answer.schedule is not None:
                assert oracle.schedule is not None
                assert simulate(problem, oracle.schedule).cost_ns <= simulate(problem, answer.schedule).cost_ns
        lowest, reached = oracle_least_peak(problem), least_peak(problem, EXACT).least_peak_bytes
        assert lowest is not None
        assert reached is not None
        assert lowest <= reached


def test_larger_problems_stay_within_the_cap() -> None:
    used = 0
    for seed in range(900, 909):
        problem = noisy_problem(seed, 14, joint=seed > 905)
        for name in ("auto", "greedy", "ilp"):
            answer = solve(problem, name, Limits(seconds=2))
            if answer.schedule is not None:
                used += noise_of(problem, answer.schedule) > 0
        assert least_peak(problem, Limits(seconds=1)).schedule is not None
    assert used >= 3


def test_more_noise_never_costs_more() -> None:
    for seed in range(40, 50):
        problem = noisy_problem(seed, 5)
        found = []
        for limit in (0, 10, 40, 10_000):
            answer = solve(replace(problem, noise_limit_ppb=limit), "auto", EXACT)
            cost = None
            if answer.schedule is not None:
                cost = simulate(replace(problem, noise_limit_ppb=limit), answer.schedule).cost_ns
            found.append(cost)
        assert found == sorted(found, key=lambda c: (c is not None, -(c or 0)))
        assert all(b is not None for a, b in pairwise(found) if a is not None)


def test_the_same_code_counts_once() -> None:
    problem = replace(noisy_problem(900, 14), noise_limit_ppb=10_000, budget_bytes=1 << 40)
    encode = next(o for o, op in enumerate(problem.ops) if op.noise_ppb)
    at = problem.turn
    schedule = (*problem.program[:at], encode, encode, *problem.program[at:])
    assert simulate(problem, schedule).noise_ppb == problem.ops[encode].noise_ppb
    with pytest.raises(InvalidSchedule, match=f"add {problem.ops[encode].noise_ppb} ppb of noise"):
        simulate(replace(problem, noise_limit_ppb=problem.ops[encode].noise_ppb - 1), schedule)
    assert Problem.from_json(problem.to_json()) == problem


def test_only_an_encode_is_noisy() -> None:
    problem = noisy_problem(900, 14)
    wrong = tuple(replace(op, noise_ppb=1) if op.kind is not Kind.ENCODE else op for op in problem.ops)
    with pytest.raises(MalformedProblem, match="only an encode"):
        replace(problem, ops=wrong).verify()
    with pytest.raises(MalformedProblem, match="noise limit"):
        replace(problem, noise_limit_ppb=-1).verify()


def test_nothing_lossy_without_a_limit() -> None:
    for seed in range(900, 904):
        problem = replace(noisy_problem(seed, 14), noise_limit_ppb=0)
        answer = solve(problem, "auto", Limits(seconds=3))
        assert answer.status is not Status.FEASIBLE or answer.schedule is not None
        if answer.schedule is not None:
            assert noise_of(problem, answer.schedule) == 0
