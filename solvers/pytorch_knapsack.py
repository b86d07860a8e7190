"""PyTorch's activation_memory_budget on our costs: a 0/1 knapsack over what the backward saves.

torch/_functorch/partitioners.py (2.13), `choose_saved_values_set`: minimise the cost of recomputing what is not saved
subject to the bytes saved being at most a ratio of all of them; each cost counts alone. Its budget is a ratio of saved
bytes and not a peak, so all ratios from 0 to 1 by 0.05 are tried and the cheapest that fits answers.
Cannot model: chains (what a recompute needs may itself be dropped), transients, workspace, codecs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.bounds import ANY_PLAN, cost_floor
from solvers.evaluate import keep_everything, to_schedule
from solvers.problem import Limits, Problem, Solution
from solvers.search import Search
from solvers.units import build_units

RATIOS = tuple(i / 20 for i in range(21))
QUANTUM = 10_000  # parts of all saved bytes, as the original quantises (its `dp_knapsack`)


def solve_pytorch_knapsack(problem: Problem, limits: Limits) -> Solution:
    """Return the cheapest of the 21 ratios' plans that fits; proves nothing."""
    units = build_units(problem)
    search = Search(problem, limits, "pytorch_knapsack")
    keep = keep_everything(units)
    search.offer(problem.program, keep)
    items = [
        a
        for a, u in enumerate(units.units)
        if len(u.fates) > 1 and u.fates[1].name == "drop" and u.fates[1].first_read < len(problem.program)
    ]
    total = sum(units.units[a].size_bytes for a in items)
    sizes = [-(-units.units[a].size_bytes * QUANTUM // max(1, total)) for a in items]
    taken = _knapsack([units.units[a].fates[1].restore_ns for a in items], sizes, search)
    for ratio in RATIOS:
        if search.left() <= 0 or taken is None or not items:
            break
        saved = _saved(taken, sizes, round(ratio * QUANTUM))
        fates = keep.copy()
        fates[np.array([a for i, a in enumerate(items) if i not in saved], np.int64)] = 1
        search.offer(to_schedule(units, fates), fates)
    return search.answer(cost_floor(problem, units), ANY_PLAN)


def _knapsack(values: list[int], sizes: list[int], search: Search) -> NDArray[np.bool_] | None:
    """Return for each item and capacity whether the best choice among the items up to it takes it.

    One table answers every capacity. None: the time is up.
    """
    best = np.zeros(QUANTUM + 1, np.int64)
    taken = np.zeros((len(values), QUANTUM + 1), np.bool_)
    for i, (value, size) in enumerate(zip(values, sizes, strict=True)):
        if search.left() <= 0:
            return None
        with_it = best[: QUANTUM + 1 - size] + value
        taken[i, size:] = with_it > best[size:]
        best[size:] = np.maximum(best[size:], with_it)
    return taken


def _saved(taken: NDArray[np.bool_], sizes: list[int], capacity: int) -> set[int]:
    """Return the indices of the most valuable items within the capacity."""
    saved = set()
    for i in reversed(range(len(sizes))):
        if taken[i, capacity]:
            saved.add(i)
            capacity -= sizes[i]
    return saved
