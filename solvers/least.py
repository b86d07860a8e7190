"""The least peak: how small a budget can a plan serve?

A ladder of efforts, each starting from the best plan so far: single flips towards targets ever closer to the
plan; pairs of flips (`ladder`); in small graphs the rounded linear relaxation (`relax`) at budgets between bound and
plan, and the epoch model with the peak as its objective, which also proves, for one recompute a value; then more
recomputes (`again`), from several plans, down to the working set, which bounds them. Every effort is a count of work,
so that the answer is the same on every run unless `limits.seconds` cuts it; more than EFFORT seconds allow more of the
last, longest one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from solvers.again import SHARES, lower_again, lower_rounded
from solvers.bounds import ANY_PLAN, ONE_RECOMPUTE, cost_floor, working_set
from solvers.checkpoints import checkpointed, encoded
from solvers.epochs import EpochModel
from solvers.evaluate import allowed, exact, fates_of, keep_everything, profiles, to_schedule
from solvers.greedy import descend, evaluation, polish
from solvers.ladder import Low, better, kick, low_of, lower, near
from solvers.moves import flips
from solvers.problem import Limits, Problem, Schedule, Solution, Status
from solvers.relax import COEFFICIENT, LinearProgram, round_all
from solvers.rounds import Rounds, new_rows, start_rows
from solvers.search import Search
from solvers.simulate import simulate
from solvers.units import Units, build_units

PROBES = 4  # linear programs
GREEDY_WORK = 8.0  # seconds of a slow machine, see `Search.spend`: what a graph of 7,000 ops needs
LARGE = 0.08  # of that, for a look at all flips
KICK_WORK = 0.6
LINEAR_WORK, MOST_LINEAR = 0.6, 1.2  # of all linear programs, and of one
ROUNDED_WORK = 3.0
AGAIN_WORK = 2.0
EFFORT = 30.0  # seconds: each of them begun allows AGAIN_WORK
MOST_EFFORT = 20.0  # times that, however long the limit
STARTS = 2  # roundings of one linear program that are repaired
ROUNDS = 60
EXACT_SIZE = 30_000  # units x positions above which CP-SAT needs minutes for what the rest finds
EXACT_WORK = 0.2  # CP-SAT's deterministic seconds: about five times as many on the clock
REMEMBERED = 4
EVEN_NS = 1000


@dataclass(frozen=True, slots=True)
class Least:
    """The least peaks found: of one recompute a value, and of any plan, which `floor_bytes` bounds."""

    single: Low
    peak_bytes: int
    schedule: Schedule
    floor_bytes: int
    seconds: float = 0.0  # the limit above which another search could find less; infinite when none could


_known: OrderedDict[tuple[Problem, int], Least] = OrderedDict()


def least_peak(problem: Problem, limits: Limits | None = None) -> Solution:
    """Return the schedule with the smallest peak found, whatever the budget; OPTIMAL when proven for its class.

    `lower_bound_ns` is the trivial bound on the cost; the peak is in `least_peak_bytes`.
    """
    limits = limits or Limits()
    search = Search(problem, limits, "least_peak")
    units = build_units(problem)
    least = find_least(problem, limits)
    any_plan = least.peak_bytes < least.single.peak_bytes or least.peak_bytes <= least.floor_bytes
    bound = least.floor_bytes if any_plan else least.single.bound_bytes
    status = Status.OPTIMAL if least.peak_bytes <= bound else Status.FEASIBLE
    return Solution(
        status,
        least.schedule,
        cost_floor(problem, units),
        ANY_PLAN if any_plan else ONE_RECOMPUTE,
        "least_peak",
        search.seconds(),
        least.peak_bytes,
        single_peak_bytes=least.single.peak_bytes,
    )


def find_least(problem: Problem, limits: Limits) -> Least:
    """Return the least peak found; remembered, because every infeasible or tight budget asks for it again.

    It is searched as if every op cost the same: measured costs vary from run to run, and a budget that one run names
    must serve another. What an earlier call in this process reached is never taken back: it is searched
    again only when the limit had cut that search and is larger now, and the better of both counts.
    """
    key = _key(problem, limits)
    before = _known.pop(key, None)
    if before is None or before.seconds < limits.seconds:
        noisy = problem.noise_limit_ppb and any(op.noise_ppb for op in problem.ops)
        half = replace(limits, seconds=limits.seconds / 2) if noisy else limits
        found = _find(key[0], half)
        if noisy:
            found = replace(_better_exact(key[0], found, half), seconds=max(found.seconds, limits.seconds))
        if before is not None and before.peak_bytes < found.peak_bytes:
            found = replace(before, seconds=found.seconds)
        before = found
    _known[key] = before
    while len(_known) > REMEMBERED:
        _known.popitem(last=False)
    return replace(before, single=_fates_under(problem, before.single))


def remembered(problem: Problem, limits: Limits) -> Least | None:
    """Return what `find_least` reached for this problem in this process, at any budget; None: it was not asked."""
    return _known.get(_key(problem, limits))


def _key(problem: Problem, limits: Limits) -> tuple[Problem, int]:
    return even(problem).with_budget(0), limits.seed


def even(problem: Problem) -> Problem:
    """Return the problem with the same cost for every op."""
    return replace(problem, ops=tuple(replace(op, cost_ns=EVEN_NS) for op in problem.ops))


def _fates_under(problem: Problem, single: Low) -> Low:
    """Return the plan with its fates as `problem`'s own units number them: costs choose among alternatives."""
    units = build_units(problem)
    fates = fates_of(units, single.schedule)
    if fates is None:
        same = [min(m, len(u.fates) - 1) for m, u in zip(single.fates, units.units, strict=True)]
        return low_of(units, allowed(units, np.array(same, np.int16)), single.bound_bytes)
    return replace(single, fates=tuple(int(m) for m in fates))


def _find(problem: Problem, limits: Limits) -> Least:
    units = build_units(problem)
    search = Search(problem, limits, "least_peak")
    floor = working_set(problem, units).peak_bytes
    single = _single(search, units, low_of(units, keep_everything(units), floor))
    if single.peak_bytes <= floor:
        return Least(single, single.peak_bytes, single.schedule, floor, math.inf)
    effort = math.ceil(min(max(1.0, limits.seconds / EFFORT), MOST_EFFORT))
    search.work_left = AGAIN_WORK * effort
    peak, schedule = min(_again(search, units, single, floor), key=lambda found: found[0])
    left, search.work_left = search.work_left, ROUNDED_WORK * effort
    schedule = lower_rounded(search, units, schedule, floor)
    peak, search.work_left = simulate(problem, schedule).peak_bytes, min(left, search.work_left)
    cut = limits.seconds if search.clock() <= 0 else math.inf if search.work_left > 0 else EFFORT * effort
    return Least(single, peak, schedule, floor, cut)


def _again(search: Search, units: Units, single: Low, floor: int) -> Iterator[tuple[int, Schedule]]:
    """Offer plans of more recomputes until the work is spent: from the least plan, then from those of larger peaks."""
    for share in SHARES:
        if share == 1.0:
            start = single.schedule
        elif search.left() > 0:
            start = to_schedule(units, polish(search, units, single.vector, share * single.peak_bytes))
        else:
            return
        schedule = lower_again(search, search.problem, start, floor)
        yield simulate(search.problem, schedule).peak_bytes, schedule


def _single(search: Search, units: Units, best: Low) -> Low:
    """The ladder of efforts, one recompute a value."""
    best = _descended(search, units, best)
    search.work_left = KICK_WORK
    best = kick(search, units, best)
    # Measured: in larger graphs linear programs lowered none of thirty of these peaks, and CP-SAT needs minutes.
    if len(units.units) * len(search.problem.program) > EXACT_SIZE:
        search.work_left = math.inf
        return best
    before = best.peak_bytes
    search.work_left = LINEAR_WORK
    best = _round(search, units, best)
    if best.peak_bytes < before:
        search.work_left = KICK_WORK
        best = kick(search, units, best)
    search.work_left = math.inf
    best = _refine(search, units, best)
    return best


def _descended(search: Search, units: Units, kept: Low) -> Low:
    """Return the least peak that flips reach from the best checkpoints, from everything encoded, and from everything
    kept: in a large graph thousands of them would have to be taken from there, and it is left out.
    """
    plans = checkpointed(units)
    search.spend(evaluation(units, len(plans)))
    start = better(units, kept, plans[np.argmin(profiles(units, plans).peak_bytes())])
    starts = [start] if evaluation(units, len(flips(units, kept.vector))) > LARGE else [start, kept]
    coded = encoded(units)
    if len(coded):
        search.spend(evaluation(units, len(coded)))
        starts.append(low_of(units, coded[np.argmin(profiles(units, coded).peak_bytes())], kept.bound_bytes))
    found = []
    for start in starts:
        search.work_left = GREEDY_WORK / len(starts)
        found.append(lower(search, units, start))
    return min(found, key=lambda low: low.peak_bytes)


def _better_exact(problem: Problem, found: Least, limits: Limits) -> Least:
    """Return `found` with the least peaks without noise where they are smaller: more fates make a larger search."""
    exact = find_least(replace(problem, noise_limit_ppb=0), limits)
    if exact.peak_bytes < found.peak_bytes:
        found = replace(found, peak_bytes=exact.peak_bytes, schedule=exact.schedule)
    single = exact.single
    fates = fates_of(build_units(problem), single.schedule) if single.peak_bytes < found.single.peak_bytes else None
    if fates is None:
        return found
    same = tuple(int(m) for m in fates)
    return replace(found, single=replace(single, bound_bytes=found.single.bound_bytes, fates=same))


def _round(search: Search, units: Units, best: Low) -> Low:
    """Bisect between bound and plan, starting from roundings of the linear relaxation at each budget."""
    low, rows, turn = best.bound_bytes, start_rows(units, best.vector, spread=12), units.problem.turn
    for _ in range(PROBES):
        if near(best, low) or search.left() <= 0:
            break
        middle = (low + best.peak_bytes) // 2
        model = EpochModel(units, [t for t in rows if t > turn], [t for t in rows if t <= turn], middle)
        program = LinearProgram(model)
        work = COEFFICIENT * len(program)
        search.spend(work)
        values = None
        if work <= MOST_LINEAR:
            values, _ = program.solve(search.clock())
        if values is not None:
            plans = round_all(model, values)
            level = profiles(units, plans).bytes_at
            order = np.argsort(level.max(axis=0), kind="stable")
            rows.update(new_rows(level[:, order[0]], middle, rows))
            for i in order[:STARTS]:
                best = better(units, best, plans[i])
                best = better(units, best, descend(search, units, plans[i], middle))
        low = min(max(low, middle), best.peak_bytes)
    return best


def _refine(search: Search, units: Units, best: Low) -> Low:
    """Minimise the peak over the epoch rows until the simulated peak meets the bound or the work is spent."""
    fates, work = best.vector, EXACT_WORK
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
            best, fates = low_of(units, found.fates, best.bound_bytes), found.fates
        if usage.peak_bytes > found.objective:
            rounds.learn(found.fates, usage, found.objective)
        elif rounds.gap == 0.0:
            break
        else:
            rounds.gap = 0.0
    return best
