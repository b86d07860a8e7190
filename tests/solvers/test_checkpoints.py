"""Checkpoints are plans: what they hold is what crosses their places, and simulate agrees with their profile."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Op, Problem, simulate, solve
from solvers.checkpoints import PARTS, checkpointed, encoded
from solvers.evaluate import keep_everything, profiles, to_schedule
from solvers.moves import DROP, KEEP
from solvers.problem import Limits
from solvers.units import build_units
from tests.solvers.problems import noisy_problem, random_problem


def ladder(length: int, rungs: int = 3, wide: int = 20, narrow: int = 1) -> Problem:
    """A chain of cells: `rungs` wide values, then one narrow one that alone the next cell reads."""
    ops, sizes, head = [Op("x", (), (0,), 0, repeatable=False)], [narrow], 0
    read: list[int] = []
    for _ in range(length):
        for size in (*[wide] * rungs, narrow):
            ops.append(Op(f"op{len(sizes)}", (head,), (len(sizes),), 10))
            head = len(sizes)
            sizes.append(size)
            read.append(head)
    turn, grad = len(ops), len(sizes)
    sizes.append(narrow)
    ops.append(Op("turn", (head,), (grad,), 0, repeatable=False))
    for v in reversed(read):
        sizes.append(narrow)
        ops.append(Op(f"back{v}", (grad, v), (len(sizes) - 1,), 10))
        grad = len(sizes) - 1
    names = tuple(f"v{v}" for v in range(len(sizes)))
    problem = Problem("ladder", tuple(ops), tuple(range(len(ops))), turn, tuple(sizes), names, frozenset({grad}), 0, 0)
    return problem.with_budget(simulate(problem, problem.program).peak_bytes)


def test_segments_end_where_they_are_narrow() -> None:
    units = build_units(ladder(36))
    sizes = np.array([u.size_bytes for u in units.units])
    kept = checkpointed(units)[1:] == KEEP
    droppable = (checkpointed(units) == DROP).any(axis=0)
    held = [int(sizes[droppable & plan].max(initial=0)) for plan in kept]
    assert held[:8] == [1] * 8  # no wide value crosses, where every segment has several cells


def test_the_best_of_them_is_of_the_order_of_the_root() -> None:
    problem = ladder(36)
    units = build_units(problem)
    plans = checkpointed(units)
    best = profiles(units, plans).peak_bytes().min()
    assert best < 0.35 * problem.budget_bytes


@given(seed=st.integers(0, 10_000), ops=st.integers(1, 14))
@settings(max_examples=60, deadline=None)
def test_they_are_plans_that_simulate_knows(seed: int, ops: int) -> None:
    units = build_units(random_problem(seed, ops))
    plans = checkpointed(units)
    assert (plans[0] == keep_everything(units)).all()
    found = profiles(units, plans)
    for plan, cost, peak, refused in zip(plans, found.cost_ns, found.peak_bytes(), found.refused, strict=True):
        if not refused:
            usage = simulate(units.problem, to_schedule(units, plan))
            assert usage.cost_ns == cost
            assert usage.peak_bytes <= peak


def test_a_small_budget_of_a_long_graph_is_met_at_once() -> None:
    problem = ladder(300)
    units = build_units(problem)
    small = problem.with_budget(int(profiles(units, checkpointed(units)).peak_bytes().min()))
    answer = solve(small, "auto", Limits(seconds=2))
    assert answer.schedule is not None
    assert simulate(small, answer.schedule).peak_bytes <= small.budget_bytes


@pytest.mark.parametrize("seed", range(30))
def test_encoded_plans_keep_the_noise_and_free_more_for_more(seed: int) -> None:
    problem, freed = noisy_problem(51_000 + seed, 8, joint=True), []
    for limit in (0, 20, 100_000):
        units = build_units(replace(problem, noise_limit_ppb=limit))
        plans = encoded(units)
        if not len(plans):  # nothing to encode
            return
        assert len(plans) == len(PARTS)
        assert not profiles(units, plans).refused.any()
        for fates in plans:
            simulate(units.problem, to_schedule(units, fates))
        chosen = [u.fates[m] for u, m in zip(units.units, plans[0], strict=True)]
        codes = [
            sum(h.size_bytes for h in f.held if h.dropped) - f.encoded_bytes for f in chosen if f.encode is not None
        ]
        freed.append(sum(codes))
    if not units.clashes:
        assert freed == sorted(freed)


def test_without_codecs_nothing_is_encoded() -> None:
    assert not len(encoded(build_units(ladder(6))))
