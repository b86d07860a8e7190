"""The least peak: how small a budget can a plan of class `ONE_RECOMPUTE` serve?

A ladder of efforts, each starting from the best plan so far: single flips towards targets ever closer to the
plan; pairs of flips; the rounded linear relaxation (`relax`) at budgets between bound and plan; the epoch model
with the peak as its objective, which also proves. Every effort is a count of work, so that the answer is the same
on every run unless `limits.seconds` cuts it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np

from solvers.bounds import ONE_RECOMPUTE, cost_floor, working_set
from solvers.epochs import EpochModel
from solvers.evaluate import Fates, exact, fates_of, keep_everything, profiles, to_schedule
from solvers.greedy import descend, evaluation, flips, try_flips
from solvers.ilp import Rounds, new_rows, start_rows
from solvers.problem import Limits, Problem, Schedule, Solution, Status
from solvers.relax import COEFFICIENT, LINEAR_SIZE, LinearProgram, round_all
from solvers.search import Search
from solvers.simulate import simulate
from solvers.units import Int64, Units, build_units

CLOSE = 200  # stop where bound and plan differ by less than one part in this many
PROBES = 4  # linear programs
GREEDY_WORK = 2.2  # seconds of a slow machine, see `Search.spend`
KICK_WORK = 0.6
LINEAR_WORK = 0.6
KICKS = 16  # first flips tried in a kick
STARTS = 2  # roundings of one linear program that are repaired
ROUNDS = 60
EXACT_SIZE = 30_000  # units x positions above which CP-SAT needs minutes for what the rest finds
EXACT_WORK = 0.2  # CP-SAT's deterministic seconds: about five times as many on the clock
REMEMBERED = 4


@dataclass(frozen=True, slots=True)
class Least:
    """The smallest peak reached, by which fates, and below which peak no plan of the class exists."""

    peak_bytes: int
    bound_bytes: int
    fates: tuple[int, ...]
    schedule: Schedule
    seconds: float = 0.0  # the limit under which it was found; infinite when no clock cut the search


_known: OrderedDict[tuple[Problem, int], Least] = OrderedDict()


def least_peak(problem: Problem, limits: Limits | None = None) -> Solution:
    """Return the schedule with the smallest peak found, whatever the budget; OPTIMAL when proven for the class.

    `lower_bound_ns` is the trivial bound on the cost; the peak is in `least_peak_bytes`.
    """
    limits = limits or Limits()
    search = Search(problem, limits, "least_peak")
    units = build_units(problem)
    least = find_least(problem, limits)
    proven = least.peak_bytes <= least.bound_bytes
    status = Status.OPTIMAL if proven else Status.FEASIBLE
    floor = cost_floor(problem, units)
    return Solution(status, least.schedule, floor, ONE_RECOMPUTE, "least_peak", search.seconds(), least.peak_bytes)


def find_least(problem: Problem, limits: Limits) -> Least:
    """Return the least peak found; remembered, because every infeasible or tight budget asks for it again.

    What an earlier call in this process reached is never taken back: it is searched again only when the clock
    had cut that search and there is more time now, and the better of both counts.
    """
    key = problem.with_budget(0), limits.seed
    before = _known.pop(key, None)
    if before is None or before.seconds < limits.seconds:
        found = _find(key[0], limits)
        if problem.noise_limit_ppb:
            found = _better_exact(problem, found, limits)
        if before is not None and before.peak_bytes < found.peak_bytes:
            found = replace(before, seconds=found.seconds)
        before = found
    _known[key] = before
    while len(_known) > REMEMBERED:
        _known.popitem(last=False)
    return before


def _find(problem: Problem, limits: Limits) -> Least:
    units = build_units(problem)
    search = Search(problem, limits, "least_peak")
    best = _least(units, keep_everything(units), working_set(problem, units).peak_bytes)
    search.work_left = GREEDY_WORK
    best = _lower(search, units, best)
    search.work_left = min(KICK_WORK, search.work_left)
    best = _kick(search, units, best)
    before = best.peak_bytes
    search.work_left = LINEAR_WORK
    best = _round(search, units, best)
    if best.peak_bytes < before:
        search.work_left = KICK_WORK
        best = _kick(search, units, best)
    search.work_left = math.inf
    if len(units.units) * len(problem.program) <= EXACT_SIZE:
        best = _refine(search, units, best)
    return replace(best, seconds=math.inf if search.left() > 0 else limits.seconds)


def _better_exact(problem: Problem, found: Least, limits: Limits) -> Least:
    """Return the least peak without noise if it is the smaller: more fates make a larger search, not a larger peak."""
    exact = find_least(replace(problem, noise_limit_ppb=0), limits)
    fates = fates_of(build_units(problem), exact.schedule) if exact.peak_bytes < found.peak_bytes else None
    return found if fates is None else replace(exact, bound_bytes=found.bound_bytes, fates=tuple(int(m) for m in fates))


def _least(units: Units, fates: Fates, bound: int) -> Least:
    schedule = to_schedule(units, fates)
    peak = simulate(units.problem, schedule).peak_bytes
    return Least(peak, bound, tuple(int(m) for m in fates), schedule)


def _better(units: Units, best: Least, fates: Fates) -> Least:
    found = _least(units, fates, best.bound_bytes)
    return found if found.peak_bytes < best.peak_bytes else best


def _near(best: Least, low: int) -> bool:
    return best.peak_bytes - low <= best.peak_bytes // CLOSE


def _lower(search: Search, units: Units, best: Least) -> Least:
    """Step down from the best plan: the flips that brought it there are needed below it too."""
    step = (best.peak_bytes - best.bound_bytes) // 2
    while search.left() > 0 and step > best.peak_bytes // CLOSE:
        target = max(best.bound_bytes, best.peak_bytes - step)
        best = _better(units, best, descend(search, units, _vector(best), target))
        if best.peak_bytes > target:
            step //= 2
        step = min(step, best.peak_bytes - best.bound_bytes)
    return best


def _kick(search: Search, units: Units, best: Least) -> Least:
    """Two flips at once where no single one helps: one that frees bytes at the peak, and any other."""
    while search.left() > 0 and not _near(best, best.bound_bytes):
        fates, target = _vector(best), best.peak_bytes - best.peak_bytes // CLOSE
        found = best
        for first in _relief(search, units, fates):
            if search.left() <= 0:
                break
            fates[first[0]], before = first[1], fates[first[0]]
            pool = flips(units, fates)
            _, areas, _ = try_flips(units, fates, pool, target)
            search.spend(evaluation(units, len(pool)))
            i = int(np.argmin(areas))
            other = fates.copy()
            other[pool[i, 0]] = pool[i, 1]
            fates[first[0]] = before
            found = _better(units, found, descend(search, units, other, target))
        if found.peak_bytes >= best.peak_bytes:
            break
        best = _lower(search, units, found)
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


def _round(search: Search, units: Units, best: Least) -> Least:
    """Bisect between bound and plan, starting from roundings of the linear relaxation at each budget."""
    low, rows, turn = best.bound_bytes, start_rows(units, _vector(best), spread=12), units.problem.turn
    for _ in range(PROBES):
        if _near(best, low) or search.left() <= 0:
            break
        middle = (low + best.peak_bytes) // 2
        model = EpochModel(units, [t for t in rows if t > turn], [t for t in rows if t <= turn], middle)
        program = LinearProgram(model)
        search.spend(COEFFICIENT * len(program))
        values = None
        if len(program) <= LINEAR_SIZE:
            values, _ = program.solve(search.clock())
        if values is not None:
            plans = round_all(model, values)
            level = profiles(units, plans).bytes_at
            order = np.argsort(level.max(axis=0), kind="stable")
            rows.update(new_rows(level[:, order[0]], middle, rows))
            for i in order[:STARTS]:
                best = _better(units, best, plans[i])
                best = _better(units, best, descend(search, units, plans[i], middle))
        low = min(max(low, middle), best.peak_bytes)
    return best


def _vector(best: Least) -> Fates:
    return np.array(best.fates, np.int16)


def _refine(search: Search, units: Units, best: Least) -> Least:
    """Minimise the peak over the epoch rows until the simulated peak meets the bound or the work is spent."""
    fates, work = _vector(best), EXACT_WORK
    rounds = Rounds(units, None, start_rows(units, fates, spread=12), linear=1)
    for _ in range(ROUNDS):
        if best.peak_bytes <= best.bound_bytes or work <= 0 or search.left() <= 0:
            break
        rounds.work = max(EXACT_WORK / 10, work)
        found = rounds.solve(search.limits, search.clock(), fates)
        work -= max(found.work, EXACT_WORK / ROUNDS)
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
