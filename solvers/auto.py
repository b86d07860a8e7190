"""The default: keep all if that fits, else greedy, else the least peak; then the exact solver for the time
left.

Never worse than its own greedy stage, and without a plan exactly when the budget is below the peak that
`least_peak` reaches. More budget costs no more time wherever the exact solver closes the gap.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from solvers.again import fit_again
from solvers.bounds import ANY_PLAN, ONE_RECOMPUTE, cost_floor, working_set
from solvers.checkpoints import checkpointed
from solvers.evaluate import Fates, fates_of, keep_everything, profiles, to_schedule
from solvers.greedy import improve, polish
from solvers.ilp import answer_any, prove
from solvers.least import Least, find_least, remembered
from solvers.problem import Limits, Problem, Solution, Status
from solvers.search import Search
from solvers.units import Units, build_units

MOMENT = 0.5  # seconds that the least peak always has
GREEDY_SHARE = 0.3  # of the time, before the exact solver has its turn
AGAIN_SHARE = 0.8  # of the time, for plans of more than one recompute a value


def solve_auto(problem: Problem, limits: Limits) -> Solution:
    """Return the best plan that the time allows, with the bound of the class that was proven."""
    units = build_units(problem)
    search = Search(problem, limits, "auto")
    search.stage = "keep_all"
    start, floor = keep_everything(units), cost_floor(problem, units)
    search.offer(problem.program, start)
    search.bound_ns = floor
    if search.closed():
        return replace(search.answer(floor, ANY_PLAN), any_bound_ns=floor)
    if working_set(problem, units).peak_bytes > problem.budget_bytes:
        return _without_plan(search, ANY_PLAN)
    search.share, search.stage = GREEDY_SHARE, "known plan"
    known = remembered(problem, limits)
    if known is not None and known.single.schedule not in limits.known:
        search.limits = replace(limits, known=(*limits.known, known.single.schedule))
    fitting = offer_known(search, units)
    if fitting or known is None or known.single.peak_bytes <= problem.budget_bytes:
        search.stage = "checkpoints"
        fitting += offer_checkpoints(search, units)
        search.stage = "greedy"
        improve(search, units, start, tries=0)
        for fates in fitting:
            relax(search, units, fates)
    search.share, search.stage = 1.0, "least_peak"
    answer = None if search.fates is not None else _below_single(search, units)
    search.stage = "ilp"
    return answer or prove(search, units)[0]


def offer_known(search: Search, units: Units) -> list[Fates]:
    """Offer the schedules that the caller knows; return the fates of those that fit and have fates.

    Raises:
        InvalidSchedule: one of them is no schedule of this problem.
    """
    fitting = []
    for schedule in search.limits.known:
        usage = search.offer(schedule)
        fates = fates_of(units, schedule)
        if usage.peak_bytes <= search.problem.budget_bytes and fates is not None:
            fitting.append(fates)
            if search.schedule == schedule:
                search.fates = fates
    return fitting


def offer_checkpoints(search: Search, units: Units) -> list[Fates]:
    """Offer the plan of `checkpointed` with the least peak, which leaves most to polish; return it if it fits."""
    plans = checkpointed(units)
    best = plans[np.argmin(profiles(units, plans).peak_bytes())]
    usage = search.offer(to_schedule(units, best), best)
    return [best] if usage.peak_bytes <= search.problem.budget_bytes else []


def relax(search: Search, units: Units, fates: Fates) -> None:
    """Offer what polish makes of a plan for a smaller budget."""
    fates = polish(search, units, fates)
    search.offer(to_schedule(units, fates), fates)


def _below_single(search: Search, units: Units) -> Solution | None:
    """Offer the plan of the least peak, or one that recomputes more; return the answer if nothing else can fit."""
    budget, least = search.problem.budget_bytes, remembered(search.problem, search.limits)
    # A search for it that time had cut is not resumed where there is a plan to begin with: time is for that plan.
    if least is None or (search.schedule is None and least.peak_bytes > budget):
        least = _least(search)
    single = least.single
    if single.peak_bytes <= budget:
        search.offer(single.schedule, single.vector)
        relax(search, units, single.vector)
        return None
    if least.peak_bytes <= budget:
        search.offer(least.schedule)
    if search.schedule is None:
        return _without_plan(search, ONE_RECOMPUTE)
    search.share, search.stage = AGAIN_SHARE, "again"
    fit_again(search, units, single)
    search.share = 1.0
    return answer_any(search, units) if single.bound_bytes > budget else None


def _least(search: Search) -> Least:
    return find_least(search.problem, replace(search.limits, seconds=max(MOMENT, search.clock())))


def _without_plan(search: Search, bound_class: str, proven: bool = False) -> Solution:
    least = _least(search)
    proven = proven or bound_class == ANY_PLAN or least.single.bound_bytes > search.problem.budget_bytes
    status = Status.INFEASIBLE if proven else Status.NOT_FOUND
    bound = search.bound_ns or 0
    return Solution(status, None, bound, bound_class, "auto", search.seconds(), least.peak_bytes)
