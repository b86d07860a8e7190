"""Paired timing: callables in turn, so that a drifting machine drifts for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

LEAST, MOST = 7, 201  # rounds of `over_twice`


@dataclass(frozen=True, slots=True)
class Ratio:
    """Time of `a` over time of `b`: the median of the pairs' ratios, and their quartiles."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"

    @staticmethod
    def of(ratios: list[float]) -> Ratio:
        """Return the Ratio of two or more pairs."""
        low, median, high = statistics.quantiles(ratios, n=4)
        return Ratio(median, low, high, len(ratios))


def paired(a: Callable[[], object], b: Callable[[], object], pairs: int, warmup: int = 2) -> Ratio:
    """Run a, b, a, b, ... and return the Ratio; the order inside a pair alternates."""
    return Ratio.of([x / y for x, y in rounds((a, b), pairs, warmup)])


def rounds(calls: tuple[Callable[[], object], ...], count: int, warmup: int = 2) -> list[tuple[int, ...]]:
    """Return the ns of every call in each of `count` rounds; the order inside a round rotates."""
    for _ in range(warmup):
        for call in calls:
            call()
    found = []
    for i in range(count):
        times = [0] * len(calls)
        for k in range(len(calls)):
            j = (i + k) % len(calls)
            start = time.perf_counter_ns()
            calls[j]()
            times[j] = time.perf_counter_ns() - start
        found.append(tuple(times))
    return found


def over_twice(planned: Callable[[], object], plain: Callable[[], object], seconds: float) -> dict[str, Any]:
    """Return the time of a planned step over the plain loop's, taken twice, and of the plain loop over itself."""
    calls = (planned, plain, plain)
    once = sum(rounds(calls, 1)[0]) / 1e9
    times = rounds(calls, min(MOST, max(LEAST, int(seconds / once))))
    return {
        "ratio": asdict(Ratio.of([2 * a / (b + c) for a, b, c in times])),
        "null": asdict(Ratio.of([c / b for _, b, c in times])),
    }
