"""Chen et al. 2016: keep about sqrt(n) values at even distances in bytes, drop what lies between.

The segments of the paper, with our restores: a dropped value comes back right before it is needed, not with
its whole segment. Every segment count is tried and simulated.
"""

from __future__ import annotations

import numpy as np

from solvers.bounds import ANY_PLAN, cost_floor
from solvers.evaluate import Fates, keep_everything, to_schedule
from solvers.problem import Limits, Problem, Solution
from solvers.search import Search
from solvers.units import Units, build_units

COUNTS = 40  # segment counts tried at most


def solve_chen(problem: Problem, limits: Limits) -> Solution:
    """Return the cheapest segmentation that fits; proves nothing. Codecs are not used."""
    units = build_units(problem)
    search = Search(problem, limits, "chen")
    search.offer(problem.program, keep_everything(units))
    n = len(units.units)
    for count in sorted({round(c) for c in np.geomspace(1, max(n, 1), COUNTS)}):
        if search.left() <= 0:
            break
        fates = segments(units, count)
        search.offer(to_schedule(units, fates), fates)
    return search.answer(cost_floor(problem, units), ANY_PLAN)


def segments(units: Units, count: int) -> Fates:
    """Return the fate vector that keeps the last unit of each of `count` segments of equal bytes."""
    fates = keep_everything(units)
    droppable = [a for a, u in enumerate(units.units) if len(u.fates) > 1 and u.fates[1].name == "drop"]
    total = sum(units.units[a].size_bytes for a in droppable)
    passed, segment = 0, 1
    for a in droppable:
        passed += units.units[a].size_bytes
        if passed * count >= segment * total:
            segment += 1
        else:
            fates[a] = 1
    return fates
