"""Greedy: from keep-all, the best memory for the time until it fits; then polish.

Each step looks at flips of one unit to another fate and takes the largest reduction of the area above the budget per
added nanosecond (the eviction score of Kirisame et al. 2021, DTR, made global: a flip is charged with everything that
it makes necessary). Polish undoes flips that are not needed, and tries to undo one that pays for others.
"""

from __future__ import annotations

import numpy as np

from solvers.bounds import ANY_PLAN, cost_floor
from solvers.evaluate import Fates, allowed, keep_everything, profiles, to_schedule
from solvers.moves import moves, savings, try_moves
from solvers.problem import Limits, Problem, Solution
from solvers.promising import Promising
from solvers.search import Search
from solvers.units import Int64, Units, build_units

POOL = 48  # flips looked at again in every step; all of them are, whenever the pool runs dry
STRIDE = 8  # of that many flips at most one is taken in one step
MISSES = 4  # flips that no longer help, before polish evaluates all of them again
REPAIR_SHARE = 0.6  # of the time: a plan at all comes first
POLISH_SHARE = 0.1  # of the time at least
UNIT_WORK, POSITION_WORK = 2.5e-8, 8e-9  # of each unit and position of a plan that is evaluated
ASK_WORK = 2e-6  # of each unit, in making a list of plans to evaluate
LOOK = 0.05  # work of one look at flips; where there are more, the most promising are looked at first


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
    share, search.share = search.share, max(search.share, REPAIR_SHARE)
    fates = repair(search, units, start)
    search.share = max(share, min(1.0, search.seconds() / search.limits.seconds + POLISH_SHARE))
    if fates is None:
        return
    search.offer(to_schedule(units, fates), fates)
    fates = polish(search, units, fates)
    search.offer(to_schedule(units, fates), fates)
    exchange(search, units, fates, tries)


def repair(search: Search, units: Units, start: Fates, budget: float | None = None) -> Fates | None:
    """Flip until the plan fits the budget; None when no single flip helps any more."""
    budget = search.problem.budget_bytes if budget is None else budget
    fates = descend(search, units, start, budget)
    return fates if profiles(units, fates[None, :]).excess(budget)[0] <= 0 else None


def descend(search: Search, units: Units, start: Fates, budget: float, by_area: bool = False) -> Fates:
    """Flip until the plan fits the budget or no single flip helps; return the plan of least peak (area) on the way.

    Flips that kept their promise together are doubled, so that a thousand of them take few evaluations.
    """
    walk = _Walk(search, units, start.copy(), budget)
    pool, several = walk.pool(), 1
    fresh = True
    while walk.area > 0 and search.left() > 0 and len(pool):
        costs, areas, peaks = walk.look(pool)
        score = (walk.area - areas) / np.maximum(costs - walk.cost, 1)
        order = np.argsort(-score, kind="stable")[: max(1, np.isfinite(areas).sum())]
        if areas[order[0]] >= walk.area:
            if fresh and walk.whole:
                break
            pool, fresh = walk.pool(whole=fresh), True
            continue
        took = several > 1 and walk.take(
            pool[order[:several]], walk.area - (walk.area - areas[order[:several]]).sum() / 2
        )
        if not took:
            i, several = order[0], 1
            walk.step(pool[i], int(costs[i]), float(areas[i]), int(peaks[i]))
        taken = pool[order[:several], :, 0]
        several = min(2 * several, len(order) // STRIDE + 1)
        fresh = len(pool) <= POOL // 4
        pool = walk.pool() if fresh else pool[order[: POOL + len(taken)]]
        pool = pool[~np.isin(pool[:, :, 0], taken).any(axis=1)]
    return walk.fates if by_area else walk.best


class _Walk:
    """A plan on its way down: its cost, area above the budget, and the least peak met."""

    def __init__(self, search: Search, units: Units, fates: Fates, budget: float) -> None:
        self.search, self.units, self.budget = search, units, budget
        self.best, self.best_peak = fates, np.iinfo(np.int64).max
        self.fates, self.cost, self.area = fates, 0, 0.0
        self.promising: Promising | None = None
        self.whole = True  # whether the last pool was of all flips
        self._stand(allowed(units, fates))

    def pool(self, whole: bool = False) -> Int64:
        """Return all moves; the most promising, where it is not asked for the whole and that is too large a look."""
        pool = moves(self.units, self.fates)
        self.whole = whole or evaluation(self.units, len(pool)) <= LOOK
        if self.whole:
            return pool
        self.promising = self.promising or Promising(self.units)
        self.search.spend(evaluation(self.units, 1))
        count = int(LOOK / evaluation(self.units, 1000) * 1000)
        return self.promising.best(self.fates, self.budget, max(POOL, count))

    def _stand(self, fates: Fates) -> None:
        now = profiles(self.units, fates[None, :])
        self.search.spend(evaluation(self.units, 1))
        self.fates, self.cost, self.area = fates, int(now.cost_ns[0]), float(now.excess(self.budget)[0])
        if not now.refused[0]:
            self._remember(int(now.peak_bytes()[0]))

    def _remember(self, peak: int) -> None:
        if peak < self.best_peak:
            self.best, self.best_peak = self.fates.copy(), peak

    def look(self, pool: Int64) -> tuple[Int64, np.ndarray, Int64]:
        """Cost, area and peak after each move of the pool."""
        self.search.spend(evaluation(self.units, len(pool)))
        return try_moves(self.units, self.fates, pool, self.budget)

    def step(self, move: Int64, cost: int, area: float, peak: int) -> None:
        """Take one move whose outcome is known."""
        self.fates[move[:, 0]], self.cost, self.area = move[:, 1], cost, area
        self._remember(peak)

    def take(self, some: Int64, at_most: float) -> bool:
        """Take several moves at once if they leave `at_most` this area; return whether they do."""
        before = self.fates, self.cost, self.area
        fates = self.fates.copy()
        fates[some[:, :, 0]] = some[:, :, 1]
        self._stand(fates)
        if self.area <= at_most:
            return True
        self.fates, self.cost, self.area = before
        return False


def evaluation(units: Units, plans: int) -> float:
    """Return what evaluating so many plans costs, in the unit of `Search.spend`."""
    plan = UNIT_WORK * len(units.units) + POSITION_WORK * len(units.problem.program)
    return ASK_WORK * len(units.units) + plans * plan


def polish(search: Search, units: Units, fates: Fates, budget: float | None = None) -> Fates:
    """Take the flips that save most time and still fit, until there are none."""
    budget = search.problem.budget_bytes if budget is None else budget
    cost, before = int(profiles(units, fates[None, :]).cost_ns[0]), 0
    while cost != before and search.left() > 0:
        pairs, before = savings(units, fates), cost
        if not len(pairs):
            break
        costs, areas, _ = try_moves(units, fates, pairs, budget)
        search.spend(evaluation(units, len(pairs)))
        good = np.flatnonzero((areas <= 0) & (costs < cost))
        fates, cost = _take_all(search, units, fates, pairs[good[np.argsort(costs[good], kind="stable")]], budget)
    return fates


def _take_all(search: Search, units: Units, fates: Fates, pairs: Int64, budget: float) -> tuple[Fates, int]:
    """Take flips that save and fit alone, in their order, as far as they do together; return the plan and its cost.

    Twice as many at once while that works, half of them where it does not.
    """
    cost, misses, done, several = int(profiles(units, fates[None, :]).cost_ns[0]), 0, 0, 1
    while done < len(pairs) and misses < MISSES and search.left() > 0:
        some = pairs[done : done + several]
        other = fates.copy()
        other[some[:, :, 0]] = some[:, :, 1]
        now = profiles(units, other[None, :])
        if now.cost_ns[0] < cost and now.excess(budget)[0] <= 0:
            fates, cost, done, several = other, int(now.cost_ns[0]), done + len(some), 2 * several
        elif len(some) > 1:
            several = len(some) // 2
        else:
            misses, done = misses + 1, done + 1
    return fates, cost


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
