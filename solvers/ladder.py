"""Small peaks by flips: single ones towards targets ever closer to the plan, then pairs of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.evaluate import Fates, profiles, to_schedule
from solvers.greedy import descend, evaluation
from solvers.moves import flips, try_moves
from solvers.problem import Schedule
from solvers.search import Search
from solvers.simulate import simulate
from solvers.units import Int64, Units

CLOSE = 200  # stop where bound and plan differ by less than one part in this many
KICKS = 16  # first flips tried in a kick


@dataclass(frozen=True, slots=True)
class Low:
    """The least peak reached by a fate vector, and below which peak none of its class exists."""

    peak_bytes: int
    bound_bytes: int
    fates: tuple[int, ...]
    schedule: Schedule

    @property
    def vector(self) -> Fates:
        """The fates as the evaluator wants them."""
        return np.array(self.fates, np.int16)


def low_of(units: Units, fates: Fates, bound: int) -> Low:
    """Return a fate vector with its simulated peak."""
    schedule = to_schedule(units, fates)
    peak = simulate(units.problem, schedule).peak_bytes
    return Low(peak, bound, tuple(int(m) for m in fates), schedule)


def better(units: Units, best: Low, fates: Fates) -> Low:
    """Return `best`, or what `fates` reach if that is less."""
    found = low_of(units, fates, best.bound_bytes)
    return found if found.peak_bytes < best.peak_bytes else best


def near(best: Low, low: int) -> bool:
    """Return whether a peak is within one part in `CLOSE` of a bound."""
    return best.peak_bytes - low <= best.peak_bytes / CLOSE


def lower(search: Search, units: Units, best: Low) -> Low:
    """Step down from the best plan: the flips that brought it there are needed below it too."""
    step = (best.peak_bytes - best.bound_bytes) / 2
    while search.left() > 0 and step > best.peak_bytes / CLOSE:
        target = max(float(best.bound_bytes), best.peak_bytes - step)
        best = better(units, best, descend(search, units, best.vector, target))
        if best.peak_bytes > target:
            step /= 2
        step = min(step, best.peak_bytes - best.bound_bytes)
    return best


def kick(search: Search, units: Units, best: Low) -> Low:
    """Two flips at once where no single one helps: one that frees bytes at the peak, and any other."""
    while search.left() > 0 and not near(best, best.bound_bytes):
        fates, target = best.vector, best.peak_bytes - best.peak_bytes / CLOSE
        found = best
        for first in _relief(search, units, fates):
            if search.left() <= 0:
                break
            fates[first[0]], before = first[1], fates[first[0]]
            pool = flips(units, fates)
            _, areas, _ = try_moves(units, fates, pool, target)
            search.spend(evaluation(units, len(pool)))
            i = int(np.argmin(areas))
            other = fates.copy()
            other[pool[i, 0]] = pool[i, 1]
            fates[first[0]] = before
            found = better(units, found, descend(search, units, other, target))
        if found.peak_bytes >= best.peak_bytes:
            break
        best = lower(search, units, found)
    return best


def _relief(search: Search, units: Units, fates: Fates) -> Int64:
    """Return the flips after which fewest bytes are in use where the plan peaks, best first."""
    pool = flips(units, fates)
    if not len(pool):
        return pool
    search.spend(evaluation(units, len(pool) + 1))
    top = int(np.argmax(profiles(units, fates[None, :]).bytes_at[:, 0]))
    plans = np.repeat(fates[None, :], len(pool), axis=0)
    plans[np.arange(len(pool)), pool[:, 0]] = pool[:, 1]
    level = profiles(units, plans).bytes_at[top]
    return pool[np.argsort(level, kind="stable")[:KICKS]]
