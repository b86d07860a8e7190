"""Which flips are worth a look, where a look at all of them takes seconds.

A flip frees what its fate drops, between the last forward read and the first read that brings it back, and takes what
it encodes. Counted where the plan is above the budget and without what it makes necessary elsewhere, that is an
estimate in a few array operations for all flips at once. It only chooses: what is chosen is evaluated.
"""

from __future__ import annotations

import numpy as np

from solvers.evaluate import Fates, profiles
from solvers.moves import DROP, joined, together
from solvers.units import Int64, Units

LARGEST = 4  # one in so many is chosen by bytes alone: what is cheap may not suffice


class Promising:
    """The flips of `units` with what each frees, as intervals of positions, and costs."""

    def __init__(self, units: Units) -> None:
        """Write down the intervals of every fate."""
        self.units = units
        self.unit, self.fate = _pairs(units)
        self.first = np.searchsorted(self.unit, np.arange(len(units.units)))
        intervals: list[tuple[int, int, int, int]] = []
        cost = []
        for i, (a, m) in enumerate(zip(self.unit, self.fate, strict=True)):
            fate = units.units[a].fates[m]
            cost.append(fate.cost_ns + fate.restore_ns)
            for h in fate.held:
                if h.dropped and h.last_backward > h.last_forward:
                    intervals.append((i, h.last_forward + 1, min(fate.first_read, h.last_backward + 1), h.size_bytes))
            if fate.encode is not None:
                intervals.append((i, fate.encode_at + 1, fate.encoded_until + 1, -fate.encoded_bytes))
        self.cost = np.array(cost, np.float64)
        self.of, self.start, self.end, self.size = np.array(intervals, np.int64).reshape(-1, 4).T

    def best(self, fates: Fates, budget: float, count: int) -> Int64:
        """Return the `count` most promising flips for a plan that is above `budget`, and of siblings all together."""
        above = profiles(self.units, fates[None, :]).bytes_at[:, 0] > budget
        upto = np.concatenate(([0], np.cumsum(above)))
        freed = np.zeros(len(self.unit))
        np.add.at(freed, self.of, self.size * (upto[np.maximum(self.end, self.start)] - upto[self.start]))
        now = (self.first + fates)[self.unit]
        gain, cost = freed - freed[now], self.cost - self.cost[now]
        by_score = np.argsort(-gain / np.maximum(cost, 1), kind="stable")[: count - count // LARGEST]
        by_bytes = np.argsort(-gain, kind="stable")[: count // LARGEST]
        chosen = np.unique(np.concatenate((by_score, by_bytes)))
        chosen = chosen[gain[chosen] > 0]
        dropped = np.isin(np.arange(len(self.units.units)), self.unit[chosen[self.fate[chosen] == DROP]])
        siblings = together(self.units, fates, DROP)
        siblings = siblings[dropped[siblings[:, :, 0]].all(axis=1)]
        return joined(np.stack((self.unit[chosen], self.fate[chosen]), axis=1), siblings)


def _pairs(units: Units) -> tuple[Int64, Int64]:
    pairs = [(a, m) for a, u in enumerate(units.units) for m in range(len(u.fates))]
    unit, fate = np.array(pairs, np.int64).reshape(-1, 2).T
    return unit, fate
