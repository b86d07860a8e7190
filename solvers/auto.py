"""The default: keep all if that fits, else greedy, else the least peak; then the exact solver for the time left.

Never worse than greedy, and infeasible exactly when the budget is below the peak that `least_peak` reaches. More
budget costs no more time where the exact solver closes the gap; where it cannot, the plans of smaller budgets on a
fixed ladder are candidates too.
"""

from __future__ import annotations

import numpy as np

from solvers.bounds import ANY_PLAN, ONE_RECOMPUTE, cost_floor, working_set
from solvers.evaluate import Fates, keep_everything, to_schedule
from solvers.greedy import exchange, improve, polish, repair
from solvers.ilp import closed, prove
from solvers.least import Least, find_least
from solvers.problem import Limits, Problem, Solution, Status
from solvers.search import Search
from solvers.units import Units, build_units

RUNGS = 4  # smaller budgets whose greedy plans are tried when the gap stays open
GREEDY_SHARE = 0.3  # of the time, before the exact solver has its turn


def solve_auto(problem: Problem, limits: Limits) -> Solution:
    """Return the best plan that the time allows, with the bound of the strongest class that was proven."""
    units = build_units(problem)
    search = Search(problem, limits, "auto")
    start, floor = keep_everything(units), cost_floor(problem, units)
    search.offer(problem.program, start)
    search.bound_ns = floor
    if closed(search):
        return search.answer(floor, ANY_PLAN)
    smallest = working_set(problem, units).peak_bytes
    if smallest > problem.budget_bytes:
        return _too_small(search, find_least(problem, units, limits), ANY_PLAN)
    if search.schedule is None:
        improve(search, units, start, tries=0)
    if search.schedule is None:
        least = find_least(problem, units, limits)
        if least.peak_bytes > problem.budget_bytes:
            return _too_small(search, least, ONE_RECOMPUTE)
        fates = np.array(least.fates, np.int16)
        search.offer(least.schedule, fates)
        relax(search, units, fates)
    solution = prove(search, units)
    if closed(search):
        return solution
    return search.answer(search.bound_ns or floor, ONE_RECOMPUTE)


def relax(search: Search, units: Units, fates: Fates) -> None:
    """Offer what polish makes of a plan for a smaller budget."""
    fates = polish(search, units, fates)
    search.offer(to_schedule(units, fates), fates)


def climb(search: Search, units: Units) -> None:
    """Offer the greedy plans of smaller budgets on a fixed ladder, polished for this budget."""
    low = working_set(search.problem, units).peak_bytes
    high = int(units.base_bytes.max()) + sum(u.size_bytes for u in units.units)
    for rung in range(1, RUNGS + 1):
        budget = low + (high - low) * rung // (RUNGS + 1)
        if budget >= search.problem.budget_bytes or search.left() <= 0:
            break
        fates = repair(search, units, keep_everything(units), budget)
        if fates is not None:
            relax(search, units, fates)
    if search.fates is not None:
        exchange(search, units, search.fates, len(units.units))


def _too_small(search: Search, least: Least, bound_class: str) -> Solution:
    proven = bound_class == ANY_PLAN or least.bound_bytes > search.problem.budget_bytes
    status = Status.INFEASIBLE if proven else Status.NOT_FOUND
    bound = search.bound_ns or 0
    return Solution(status, None, bound, bound_class, "auto", search.seconds(), least.peak_bytes)
