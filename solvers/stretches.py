"""Large neighbourhood search (Shaw 1998): one stretch of the forward after the other is decided again.

What a long graph's whole program does not find in minutes, its quarters find in seconds; sixteenths find what quarters
do not, and open the way for them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from solvers.evaluate import profiles
from solvers.rounds import WIDE, Found, Rounds, start_rows, take
from solvers.search import Search
from solvers.units import Units

STRETCHES, OVERLAP = (4, 16), 0.3  # of the forward, in turn, and how much longer than its share of the units each is
HANDS = 2  # stretches decided at once
STRETCH_SHARE, STRETCHES_SHARE = 0.13, 0.02  # of the time for one at most; what they leave


def free_stretches(search: Search, rounds: Rounds) -> None:
    """Where a wide gap is left, decide each of the stretches again, all else as it is best, as long as any helps.

    Two at a time, each on a core of its own. Proves nothing.
    """
    free, tried, at = list(_all_stretches(rounds.units)), dict[int, int | None](), 0
    hands = [replace(rounds, built=None) for _ in range(min(HANDS, os.cpu_count() or 1))]
    with ThreadPoolExecutor(len(hands)) as pool:
        while stale := [k for k in range(len(free)) if tried.get(k, -1) != search.cost_ns]:
            late = search.left() <= STRETCHES_SHARE * search.limits.seconds
            if search.fates is None or late or search.closed(WIDE):
                return
            now = sorted(stale, key=lambda k: (k < at, k))[: len(hands)]
            at = now[-1] + 1
            tried.update(dict.fromkeys(now, search.cost_ns))
            # Rows of its own: those that other stretches broke only slow this one down.
            rows = start_rows(rounds.units, search.fates)
            hands = [replace(hand, rows=set(rows), cuts=list(rounds.cuts)) for hand in hands]
            _decide(search, hands, [free[k] for k in now], pool)


def _decide(search: Search, hands: list[Rounds], free: list[set[int]], pool: ThreadPoolExecutor) -> None:
    """Offer the best plan with the first of these sets of units decided again, then with the next one, too.

    What breaks rows that the decision did not know is mended; where both together add too much noise, each is offered.
    """
    best, seconds = search.fates, min(STRETCH_SHARE * search.limits.seconds, search.left())
    assert best is not None

    def solve(hand: Rounds, units: set[int]) -> Found:
        fixed = tuple((a, int(m)) for a, m in enumerate(best) if a not in units)
        return hand.solve(search.limits, seconds, best, fixed)

    for hand, units, found in zip(hands, free, pool.map(solve, hands, free), strict=False):
        if found.fates is not None and search.fates is not None:
            inside = np.isin(np.arange(len(best)), list(units))
            both = np.where(inside, found.fates, search.fates)
            if not profiles(hand.units, both[None, :]).refused[0]:
                found = replace(found, fates=both)
        take(search, hand, found)


def _all_stretches(units: Units) -> Iterator[set[int]]:
    for count in STRETCHES:
        yield from stretches(units, count)


def stretches(units: Units, count: int) -> list[set[int]]:
    """Return the units by where the forward reads them last, as `count` sets that overlap; the last ones first."""
    last = [min((h.last_forward for h in u.fates[0].held), default=0) for u in units.units]
    order, share = np.argsort(last, kind="stable"), len(last) / count
    ends = [(int(i * share), math.ceil((i + 1 + OVERLAP) * share)) for i in reversed(range(count))]
    return [set(order[first:end].tolist()) for first, end in ends]
