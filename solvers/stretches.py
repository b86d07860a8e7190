"""Large neighbourhood search (Shaw 1998): one stretch of the forward after the other is decided again.

What a long graph's whole program does not find in minutes, its quarters find in seconds; sixteenths find what quarters
do not, and open the way for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from solvers.evaluate import Fates
from solvers.rounds import WIDE, Rounds, start_rows, take
from solvers.search import Search
from solvers.units import Units

STRETCHES, OVERLAP = (4, 16), 0.3  # of the forward, in turn, and how much longer than its share of the units each is
STRETCH_SHARE, STRETCHES_SHARE = 0.13, 0.02  # of the time for one at most; what they leave


def free_stretches(search: Search, rounds: Rounds) -> None:
    """Where a wide gap is left, decide each of the stretches again, all else as it is best, as long as any helps.

    Proves nothing.
    """
    free, tried = list(_all_stretches(rounds.units)), dict[int, int | None]()
    while any(tried.get(k, -1) != search.cost_ns for k in range(len(free))):
        for k, units in enumerate(free):
            if tried.get(k, -1) == search.cost_ns:
                continue
            late = search.left() <= STRETCHES_SHARE * search.limits.seconds
            if search.fates is None or late or search.closed(WIDE):
                return
            tried[k] = search.cost_ns
            # Rows of its own: those that other stretches broke only slow this one down.
            rounds = replace(rounds, rows=start_rows(rounds.units, search.fates))
            rounds.model()  # built once for all stretches of one plan
            _decide(search, replace(rounds, rows=set(rounds.rows), cuts=list(rounds.cuts)), search.fates, units)


def _decide(search: Search, rounds: Rounds, best: Fates, free: set[int]) -> None:
    """Offer the best plan with the units `free` decided again; mended, where that breaks rows which it did not know."""
    fixed = tuple((a, int(m)) for a, m in enumerate(best) if a not in free)
    seconds = min(STRETCH_SHARE * search.limits.seconds, search.left())
    take(search, rounds, rounds.solve(search.limits, seconds, best, fixed))


def _all_stretches(units: Units) -> Iterator[set[int]]:
    for count in STRETCHES:
        yield from stretches(units, count)


def stretches(units: Units, count: int) -> list[set[int]]:
    """Return the units by where the forward reads them last, as `count` sets that overlap; the last ones first."""
    last = [min((h.last_forward for h in u.fates[0].held), default=0) for u in units.units]
    order, share = np.argsort(last, kind="stable"), len(last) / count
    ends = [(int(i * share), math.ceil((i + 1 + OVERLAP) * share)) for i in reversed(range(count))]
    return [set(order[first:end].tolist()) for first, end in ends]
