"""Melon: drop what is largest, longest idle and cheapest to compute again, until the plan fits.

Wang et al. 2022 (Melon: Breaking the Memory Wall for Resource-Efficient On-Device Machine Learning, MobiSys) score an
activation by size * lifetime / recompute cost. Here: of the units that are live where the plan peaks, the one with
the highest score is recomputed; repeat. Cannot model: codecs, what a drop makes necessary elsewhere.
"""

from __future__ import annotations

import numpy as np

from solvers.bounds import ANY_PLAN, cost_floor
from solvers.evaluate import keep_everything, profiles, to_schedule
from solvers.problem import Limits, Problem, Solution
from solvers.search import Search
from solvers.units import Unit, build_units


def solve_melon(problem: Problem, limits: Limits) -> Solution:
    """Return the first plan on the way down that fits; proves nothing."""
    units = build_units(problem)
    search = Search(problem, limits, "melon")
    fates = keep_everything(units)
    search.offer(problem.program, fates)
    score = np.array([_score(u) for u in units.units])
    while search.schedule is None and search.left() > 0:
        found = profiles(units, fates[None, :]).bytes_at[:, 0]
        peak = int(np.argmax(found))
        over = np.array([m == 0 and _idle(u, peak) for u, m in zip(units.units, fates, strict=True)])
        if found[peak] <= problem.budget_bytes or not over.any():
            break
        fates[int(np.argmax(np.where(over, score, -1.0)))] = 1
        search.offer(to_schedule(units, fates), fates)
    return search.answer(cost_floor(problem, units), ANY_PLAN)


def _score(unit: Unit) -> float:
    if len(unit.fates) < 2 or unit.fates[1].name != "drop":
        return 0.0
    held = unit.fates[0].held
    idle = min(unit.fates[1].first_read, max(h.last_backward for h in held)) - max(h.last_forward for h in held)
    return unit.size_bytes * max(0, idle) / max(1, unit.fates[1].restore_ns)


def _idle(unit: Unit, position: int) -> bool:
    """Whether dropping the unit makes it smaller at this position."""
    if len(unit.fates) < 2 or unit.fates[1].name != "drop":
        return False
    last = max(h.last_forward for h in unit.fates[0].held)
    return last < position <= unit.fates[1].first_read and unit.fates[1].first_read < 1 << 40
