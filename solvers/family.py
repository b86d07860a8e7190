"""One problem at many budgets, as a family: what one budget taught, the next one starts from.

From the smallest budget up: every plan fits the larger budgets too, so that cost never rises; the memory rows and the
cuts of one budget are valid at any other, and the units are built once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from solvers.auto import offer_known, relax
from solvers.bounds import ANY_PLAN, ONE_RECOMPUTE, cost_floor
from solvers.evaluate import Fates, keep_everything
from solvers.greedy import improve
from solvers.ilp import prove
from solvers.least import remembered
from solvers.problem import Limits, Problem, Solution, Status
from solvers.rounds import WIDE, Rounds
from solvers.search import Search
from solvers.units import Units, build_units

REMEMBERED = 3  # plans of smaller budgets that are candidates
SLOPE = 0.6  # the first i of n budgets have (i / n)^SLOPE of the time: small ones are hard, and teach the others
PATIENCE = 0.1  # of the time, for a linear program: one that is cut teaches nothing


def solve_family(problem: Problem, budgets: Iterable[int], limits: Limits) -> tuple[Solution, ...]:
    """Return a Solution for each budget in bytes, in ascending order of budgets without repeats.

    `limits.seconds` are for all of them together; what one leaves over, the later ones have. `limits.known` holds
    schedules to start from, of `least_peak` say: a budget below all of them and greedy's reach is NOT_FOUND.
    """
    units, least = build_units(problem), remembered(problem, limits)
    known = limits.known if least is None else (*limits.known, least.single.schedule)
    ordered, started = sorted(set(budgets)), time.monotonic()
    patience = limits.seconds * PATIENCE
    rounds: Rounds | None = None
    found: list[Solution] = []
    for i, budget in enumerate(ordered):
        spent = time.monotonic() - started
        left = limits.seconds * ((i + 1) / len(ordered)) ** SLOPE - spent
        ends = spent > limits.seconds - patience
        at_least = limits.seconds / len(ordered) / 2 if ends else patience
        enough = 1.0 if ends else 0.0 if left > 0 else WIDE
        share = replace(limits, seconds=max(at_least, left), known=known)
        answer, rounds = _member(problem.with_budget(budget), units, share, rounds, enough, patience)
        found.append(answer)
        if answer.schedule is not None:
            known = (*known[-REMEMBERED:], answer.schedule)
    return tuple(found)


def _member(
    problem: Problem, units: Units, limits: Limits, before: Rounds | None, enough: float, patience: float
) -> tuple[Solution, Rounds | None]:
    """Solve one budget from the plans and rows known; where what others proved leaves at most a gap, only from that."""
    units = replace(units, problem=problem)
    search = Search(problem, limits, "family")
    search.bound_ns = cost_floor(problem, units)
    search.offer(problem.program, keep_everything(units))
    if search.closed():
        return replace(search.answer(search.bound_ns, ANY_PLAN), any_bound_ns=search.bound_ns), before
    for fates in _starts(search, units):
        relax(search, units, fates)
    if search.schedule is None:
        improve(search, units, keep_everything(units), tries=0)
    if search.schedule is None:
        return Solution(Status.NOT_FOUND, None, search.bound_ns, ANY_PLAN, "family", search.seconds()), before
    floor, kind = search.bound_ns, ANY_PLAN
    if search.fates is not None and before is not None:
        search.bound_ns, kind = max(floor, Rounds.after(before, units, search).bound()), ONE_RECOMPUTE
    if search.closed(enough):
        return replace(search.answer(search.bound_ns, kind), any_bound_ns=floor), before
    return prove(search, units, before, any_seconds=0.0, patience=patience)


def _starts(search: Search, units: Units) -> list[Fates]:
    """The known plans that fit, the cheapest last: it is polished for this budget."""
    fitting = offer_known(search, units)
    return fitting[-1:]
