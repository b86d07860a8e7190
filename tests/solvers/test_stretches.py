"""Stretches of the forward decided again: they cover it, help a long graph, and never break a plan."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from solvers import Limits, Problem, simulate, working_set
from solvers.evaluate import keep_everything, profiles
from solvers.greedy import improve
from solvers.ilp import tighten
from solvers.relax import LinearProgram
from solvers.rounds import Rounds
from solvers.search import Search
from solvers.stretches import OVERLAP, STRETCHES, free_stretches, stretches
from solvers.units import Units, build_units
from tests.solvers.problems import noisy_problem, random_problem

STORED = Path(__file__).parents[2] / "bench" / "problems"


def recurrent() -> tuple[Search, Units]:
    """Return a search on a recurrent graph of 541 ops at 0.6 of its peak, with the plan of single flips."""
    problem = Problem.from_json((STORED / "lstm_small.json").read_text())
    units = build_units(problem)
    top = int(profiles(units, keep_everything(units)[None, :]).peak_bytes()[0])
    tight = problem.with_budget(int(0.6 * top))
    search, units = Search(tight, Limits(seconds=60), "ilp"), build_units(tight)
    improve(search, units, keep_everything(units), tries=0)
    return search, units


@pytest.mark.parametrize("seed", range(20))
def test_stretches_cover_all_units_and_overlap(seed: int) -> None:
    units = build_units(random_problem(51_000 + seed, 14))
    count = len(units.units)
    for parts in STRETCHES:
        found = stretches(units, parts)
        assert set().union(*found) == set(range(count))
        assert all(len(free) <= (1 + OVERLAP) * count / parts + 2 for free in found)
        if count >= 4 * parts:
            assert all(a & b for a, b in pairwise(found))


def test_they_help_a_long_graph() -> None:
    """What single flips leave, stretches find."""
    search, units = recurrent()
    before = search.cost_ns
    assert before is not None
    search.bound_ns = 0
    free_stretches(search, Rounds.after(None, units, search))
    assert search.cost_ns is not None
    assert search.cost_ns < before
    assert search.schedule is not None
    assert simulate(search.problem, search.schedule).peak_bytes <= search.problem.budget_bytes


def test_more_rows_bound_a_long_graph_better() -> None:
    """The bound that a few peaks at once give is above that of the first rows, and of no plan."""
    search, units = recurrent()
    rounds = Rounds.after(None, units, search)
    _, first = LinearProgram(rounds.model()).solve(30)
    search.bound_ns = math.ceil(first)
    tighter = tighten(search, rounds)
    assert tighter is not None
    assert search.cost_ns is not None
    assert first < tighter.wait() <= search.cost_ns


def test_a_model_that_is_kept_forgets_what_was_fixed() -> None:
    """Rounds of the same rows share one model; what one of them fixed does not bind the next, nor a linear program."""
    search, units = recurrent()
    rounds = Rounds.after(None, units, search)
    model, (_, bound) = rounds.model(), LinearProgram(rounds.model()).solve(30)
    assert search.fates is not None
    kept = rounds.solve(search.limits, 30, None, tuple((a, int(m)) for a, m in enumerate(search.fates)))
    assert kept.fates is not None
    assert (kept.fates == search.fates).all()
    assert rounds.model() is model
    assert LinearProgram(rounds.model()).solve(30)[1] == pytest.approx(bound)
    rounds.rows.add(max(rounds.rows) - 1)
    assert rounds.model() is not model


@pytest.mark.parametrize("seed", [7074, 7188])
def test_two_stretches_at_once_keep_the_noise(seed: int) -> None:
    """Each has the noise that is left: what both chose together may be too much, and was offered as it stood."""
    problem = replace(noisy_problem(seed, 14), noise_limit_ppb=30)
    problem = problem.with_budget(int(1.3 * working_set(problem).peak_bytes))
    units, search = build_units(problem), Search(problem, Limits(seconds=20), "ilp")
    improve(search, units, keep_everything(units), tries=0)
    search.bound_ns = 0
    free_stretches(search, Rounds.after(None, units, search))
    assert search.schedule is not None
    assert simulate(problem, search.schedule).noise_ppb <= 30
