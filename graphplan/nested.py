"""More to choose from must not cost anything: what codecs allow is searched from the best of plans that use less.

A larger search may find less before its time is up. So where what all codecs allow is not proven best in a moment,
plans without codecs are searched, those without rounding, and those that recompute nothing; the last search, for plans
of every kind, starts from all of these.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import solvers
from graphplan.lift import Prepared
from graphplan.lower import computing_once, without_codecs
from solvers import Limits, Problem, Schedule, Solution, Status, simulate

FIRST_SHARE = 0.5  # of the time limit, for a proof that makes all else unnecessary
ONCE_SHARE = 0.1  # of the time limit, for plans that recompute nothing, where that proof says nothing of them
NARROW_SHARE = 0.2  # of the time limit at least, for each narrower search after the one without codecs
LAST_SHARE = 0.5  # of the time limit at least, for the last


def solve(prepared: Prepared, solver: str, limits: Limits, least: Solution) -> Solution:
    """Return the solver's answer, no worse than what it finds in `limits.seconds` without codecs.

    Together the searches may take two to three times that, where nothing is proven. `least` is the answer of
    `least_peak`: below the least peak of single recomputation without codecs, what is best of one recompute a value may
    be worse than a plan of more, and no proof of it is tried first.
    """
    start, problem = time.monotonic(), prepared.problem
    if not prepared.instructions.encoded or problem.budget_bytes < _peak(least):
        return solvers.solve(problem, solver, limits)
    found: list[Solution] = []

    def search(part: Problem, share: float, starts: Iterable[Schedule] = ()) -> Solution:
        return solvers.solve(part, solver, replace(limits, seconds=share * limits.seconds, known=_within(part, starts)))

    def known() -> tuple[Schedule, ...]:
        return (*limits.known, *_schedules(found))

    def left() -> float:
        return 1.0 - (time.monotonic() - start) / limits.seconds

    once = computing_once(problem)  # of which a schedule that recomputes is none
    if _several_codes(prepared):
        found.append(search(once, ONCE_SHARE))
    if problem.budget_bytes >= (least.single_peak_bytes or 0):
        found.append(search(problem, FIRST_SHARE, known()))
        if found[-1].status is Status.OPTIMAL:
            return found[-1]
    found.append(search(without_codecs(problem, prepared.instructions), 1.0, limits.known))
    for exact in _without_rounding(prepared):
        found.append(search(exact, max(left() / 3, NARROW_SHARE), known()))
    found.append(search(once, max(left() / 2, NARROW_SHARE)))
    return _cheapest(problem, search(problem, max(left(), LAST_SHARE), known()), found)


def least_peak(prepared: Prepared, seconds: float) -> Solution:
    """Return the plan with the smallest peak that can be found; its `single_peak_bytes` are those without codecs.

    The search is no proof. With those without codecs first, to allow codecs never raises the least peak.
    """
    start, plain = time.monotonic(), None
    if prepared.instructions.encoded:
        plain = solvers.least_peak(without_codecs(prepared.problem, prepared.instructions), Limits(seconds=seconds))
        seconds = max(seconds - (time.monotonic() - start), seconds / 2)
    found = solvers.least_peak(prepared.problem, Limits(seconds=seconds))
    if plain is None:
        return found
    if _peak(found) == _peak(plain):  # the schedule that serves with codecs and without
        found = replace(found, schedule=plain.schedule)
    elif _peak(found) > _peak(plain):
        found = replace(plain, status=Status.FEASIBLE)
    return replace(found, single_peak_bytes=plain.single_peak_bytes)


def _peak(solution: Solution) -> int:
    assert solution.least_peak_bytes is not None
    return solution.least_peak_bytes


def solve_family(prepared: Prepared, budgets: Sequence[int], limits: Limits) -> tuple[Solution, ...]:
    """Return the answer to each budget, ascending: no dearer than what is found without codecs, and without rounding.

    Each of these families has a part of `limits.seconds`, and what the ones before it leave over.
    """
    start, problem = time.monotonic(), prepared.problem
    plain = (without_codecs(problem, prepared.instructions),) if prepared.instructions.encoded else ()
    families = (*plain, *_without_rounding(prepared), problem)
    answers: list[tuple[Solution, ...]] = []
    for i, narrower in enumerate(families):
        left = limits.seconds * (i + 1) / len(families) - (time.monotonic() - start)
        share = replace(limits, seconds=max(left, limits.seconds / len(families) / 2))
        answers.append(solvers.solve_family(narrower, budgets, replace(share, known=_within(narrower, limits.known))))
    return tuple(_cheapest(problem, widest, others) for *others, widest in zip(*answers, strict=True))


def _without_rounding(prepared: Prepared) -> tuple[Problem, ...]:
    """Return what exact codecs allow, where others are offered beside them."""
    problem, encoded = prepared.problem, prepared.instructions.encoded
    rounded = problem.noise_limit_ppb > 0 and any(e.lossy for e in encoded)
    return (replace(problem, noise_limit_ppb=0),) if rounded and not all(e.lossy for e in encoded) else ()


def _within(problem: Problem, schedules: Iterable[Schedule]) -> tuple[Schedule, ...]:
    """Return those of the schedules that a narrower problem allows."""
    return tuple(
        s
        for s in schedules
        if max(s) < len(problem.ops) and sum(problem.ops[o].noise_ppb for o in set(s)) <= problem.noise_limit_ppb
    )


def _schedules(found: Sequence[Solution]) -> Iterator[Schedule]:
    return (s.schedule for s in found if s.schedule is not None)


def _several_codes(prepared: Prepared) -> bool:
    """Whether two results of one op have codes.

    Solvers let such results come back together, so that in their plans one of them is encoded at most.
    """
    coded = {e.of for e in prepared.instructions.encoded}
    return any(len(coded.intersection(op.writes)) > 1 for op in prepared.graph.ops)


def _cheapest(problem: Problem, widest: Solution, others: Sequence[Solution]) -> Solution:
    """Return the cheapest answer, with what is proven of the widest problem."""

    def cost_ns(found: Solution) -> float:
        return math.inf if found.schedule is None else simulate(problem, found.schedule).cost_ns

    best = min((widest, *others), key=cost_ns)
    if best is widest:
        return widest
    return replace(widest, status=Status.FEASIBLE, schedule=best.schedule, solver=best.solver)
