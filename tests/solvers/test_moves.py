"""Siblings move together, and what waits for a restore is held in the linear relaxation, too."""

from __future__ import annotations

import numpy as np
import pytest

from solvers import Limits, Op, Problem, Status, simulate, solve
from solvers.evaluate import keep_everything, profiles
from solvers.ilp import settled
from solvers.moves import DROP, KEEP, flips, joined, moves, together, try_moves
from solvers.relax import LinearProgram
from solvers.rounds import Rounds
from solvers.units import build_units
from tests.solvers.problems import at_share, random_problem


def cells(count: int, gates: int = 4, size: int = 10, dear: int = 100) -> Problem:
    """Cells whose dear product is as large as the gates made from it, which alone the backward reads."""
    ops, sizes = [Op("x", (), (0,), 0, repeatable=False)], [1]
    read: list[tuple[int, ...]] = []
    for _ in range(count):
        product = len(sizes)
        sizes += [gates * size, *[size] * gates]
        ops.append(Op(f"product{product}", (0,), (product,), dear))
        made = tuple(range(product + 1, product + 1 + gates))
        ops += [Op(f"gate{v}", (product,), (v,), 1) for v in made]
        read.append(made)
    sizes.append(1)
    turn, grad = len(ops), len(sizes) - 1
    ops.append(Op("turn", (read[-1][0],), (grad,), 0, repeatable=False))
    for made in reversed(read):
        sizes.append(1)
        ops.append(Op(f"back{made[0]}", (grad, *made), (len(sizes) - 1,), dear))
        grad = len(sizes) - 1
    names = tuple(f"v{v}" for v in range(len(sizes)))
    problem = Problem("cells", tuple(ops), tuple(range(len(ops))), turn, tuple(sizes), names, frozenset({grad}), 0, 0)
    return problem.with_budget(simulate(problem, problem.program).peak_bytes)


def test_units_that_restore_from_one_are_siblings() -> None:
    units = build_units(cells(3))
    assert sorted(map(len, units.siblings)) == [4, 4, 4]
    fates = keep_everything(units)
    assert not len(together(units, fates, KEEP))
    dropped = together(units, fates, DROP)
    assert dropped.shape == (3, 4, 2)
    costs, _, _ = try_moves(units, fates, dropped, 0.0)
    one, _, _ = try_moves(units, fates, dropped[:, :1], 0.0)
    cost = profiles(units, fates[None, :]).cost_ns[0]
    assert (costs - cost < 1.1 * (one - cost)).all()


@pytest.mark.parametrize("seed", range(30))
def test_a_move_is_what_its_flips_are(seed: int) -> None:
    units = build_units(random_problem(87_000 + seed, 14))
    fates = keep_everything(units)
    every = moves(units, fates)
    if not len(every):
        return
    assert len(every) >= len(flips(units, fates))
    costs, areas, peaks = try_moves(units, fates, every, 0.5 * units.problem.budget_bytes)
    for move, cost, area, peak in zip(every, costs, areas, peaks, strict=True):
        other = fates.copy()
        for a, m in move:
            other[a] = m
        alone = profiles(units, other[None, :])
        assert (alone.cost_ns[0], alone.peak_bytes()[0]) == (cost, peak)
        assert alone.excess(0.5 * units.problem.budget_bytes)[0] == area


def test_joined_repeats_the_first_part() -> None:
    narrow, wide = np.array([[1, 0]]), np.array([[[2, 1], [3, 1]]])
    assert joined(narrow, wide).tolist() == [[[1, 0], [1, 0]], [[2, 1], [3, 1]]]


def test_what_waits_for_half_a_restore_is_held() -> None:
    """Half the bytes can stay, so half the products are computed again: halves of fates do no better."""
    problem = cells(8)
    units = build_units(problem)
    floor = int(units.floor_bytes.max())
    tight = problem.with_budget(floor + (problem.budget_bytes - floor) // 2)
    rounds = Rounds(build_units(tight), tight.budget_bytes, {tight.turn})
    _, bound = LinearProgram(rounds.model()).solve(10.0)
    assert bound - problem.program_cost_ns() > 0.35 * 8 * 100
    answer = solve(tight, "auto", Limits(seconds=10))
    assert answer.status is Status.OPTIMAL
    assert answer.schedule is not None
    assert bound <= simulate(tight, answer.schedule).cost_ns


def test_rounds_with_fixed_fates_prove_nothing() -> None:
    problem = at_share(cells(6), 0.6)
    units = build_units(problem)
    rounds = Rounds(units, problem.budget_bytes, {problem.turn})
    whole = rounds.solve(Limits(), 10.0, None)
    assert whole.fates is not None
    assert whole.optimal
    assert whole.bound > 0
    shares = tuple(
        tuple(float(m == chosen) for m in range(len(u.fates)))
        for u, chosen in zip(units.units, whole.fates, strict=True)
    )
    pairs = settled(shares, whole.fates)
    assert len(pairs) == len(units.units)
    fixed = rounds.solve(Limits(), 10.0, None, pairs)
    assert fixed.fates is not None
    assert not fixed.optimal
    assert not fixed.infeasible
    assert fixed.bound == 0.0
    everything = tuple((a, 0) for a in range(len(units.units)))
    assert not rounds.solve(Limits(), 10.0, None, everything).infeasible
