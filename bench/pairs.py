"""Paired timing: two callables in turn, so that a drifting machine drifts for both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ratio:
    """Time of `a` over time of `b`: the median of the pairs' ratios, and their quartiles."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def paired(a: Callable[[], object], b: Callable[[], object], pairs: int, warmup: int = 2) -> Ratio:
    """Run a, b, a, b, ... and return the Ratio; the order inside a pair alternates."""
    for _ in range(warmup):
        a()
        b()
    ratios = []
    for i in range(pairs):
        first, second = (a, b) if i % 2 == 0 else (b, a)
        start = time.perf_counter_ns()
        first()
        middle = time.perf_counter_ns()
        second()
        end = time.perf_counter_ns()
        x, y = middle - start, end - middle
        ratios.append(x / y if i % 2 == 0 else y / x)
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high, pairs)
