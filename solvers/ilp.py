"""The exact solver of the class `ONE_RECOMPUTE`: epoch rows and cuts, added until `simulate` agrees.

Every round solves a relaxation (CP-SAT, integers all over), reads its fates, simulates them, and adds the positions at
which they do not fit as rows, and what happens between positions as cuts. The bound of every round is therefore valid
for the class, and a plan that fits and meets it is proven.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from solvers.any_plan import any_plan_bound, spaced_rows
from solvers.bounds import ANY_PLAN, ONE_RECOMPUTE, cost_floor
from solvers.checkpoints import checkpointed
from solvers.evaluate import Fates, keep_everything, profiles
from solvers.greedy import improve
from solvers.problem import Limits, Problem, Solution, Status
from solvers.relax import LINEAR_SIZE, Beside, LinearProgram, coefficients, round_all
from solvers.rounds import WIDE, Pairs, Rounds, mend, new_rows, start_rows, take
from solvers.search import Search
from solvers.stretches import free_stretches
from solvers.units import Units, build_units

Shares = tuple[tuple[float, ...], ...]  # of every fate of every unit, in a linear relaxation

ROUNDS = 200
LINEAR_ROUNDS = 3
LINEAR_SHARE = 0.85  # of the time, which linear relaxations after the first leave to the integers
MENDED = 2  # roundings of one linear program that are repaired, the next one where the last was the best so far
TIGHTER = 1  # rows spread over the backward beside peaks, of a linear program that bounds a wide gap better
STARTS, STARTS_SHARE = 4, 0.3  # so many, while this part of the time is left
ANY_SECONDS, ANY_SHARE = 1.0, 0.05  # at least, and of the time, for the bound on any plan
SETTLED = 0.99  # of a fate in the linear relaxation
SLICE = 0.4  # of the time left, for one round


def solve_ilp(problem: Problem, limits: Limits) -> Solution:
    """Return the cheapest plan with one recompute a value, proven where time allows, and a bound for the
    class.

    INFEASIBLE is a proof for the class, not for plans that recompute a value twice.
    """
    units = build_units(problem)
    search = Search(problem, limits, "ilp")
    search.offer(problem.program, keep_everything(units))
    improve(search, units, keep_everything(units), tries=0)
    return prove(search, units)[0]


def prove(
    search: Search,
    units: Units,
    before: Rounds | None = None,
    any_seconds: float = ANY_SECONDS,
    patience: float = 0.0,
) -> tuple[Solution, Rounds]:
    """Improve the plan that `search` holds and bound it, until both meet or time is up.

    `before` are the rows and cuts that another budget of the same problem needed: they are as valid here. The bound on
    any plan has what is left of the time, at least `any_seconds`; a linear program has half of it, at least `patience`.
    """
    rounds = Rounds.after(before, units, search)
    search.share, search.bound_ns = 1.0 - ANY_SHARE, max(cost_floor(search.problem, units), rounds.bound())
    shares, near = relax(search, rounds, patience), False
    if before is None:
        mend_checkpoints(search, units)
        tighter = tighten(search, rounds)
        free_stretches(search, rounds)
        if tighter is not None and tighter.wait():
            search.bound_ns = max(search.bound_ns, tighter.bound)
            rounds.touch(tighter.program, tighter.bound)
    for _ in range(ROUNDS):
        if search.left() <= 0.05 or search.closed():
            break
        fixed = settled(shares, search.fates) if near else ()
        seconds = min(search.left(), max(SLICE * search.left(), 2.0))
        found = rounds.solve(search.limits, seconds, search.fates, fixed)
        if found.infeasible:
            if search.schedule is None:
                return infeasible(search), rounds
            return answer_any(search, units, rounds), rounds
        search.bound_ns = max(search.bound_ns, math.ceil(found.bound - 1e-6))
        if take(search, rounds, found):
            break
        near = not near and not found.optimal
    return _answer(search, units, rounds, any_seconds), rounds


def _answer(search: Search, units: Units, rounds: Rounds, any_seconds: float) -> Solution:
    bound = search.bound_ns or 0
    if search.fates is None and search.cost_ns is not None and search.cost_ns < bound:
        return answer_any(search, units, rounds)  # a plan outside the class beats all of it
    any_bound = bound_any(search, rounds, any_seconds)
    return replace(search.answer(bound, ONE_RECOMPUTE), any_bound_ns=any_bound)


def answer_any(search: Search, units: Units, rounds: Rounds | None = None) -> Solution:
    """Return the answer for a budget that only plans of more than one recompute a value fit."""
    rounds = rounds or Rounds.after(None, units, search)
    search.bound_ns = bound_any(search, rounds)
    return replace(search.answer(search.bound_ns, ANY_PLAN), any_bound_ns=search.bound_ns)


def bound_any(search: Search, rounds: Rounds, seconds: float = ANY_SECONDS) -> int:
    """Return the best bound on any plan over two row sets, if there is time: spaced ones are sometimes better.

    The first of them has at least `seconds`.
    """
    budget, known, search.share = search.problem.budget_bytes, search.any_bound_ns, 1.0
    search.any_bound_ns = max(search.any_bound_ns, cost_floor(search.problem, rounds.units))
    sets, seconds = ([rounds.rows], 0.0) if known else ([spaced_rows(search.problem), rounds.rows], seconds)
    for rows in sets:
        if max(seconds, search.left()) <= 0:
            break
        found = any_plan_bound(rounds.units, budget, rows, max(seconds, search.left()))
        search.any_bound_ns, seconds = max(search.any_bound_ns, found), 0.0
    return search.any_bound_ns


def relax(search: Search, rounds: Rounds, patience: float) -> Shares:
    """Bound the cost by the linear relaxation, add rows where its roundings do not fit, and mend those.

    Returns the share of every fate of every unit in the last optimum; nothing when there was none.
    """
    units, budget = rounds.units, search.problem.budget_bytes
    shares: Shares = ()
    # Rows of its own: those that roundings break only slow the integer search down.
    taught = rounds.tangents[-1].rows if rounds.tangents else frozenset[int]()
    rounds = replace(rounds, rows=rounds.rows | taught)
    for done in range(LINEAR_ROUNDS):
        late = search.left() <= LINEAR_SHARE * search.limits.seconds
        if search.closed() or (late and done):
            break
        model = rounds.model()
        if coefficients(model) > LINEAR_SIZE:
            break
        program = LinearProgram(model)
        values, bound = program.solve(max(patience, search.left() / 2))
        if math.isfinite(bound):
            search.bound_ns = max(search.bound_ns or 0, math.ceil(bound))
            rounds.touch(program, bound)
        if values is None:
            break
        shares = tuple(tuple(values[x.index] if len(xs) > 1 else 0.0 for x in xs) for xs in model.chosen)
        plans = round_all(model, values)
        found = profiles(units, plans)
        area = found.excess(budget)
        order = np.lexsort((found.cost_ns, area))
        for k in order[:MENDED]:
            if not mend(search, units, plans[k]):
                break
        new = new_rows(found.bytes_at[:, order[0]], budget, rounds.rows)
        if not new:
            break
        rounds.rows.update(new)
    return shares


def tighten(search: Search, rounds: Rounds) -> Beside | None:
    """Where a wide gap is left, begin to bound the cost by a linear program over more peaks of the plans at once.

    Rows that are added a few at a time, where roundings break them, are neighbours: a long graph would need dozens.
    """
    if search.closed(WIDE):
        return None
    rows = rounds.rows | start_rows(rounds.units, search.fates, spread=TIGHTER)
    model = replace(rounds, rows=rows).model()
    return Beside(LinearProgram(model), search.left) if coefficients(model) <= LINEAR_SIZE else None


def mend_checkpoints(search: Search, units: Units) -> None:
    """Where the linear relaxation left a wide gap, mend the cheapest of the `checkpointed` plans that do not fit."""
    if search.closed(WIDE):
        return
    plans = checkpointed(units)  # the first keeps everything, and `improve` has mended it
    found = profiles(units, plans)
    wide = 1 + np.flatnonzero(found.excess(search.problem.budget_bytes)[1:] > 0)
    for k in wide[np.argsort(found.cost_ns[wide], kind="stable")][:STARTS]:
        if search.closed(WIDE) or search.left() <= STARTS_SHARE * search.limits.seconds:
            break
        if not mend(search, units, plans[k]):
            break


def settled(shares: Shares, fates: Fates | None) -> Pairs:
    """Return the (unit, fate) pairs on which the best plan and the linear relaxation agree.

    With these fixed the rest is a small problem, in which a better plan often lies (RINS; Danna et al. 2005).
    """
    if fates is None:
        return ()
    return tuple((a, int(m)) for a, (m, parts) in enumerate(zip(fates, shares, strict=False)) if parts[m] > SETTLED)


def infeasible(search: Search) -> Solution:
    """Return the answer for a budget below the least peak of the class."""
    least = None if search.least is None else search.least[0]
    bound = search.bound_ns or 0
    return Solution(Status.INFEASIBLE, None, bound, ONE_RECOMPUTE, search.solver, search.seconds(), least)
