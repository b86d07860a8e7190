"""The frontier of one graph on one class of device, and the cache that answers budgets from it.

A budget's bucket is the stretch of bytes between two neighbouring plans: every budget in it has the same answer, so
one solve of the family serves any number of clients.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from graphplan.errors import InfeasibleBudget
from graphplan.plan import Plan

MOST_POINTS = 64  # plans, hence solves, of one frontier


@dataclass(frozen=True, slots=True)
class Frontier:
    """Plans by ascending peak, each cheaper than those before it."""

    plans: tuple[Plan, ...]
    peaks: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Check the order and read the peaks off."""
        peaks = tuple(p.peak_bytes for p in self.plans)
        if not peaks or any(a >= b for a, b in pairwise(peaks)):
            raise ValueError("a frontier needs plans in strictly ascending order of their peaks")
        object.__setattr__(self, "peaks", peaks)

    def index(self, budget_bytes: int) -> int:
        """Return which plan a budget gets, -1 where none fits."""
        return bisect_right(self.peaks, budget_bytes) - 1

    def at(self, budget_bytes: int) -> Plan:
        """Return the fastest plan within `budget_bytes`.

        Raises:
            InfeasibleBudget: it is below the least peak.
        """
        found = self.index(budget_bytes)
        if found < 0:
            least = self.plans[0]
            raise InfeasibleBudget(
                f"{least.model} needs at least {least.peak_bytes} bytes here; the budget is {budget_bytes}",
                minimum_bytes=least.peak_bytes,
                binding_op=least.peak_step,
            )
        return self.plans[found]

    def answers(self, budgets_bytes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return `index` of every budget [N] at once."""
        return np.searchsorted(np.array(self.peaks), budgets_bytes, side="right").astype(np.int64) - 1

    def below(self, budget_bytes: int, count: int) -> tuple[Plan, ...]:
        """Return the plan for a budget and up to `count` smaller ones, evenly spread down to the least, descending.

        A client that holds them can shrink without asking.
        """
        top = self.index(budget_bytes)
        if top < 0:
            return ()
        picks = sorted({round(top * i / count) for i in range(count + 1)}, reverse=True) if count else [top]
        return tuple(self.plans[i] for i in picks)


@dataclass(slots=True)
class FrontierCache:
    """One Frontier for each key (graph, device class, method), made when first asked for."""

    make: Callable[[Hashable], Frontier]
    made: dict[Hashable, Frontier] = field(default_factory=dict)
    answered: int = 0

    def get(self, key: Hashable) -> Frontier:
        """Return the frontier of `key`."""
        self.answered += 1
        if key not in self.made:
            self.made[key] = self.make(key)
        return self.made[key]
