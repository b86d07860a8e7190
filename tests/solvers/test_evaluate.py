"""Plans are evaluated together as they are alone, and greedy fits where it looks at the most promising flips only."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Limits, Problem, simulate
from solvers import greedy as greedy_module
from solvers.evaluate import keep_everything, profiles, to_schedule
from solvers.greedy import repair
from solvers.moves import flips, savings, try_moves
from solvers.promising import Promising
from solvers.search import Search
from solvers.units import build_units
from tests.solvers.problems import problems, random_problem


@settings(max_examples=150, deadline=None)
@given(problems(10), st.randoms(use_true_random=False), st.floats(0, 1))
def test_plans_together_are_as_alone(problem: Problem, rng: random.Random, differ: float) -> None:
    units = build_units(problem)
    first = [rng.randrange(len(u.fates)) for u in units.units]
    plans = [
        [rng.randrange(len(u.fates)) if rng.random() < differ else m for u, m in zip(units.units, first, strict=True)]
        for _ in range(5)
    ]
    together = profiles(units, np.array(plans, np.int16))
    for k, plan in enumerate(plans):
        alone = profiles(units, np.array([plan], np.int16))
        assert together.cost_ns[k] == alone.cost_ns[0]
        assert together.refused[k] == alone.refused[0]
        assert (together.bytes_at[:, k] == alone.bytes_at[:, 0]).all()


@settings(max_examples=100, deadline=None)
@given(problems(12), st.floats(0.2, 1.0))
def test_nothing_that_saves_time_is_left_out(problem: Problem, share: float) -> None:
    units = build_units(problem)
    search = Search(problem, Limits(seconds=5), "greedy")
    fates = repair(search, units, keep_everything(units), share * problem.budget_bytes)
    if fates is None:
        return
    every, cost = flips(units, fates), profiles(units, fates[None, :]).cost_ns[0]
    if not len(every):
        return
    costs, _, _ = try_moves(units, fates, every, problem.budget_bytes)
    offered = {tuple(move[0]) for move in savings(units, fates)}
    assert offered >= {tuple(pair) for pair, c in zip(every, costs, strict=True) if c < cost}


def test_the_most_promising_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that all flips reach is reached by those that an estimate chooses, a dozen at a time."""
    reached = 0
    for seed in range(60):
        problem = _problem(seed)
        units = build_units(problem)
        found = []
        for look in (greedy_module.LOOK, 0.0):
            monkeypatch.setattr(greedy_module, "LOOK", look)
            search = Search(problem, Limits(seconds=5), "greedy")
            fates = repair(search, units, keep_everything(units))
            if fates is not None:
                assert simulate(problem, to_schedule(units, fates)).peak_bytes <= problem.budget_bytes
            found.append(fates is not None)
        reached += found[0]
        assert not found[0] or found[1]
    assert reached > 20


def test_what_frees_most_for_its_cost_is_promising() -> None:
    problem = _problem(3)
    units = build_units(problem)
    start = keep_everything(units)
    pairs = Promising(units).best(start, problem.budget_bytes, 8)
    _, areas, _ = try_moves(units, start, pairs, problem.budget_bytes)
    assert len(pairs)
    assert areas.min() < profiles(units, start[None, :]).excess(problem.budget_bytes)[0]


def _problem(seed: int) -> Problem:
    return random_problem(seed, 14, budget=0.6)
