"""Choices between graphs: several captured forms of one step, of which the fastest plan that fits is taken.

The first form is the step as it is; the others save memory in ways that are not decisions about single activations
(a loss in chunks of rows). Percentages and overheads of every form are of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

import solvers
from graphplan.capture import Capture
from graphplan.device import Device
from graphplan.errors import InfeasibleBudget
from graphplan.lift import Prepared, lift, minimum_reason, schedule_of
from graphplan.optimize import Options, device_of, find_least, make_plan, prepare
from graphplan.plan import Plan
from graphplan.units import parse_budget
from solvers import Schedule, Solution

Captures = Callable[[], tuple[Capture, ...]]


@dataclass(slots=True)
class Candidate:
    """One form of a step and what planning it needs, whatever the budget."""

    captured: Capture
    prepared: Prepared
    least: Solution | None = None
    schedules: list[Schedule] = field(default_factory=list)  # of plans made so far, at any budget


def prepare_candidates(captured: Sequence[Capture], options: Options, device: Device) -> tuple[Candidate, ...]:
    """Profile every form and state its Problem under the same budget."""
    prepared = [prepare(c, options, device, run=options.device is None) for c in captured]
    first = prepared[0]
    for i, p in enumerate(prepared):
        problem = p.problem.with_budget(first.problem.budget_bytes)
        same = {"baseline_peak_bytes": first.baseline_peak_bytes, "baseline_cost_ns": first.baseline_cost_ns}
        prepared[i] = replace(p, problem=problem, **same)  # type: ignore[arg-type]
    return tuple(Candidate(c, p) for c, p in zip(captured, prepared, strict=True))


def at_budget(candidates: Sequence[Candidate], options: Options) -> tuple[Candidate, ...]:
    """Return the candidates under another budget; the lists of schedules stay shared."""
    budget = parse_budget(options.budget, candidates[0].prepared.baseline_peak_bytes)
    return tuple(
        replace(c, prepared=replace(c.prepared, problem=c.prepared.problem.with_budget(budget))) for c in candidates
    )


def find_leasts(candidates: Sequence[Candidate], options: Options) -> int:
    """Find each candidate's least feasible peak, unless known; return the index of the smallest."""
    share = replace(options, time_limit=options.time_limit / len(candidates))
    for c in candidates:
        c.least = c.least or find_least(c.prepared, share)
    return min(range(len(candidates)), key=lambda i: least_bytes(candidates[i]))


def choose(candidates: Sequence[Candidate], options: Options) -> tuple[Candidate, Plan]:
    """Return the fastest plan that fits, and its candidate; an earlier one where later ones are no faster.

    Raises:
        InfeasibleBudget: no plan of any candidate fits; the error is that of the least demanding one.
    """
    smallest = find_leasts(candidates, options)
    share = replace(options, time_limit=options.time_limit / len(candidates))
    found: list[tuple[int, int, Plan]] = []
    errors: dict[int, InfeasibleBudget] = {}
    for i, c in enumerate(candidates):
        assert c.least is not None
        try:
            plan = make_plan(c.prepared, c.least, share, tuple(c.schedules))
        except InfeasibleBudget as e:
            errors[i] = e
            continue
        c.schedules.append(schedule_of(c.prepared, plan.steps))
        found.append((plan.cost_ns, i, plan))
        if plan.cost_ns <= c.prepared.problem.program_cost_ns():
            break  # as fast as the step is when everything is kept
    if not found:
        raise errors[smallest]
    _, i, plan = min(found, key=lambda f: f[:2])
    least = candidates[smallest]
    reason = minimum_reason(least.prepared.problem)
    return candidates[i], replace(plan, minimum_peak_bytes=least_bytes(least), minimum_reason=reason)


def plan_model(model: nn.Module, captures: Captures, options: Options) -> tuple[Prepared, Plan]:
    """Profile and plan what `captures` gives without building the program: what the CLI and tools want."""
    candidate, plan = choose(candidates_of(model, captures, options), options)
    return candidate.prepared, plan


def candidates_of(model: nn.Module, captures: Captures, options: Options) -> tuple[Candidate, ...]:
    """Capture and profile without solving."""
    options.report("capture", 0, 1)
    captured = captures()
    options.report("capture", 1, 1)
    device = options.device or Device.this(device_of(model, captured[0]))
    return prepare_candidates(captured, options, device)


def frontier(candidates: Sequence[Candidate], options: Options, points: int) -> tuple[Plan, ...]:
    """Return up to `points` plans from the least feasible peak to the unplanned one, each cheaper than those before."""
    minimum = least_bytes(candidates[find_leasts(candidates, options)])
    top = candidates[0].prepared.baseline_peak_bytes
    steps = max(1, points - 1)
    budgets = sorted({minimum + (top - minimum) * i // steps for i in range(max(1, points))} | {top})
    best: dict[int, Plan] = {}
    share = replace(options, time_limit=options.time_limit / len(candidates))
    for c in candidates:
        for budget, plan in _plans(c, budgets, share, minimum):
            if budget not in best or plan.cost_ns < best[budget].cost_ns:
                best[budget] = plan
    plans: list[Plan] = []
    for budget in budgets:
        if budget in best and (not plans or best[budget].cost_ns < plans[-1].cost_ns):
            plans.append(best[budget])
    return tuple(plans)


def _plans(candidate: Candidate, budgets: list[int], options: Options, minimum: int) -> list[tuple[int, Plan]]:
    problem = candidate.prepared.problem
    known = () if candidate.least is None or candidate.least.schedule is None else (candidate.least.schedule,)
    limits = solvers.Limits(seconds=options.time_limit, known=known)
    if options.solver == "auto":
        found = solvers.solve_family(problem, budgets, limits)
    else:
        share = replace(limits, seconds=options.time_limit / len(budgets))
        found = tuple(solvers.solve(problem.with_budget(b), options.solver, share) for b in budgets)
    return [
        (b, lift(replace(candidate.prepared, problem=problem.with_budget(b)), solution, minimum))
        for b, solution in zip(budgets, found, strict=True)
        if solution.schedule is not None
    ]


def least_bytes(candidate: Candidate) -> int:
    """Return a candidate's least feasible peak, which `find_leasts` has found."""
    assert candidate.least is not None
    assert candidate.least.least_peak_bytes is not None
    return candidate.least.least_peak_bytes
