"""What moves would make of a plan, found from what they change, is what a sweep over each plan finds."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Problem
from solvers.evaluate import profiles
from solvers.moves import moves, try_moves
from solvers.units import build_units
from tests.solvers.problems import random_problem

STORED = Path(__file__).parents[2] / "bench" / "problems"
MOST = 300  # moves of one plan


def check(problem: Problem, seed: int, part: float) -> int:
    """Hold every move of a plan, of which about `part` of the units do not keep, against sweeps; return how many."""
    units, random = build_units(problem), np.random.default_rng(seed)
    count = np.array([len(u.fates) for u in units.units])
    other = (random.random(len(count)) * count).astype(int)
    fates = np.where(random.random(len(count)) < part, other, 0).astype(np.int16)
    some = moves(units, fates)
    some = some[random.permutation(len(some))[:MOST]]
    if not len(some):
        return 0
    budget = float(profiles(units, fates[None, :]).peak_bytes()[0]) * random.uniform(0.5, 1.0)
    costs, areas, peaks = try_moves(units, fates, some, budget)
    plans = np.repeat(fates[None, :], len(some), axis=0)
    for plan, move in zip(plans, some, strict=True):
        plan[move[:, 0]] = move[:, 1]
    swept = profiles(units, plans)
    assert costs.tolist() == swept.cost_ns.tolist()
    assert areas.tolist() == swept.excess(budget).tolist()
    assert peaks.tolist() == swept.peak_bytes().tolist()
    return len(some)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), part=st.floats(0.0, 1.0))
def test_on_random_problems(seed: int, part: float) -> None:
    check(random_problem(seed, Random(seed).randint(5, 40)), seed, part)


@pytest.mark.parametrize("name", ["lstm_small", "resnet50", "gpt", "bert", "densenet121"])
@pytest.mark.parametrize("part", [0.1, 0.9])
def test_on_stored_problems(name: str, part: float) -> None:
    assert check(Problem.from_json((STORED / f"{name}.json").read_text()), 1, part) > 20
