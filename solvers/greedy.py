"""Greedy: from keep-all, the best memory for the time until it fits; then polish.

Each step looks at flips of one unit to another fate and takes the largest reduction of the area above the
budget
per added nanosecond (the eviction score of Kirisame et al. 2021, DTR, made global: a flip is charged with
everything
that it makes necessary). Polish undoes flips that are not needed, and tries to undo one that pays for others.
"""

from __future__ import annotations

import numpy as np

from solvers.bounds import ANY_PLAN, cost_floor
from solvers.evaluate import Fates, keep_everything, profiles, to_schedule
from solvers.problem import Limits, Problem, Solution
from solvers.search import Search
from solvers.units import Int64, Units, build_units

POOL = 48  # flips looked at again in every step; all of them are, whenever the pool runs dry
CELLS = 1_000_000  # plans x positions evaluated at once


def solve_greedy(problem: Problem, limits: Limits) -> Solution:
    """Return a plan found by repair and polish; proves nothing but the trivial bound."""
    units = build_units(problem)
    search = Search(problem, limits, "greedy")
    search.offer(problem.program, keep_everything(units))
    if search.schedule is None:
        improve(search, units, keep_everything(units))
    return search.answer(cost_floor(problem, units), ANY_PLAN)


def improve(search: Search, units: Units, start: Fates, tries: int = 8) -> None:
    """Repair `start` until it fits, polish it, and offer what comes of it to `search`."""
    fates = repair(search, units, start)
    if fates is None:
        return
    search.offer(to_schedule(units, fates), fates)
    fates = polish(search, units, fates)
    search.offer(to_schedule(units, fates), fates)
    exchange(search, units, fates, tries)


def flips(units: Units, fates: Fates) -> Int64:
    """Return every (unit, other fate) pair."""
    pairs = [(a, m) for a, u in enumerate(units.units) for m in range(len(u.fates)) if m != fates[a]]
    return np.array(pairs, np.int64).reshape(-1, 2)


def try_flips(units: Units, fates: Fates, pairs: Int64, budget: int) -> tuple[Int64, np.ndarray, Int64]:
    """Return cost, area above the budget, and peak after each flip."""
    chunk = max(16, CELLS // len(units.problem.program))
    parts = []
    for i in range(0, len(pairs), chunk):
        some = pairs[i : i + chunk]
        plans = np.repeat(fates[None, :], len(some), axis=0)
        plans[np.arange(len(some)), some[:, 0]] = some[:, 1]
        found = profiles(units, plans)
        parts.append((found.cost_ns, found.excess(budget), found.peak_bytes()))
    cost, area, peak = zip(*parts, strict=True)
    return np.concatenate(cost), np.concatenate(area), np.concatenate(peak)


def repair(search: Search, units: Units, start: Fates, budget: int | None = None) -> Fates | None:
    """Flip until the plan fits the budget; None when no single flip helps any more."""
    budget = search.problem.budget_bytes if budget is None else budget
    fates = start.copy()
    now = profiles(units, fates[None, :])
    cost, area = int(now.cost_ns[0]), float(now.excess(budget)[0])
    pool, fresh = flips(units, fates), True
    while area > 0 and search.left() > 0 and len(pool):
        costs, areas, _ = try_flips(units, fates, pool, budget)
        score = (area - areas) / np.maximum(costs - cost, 1)
        order = np.argsort(-score, kind="stable")
        best = order[0]
        if areas[best] >= area:
            if fresh:
                return None
            pool, fresh = flips(units, fates), True
            continue
        a, m = pool[best]
        fates[a], cost, area = m, int(costs[best]), float(areas[best])
        fresh = len(pool) <= POOL // 4
        pool = flips(units, fates) if fresh else pool[order[1 : POOL + 1]]
        pool = pool[pool[:, 0] != a]
    return fates if area <= 0 else None


def polish(search: Search, units: Units, fates: Fates) -> Fates:
    """Take the flip that saves most time and still fits, until there is none."""
    budget = search.problem.budget_bytes
    cost = int(profiles(units, fates[None, :]).cost_ns[0])
    while search.left() > 0:
        pairs = flips(units, fates)
        if not len(pairs):
            break
        costs, areas, _ = try_flips(units, fates, pairs, budget)
        costs = np.where(areas > 0, np.iinfo(np.int64).max, costs)
        best = int(np.argmin(costs))
        if costs[best] >= cost:
            break
        fates = fates.copy()
        fates[pairs[best, 0]], cost = pairs[best, 1], int(costs[best])
    return fates


def exchange(search: Search, units: Units, fates: Fates, tries: int) -> Fates:
    """Keep one unit that is not kept, repair, polish; accept when cheaper. At most `tries`."""
    cost = int(profiles(units, fates[None, :]).cost_ns[0])
    price = np.array([u.fates[m].restore_ns + u.fates[m].cost_ns for u, m in zip(units.units, fates, strict=True)])
    for a in np.argsort(-price, kind="stable")[:tries]:
        if fates[a] == 0 or search.left() <= 0:
            continue
        other = fates.copy()
        other[a] = 0
        mended = repair(search, units, other)
        if mended is None:
            continue
        mended = polish(search, units, mended)
        found = int(profiles(units, mended[None, :]).cost_ns[0])
        if found < cost:
            fates, cost = mended, found
            search.offer(to_schedule(units, fates), fates)
    return fates
