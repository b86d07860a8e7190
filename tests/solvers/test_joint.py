"""Ops that read several encodings: fates are priced each for itself, and plans with all of them are found."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from solvers import Kind, Limits, Op, Problem, simulate, solve, working_set
from solvers.evaluate import exact, fates_of, keep_everything, profiles, to_schedule
from solvers.joint import _closed
from solvers.units import build_units
from tests.solvers.problems import noisy_problem

SIZE, CODE = 100, 10


def attention(together: bool = True, dearer: int = 0) -> Problem:
    """Two values that one backward op reads, neither of which can come back, and what reads each or both codes."""
    ops = [
        Op("a", (), (0,), 5, repeatable=False),
        Op("b", (0,), (1,), 5, repeatable=False),
        Op("turn", (1,), (2,), 0, repeatable=False),
        Op("wide", (2,), (3,), 1, workspace_bytes=3 * SIZE),
        Op("back", (3, 0, 1), (4,), 10),
        Op("a_code", (0,), (5,), 1, kind=Kind.ENCODE),
        Op("b_code", (1,), (6,), 1, kind=Kind.ENCODE),
        Op("back_from_a", (3, 1, 5), (4,), 12, workspace_bytes=SIZE, instead_of=4),
        Op("back_from_b", (3, 0, 6), (4,), 13, workspace_bytes=SIZE, instead_of=4),
    ]
    if together:
        ops.append(Op("back_from_both", (3, 5, 6), (4,), 15 + dearer, workspace_bytes=2 * SIZE, instead_of=4))
    sizes = (SIZE, SIZE, 1, 1, 1, CODE, CODE)
    names = ("a", "b", "tangent", "grad", "end", "a_code", "b_code")
    return Problem("attention", tuple(ops), (0, 1, 2, 3, 4), 2, sizes, names, frozenset({4}), 0, 0)


def test_what_reads_both_codes_serves_both_fates() -> None:
    problem = attention()
    units = build_units(problem)
    assert units.joint == {frozenset({7, 8}): 9}
    assert not units.clashes
    fates = keep_everything(units) + 2  # read in place
    assert all(u.fates[2].encode is not None for u in units.units)
    schedule = to_schedule(units, fates)
    assert [problem.ops[o].name for o in schedule][-1] == "back_from_both"
    found, usage = profiles(units, fates[None, :]), exact(units, fates)
    assert (found.cost_ns[0], found.peak_bytes()[0]) == (usage.cost_ns, usage.peak_bytes)
    assert (fates_of(units, schedule) == fates).all()
    tight = problem.with_budget(3 * SIZE + 2 * CODE + 4)
    answer = solve(tight, "auto", Limits(seconds=5))
    assert answer.schedule == schedule


@pytest.mark.parametrize("problem", [attention(together=False), attention(dearer=1)])
def test_without_it_one_of_them_stays(problem: Problem) -> None:
    """And what costs more than its parts add is none: plans would be dearer than their bound says."""
    units = build_units(problem)
    assert not units.joint
    assert len(units.clashes) == 1
    fates = keep_everything(units) + 2  # read in place
    assert profiles(units, fates[None, :]).refused[0]
    with pytest.raises(ValueError, match="two alternatives chosen"):
        to_schedule(units, fates)


def test_the_working_set_knows_it() -> None:
    """The last op needs less from both codes than from one; nothing is below the bound."""
    problem = replace(attention(), value_bytes=(SIZE, 4 * SIZE, 1, 1, 1, CODE, CODE))
    assert working_set(problem).peak_bytes <= simulate(problem, (0, 5, 1, 6, 2, 3, 9)).peak_bytes


@pytest.mark.parametrize("missing", [(), ((1, 2, 3),), ((1, 2),), ((1, 4), (1, 2, 4))])
def test_all_that_go_together_by_twos(missing: tuple[tuple[int, ...], ...]) -> None:
    """Fates are held apart by twos: a triple that is missing though its pairs are there could not be said."""
    sets = [some for n in (2, 3, 4) for some in combinations((1, 2, 3, 4), n) if some not in missing]
    joint = {frozenset(some): 0 for some in sets}

    def pairs(some: tuple[int, ...]) -> bool:
        return all(frozenset(pair) in joint for pair in combinations(some, 2))

    every = [some for n in (3, 4) for some in combinations((1, 2, 3, 4), n)]
    assert _closed(joint) == all(pairs(some) == (frozenset(some) in joint) for some in every)


def test_pairs_that_do_not_go_together_are_apart() -> None:
    """Of 4-bit queries and 2-bit results none stands: each such pair is a group of its own."""
    seen = 0
    for seed in range(0, 400, 2):
        units = build_units(noisy_problem(seed, 3, joint=True))
        for group in units.clashes if units.joint else ():
            if len(group) == 2:
                seen += 1
                (a, m), (b, n) = group
                shared = {q for q, _ in units.units[a].fates[m].instead} & {
                    q for q, _ in units.units[b].fates[n].instead
                }
                assert shared
    assert seen > 5
