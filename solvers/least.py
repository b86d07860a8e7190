"""The least peak: how small a budget can a plan of class `ONE_RECOMPUTE` serve?

Bisection with greedy repair finds a good plan; the epoch model with the peak as its objective improves and,
where it
can, proves it. Every limit here is a count, never the clock, so that the answer is the same on every run and
`auto` may rely on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from solvers.bounds import ONE_RECOMPUTE, cost_floor, working_set
from solvers.epochs import Cut
from solvers.evaluate import Fates, exact, keep_everything, to_schedule
from solvers.greedy import repair
from solvers.ilp import Rounds, start_rows
from solvers.problem import Limits, Problem, Schedule, Solution, Status
from solvers.search import Search
from solvers.simulate import simulate
from solvers.units import Units, build_units

PROBES = 12  # greedy repairs
SLICES = 6  # of the work for bisection with the epoch model
ROUNDS = 60
WORK = 0.15  # CP-SAT's deterministic seconds in all, as a share of limits.seconds


@dataclass(frozen=True, slots=True)
class Least:
    """The smallest peak reached, by which fates, and below which peak no plan of the class exists."""

    peak_bytes: int
    bound_bytes: int
    fates: tuple[int, ...]
    schedule: Schedule


def least_peak(problem: Problem, limits: Limits | None = None) -> Solution:
    """Return the schedule with the smallest peak found, whatever the budget; OPTIMAL when proven for the
    class.

    `lower_bound_ns` is the trivial bound on the cost; the peak is in `least_peak_bytes`.
    """
    limits = limits or Limits()
    units = build_units(problem)
    least = find_least(problem, limits)
    proven = least.peak_bytes <= least.bound_bytes
    status = Status.OPTIMAL if proven else Status.FEASIBLE
    floor = cost_floor(problem, units)
    return Solution(status, least.schedule, floor, ONE_RECOMPUTE, "least_peak", 0.0, least.peak_bytes)


def find_least(problem: Problem, limits: Limits) -> Least:
    """Return the least peak found; remembered, because every infeasible or tight budget asks for it again."""
    return _find(problem.with_budget(0), limits.seconds, limits.threads, limits.seed)


@lru_cache(maxsize=4)
def _find(problem: Problem, seconds: float, threads: int, seed: int) -> Least:
    units = build_units(problem)
    search = Search(problem, Limits(math.inf, threads, seed), "least_peak")
    start = keep_everything(units)
    floor = working_set(problem, units).peak_bytes
    best = _bisect(search, units, _least(units, start, floor))
    best = _narrow(units, best, search.limits, WORK * seconds / 3)
    return _refine(units, best, search.limits, 2 * WORK * seconds / 3)


def _least(units: Units, fates: Fates, bound: int) -> Least:
    schedule = to_schedule(units, fates)
    peak = simulate(units.problem, schedule).peak_bytes
    return Least(peak, bound, tuple(int(m) for m in fates), schedule)


def _bisect(search: Search, units: Units, best: Least) -> Least:
    low = best.bound_bytes
    for _ in range(PROBES):
        if best.peak_bytes - low <= best.peak_bytes // 500:
            break
        middle = (low + best.peak_bytes) // 2
        # From the best plan onwards: the flips that brought it down are needed below it too.
        fates = repair(search, units, _vector(best), middle)
        if fates is None:
            low = middle
        else:
            found = _least(units, fates, best.bound_bytes)
            best = found if found.peak_bytes < best.peak_bytes else best
            low = min(low, best.peak_bytes)
    return best


def _narrow(units: Units, best: Least, limits: Limits, work: float) -> Least:
    """Bisect between bound and best peak: find a plan at the middle, or prove there is none."""
    rows, cuts = start_rows(units, _vector(best)), list[Cut]()
    low, share = best.bound_bytes, work / SLICES
    while work > 0 and best.peak_bytes - low > best.peak_bytes // 500:
        middle = (low + best.peak_bytes) // 2
        rounds = Rounds(units, middle, rows, cuts, gap=0.05, linear=1)
        spent, reached, proven = _probe(rounds, best, limits, share)
        work -= max(spent, share / 10)
        best = reached if reached.peak_bytes < best.peak_bytes else best
        best = replace(best, bound_bytes=max(best.bound_bytes, middle + 1 if proven else 0))
        low = max(low, middle) if best.peak_bytes > middle else low
    return best


def _probe(rounds: Rounds, best: Least, limits: Limits, work: float) -> tuple[float, Least, bool]:
    """Look for a plan within the rounds' budget: (work spent, best met, proof that none fits)."""
    assert rounds.budget_bytes is not None
    spent = 0.0
    while spent < work and best.peak_bytes > rounds.budget_bytes:
        rounds.work = work - spent
        found = rounds.solve(limits, math.inf, _vector(best))
        spent += max(found.work, work / 20)
        if found.infeasible or found.fates is None:
            return spent, best, found.infeasible
        usage = exact(rounds.units, found.fates)
        if usage.peak_bytes < best.peak_bytes:
            best = replace(_least(rounds.units, found.fates, 0), bound_bytes=best.bound_bytes)
        if usage.peak_bytes > rounds.budget_bytes:
            rounds.learn(found.fates, usage, rounds.budget_bytes)
    return spent, best, False


def _vector(best: Least) -> Fates:
    return np.array(best.fates, np.int16)


def _refine(units: Units, best: Least, limits: Limits, work: float) -> Least:
    """Minimise the peak over the epoch rows until the simulated peak meets the bound or the work is spent."""
    fates = _vector(best)
    rounds = Rounds(units, None, start_rows(units, fates), linear=1)
    for _ in range(ROUNDS):
        if best.peak_bytes <= best.bound_bytes or work <= 0:
            break
        rounds.work = max(0.5, work / 2)
        found = rounds.solve(limits, math.inf, fates)
        work -= found.work
        bound = max(best.bound_bytes, math.ceil(found.bound - 1e-6))
        best = replace(best, bound_bytes=min(bound, best.peak_bytes))
        if found.fates is None:
            break
        usage = exact(units, found.fates)
        if usage.peak_bytes < best.peak_bytes:
            best, fates = _least(units, found.fates, best.bound_bytes), found.fates
        if usage.peak_bytes > found.objective:
            rounds.learn(found.fates, usage, found.objective)
        elif rounds.gap == 0.0:
            break
        else:
            rounds.gap = 0.0
    return best
