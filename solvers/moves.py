"""What may change in a plan at once: the fate of one unit, or that of siblings together.

*Siblings* are units whose restores read the same unit, as an LSTM's gates do. The first that is restored pays for what
all of them read, and only when none is dropped is that never paid; so one at a time looks dear where all together are
not.

An array of moves has a row for each and in it a (unit, fate) pair for each unit that it changes, the first one repeated
where others change more.
"""

from __future__ import annotations

import math

import numpy as np

from solvers.evaluate import Fates
from solvers.units import Int64, Units

KEEP, DROP = 0, 1  # fates of every sibling


def flips(units: Units, fates: Fates) -> Int64:
    """Return every (unit, other fate) pair."""
    pairs = [(a, m) for a, u in enumerate(units.units) for m in range(len(u.fates)) if m != fates[a]]
    return np.array(pairs, np.int64).reshape(-1, 2)


def moves(units: Units, fates: Fates) -> Int64:
    """Return every flip, and every way to keep or to drop siblings together."""
    return joined(flips(units, fates), together(units, fates, KEEP), together(units, fates, DROP))


def savings(units: Units, fates: Fates) -> Int64:
    """Return the moves that could save time: of units that cost some, or to a fate that costs less than none."""

    def price(a: int, m: int) -> int:
        fate = units.units[a].fates[m]
        return fate.cost_ns + fate.restore_ns

    found = [
        (a, m)
        for a, u in enumerate(units.units)
        for m in range(len(u.fates))
        if m != fates[a] and (price(a, fates[a]) > 0 or price(a, m) < price(a, fates[a]))
    ]
    return joined(np.array(found, np.int64).reshape(-1, 2), together(units, fates, KEEP))


def together(units: Units, fates: Fates, fate: int) -> Int64:
    """Return a move to one fate for all siblings of which several have another."""
    several = [group for group in units.siblings if sum(fates[a] != fate for a in group) > 1]
    width = max(map(len, several), default=1)
    rows = [[(a, fate) for a in (*group, *group[:1] * (width - len(group)))] for group in several]
    return np.array(rows, np.int64).reshape(-1, width, 2)


def joined(*several: Int64) -> Int64:
    """Return moves of several widths, or flips, as one array."""
    rows = [some.reshape(len(some), some.size // max(2 * len(some), 1), 2) for some in several if len(some)]
    width = max((some.shape[1] for some in rows), default=1)
    wide = [np.concatenate([some, *[some[:, :1]] * (width - some.shape[1])], axis=1) for some in rows]
    return np.concatenate(wide) if wide else np.empty((0, 1, 2), np.int64)


def try_moves(units: Units, fates: Fates, some: Int64, budget: float) -> tuple[Int64, np.ndarray, Int64]:
    """Return cost, area above the budget, and peak after each move."""
    from solvers.changes import outcomes

    some = np.ascontiguousarray(joined(some))  # one type of argument: each is compiled for on its own
    return outcomes(units.tables, fates.astype(np.int64), some, math.floor(budget))
