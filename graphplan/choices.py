"""Choices between graphs: several captured forms of one step, of which the fastest plan that fits is taken.

The first form is the step as it is; the others save memory in ways that are not decisions about single activations
(a loss in chunks of rows). Percentages and overheads of every form are of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

import solvers
from graphplan.capture import Capture
from graphplan.device import Device
from graphplan.errors import InfeasibleBudget
from graphplan.lift import Prepared, lift, minimum_reason, schedule_of
from graphplan.noise import Noise
from graphplan.optimize import Options, Source, check_noise, device_of, find_least, make_plan, prepare
from graphplan.plan import Plan
from graphplan.replay import Batch
from solvers import Schedule, Solution


@dataclass(slots=True)
class Known:
    """What solving has found out about one form, at any budget."""

    least: Solution | None = None
    schedules: list[Schedule] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One form of a step under a budget; `known` is shared by its copies under other budgets."""

    captured: Capture
    prepared: Prepared
    known: Known = field(default_factory=Known)

    def least(self, options: Options) -> Solution:
        """Return the plan with the smallest peak that can be found, sought once."""
        if self.known.least is None:
            self.known.least = find_least(self.prepared, options)
        return self.known.least

    def least_bytes(self, options: Options) -> int:
        """Return the least feasible peak."""
        found = self.least(options).least_peak_bytes
        assert found is not None
        return found


Candidates = tuple[Candidate, ...]


def candidates_of(model: nn.Module, source: Source, options: Options) -> Candidates:
    """Capture and profile without solving."""
    captured = _captured(source, options)
    return prepare_candidates(captured, options, options.device or Device.this(device_of(model, captured[0])), source)


def plan_model(model: nn.Module, source: Source, options: Options) -> tuple[Prepared, Plan]:
    """Capture, profile and plan without building the program: what the CLI and tools want."""
    candidate, plan = choose(candidates_of(model, source, options), options, source.batch)
    return candidate.prepared, plan


def _captured(source: Source, options: Options) -> tuple[Capture, ...]:
    options.report("capture", 0, 1)
    captured = source.captures()
    options.report("capture", 1, 1)
    return captured


def prepare_candidates(
    captured: Sequence[Capture], options: Options, device: Device, source: Source, noise: Noise | None = None
) -> Candidates:
    """Profile every form and state its Problem under the same budget; `noise` is what is known of lossy codes."""
    run = options.device is None
    prepared = [prepare(c, options, device, run=run, batch=source.batch, known=noise) for c in captured]
    first = prepared[0]
    same = [
        replace(
            p,
            problem=p.problem.with_budget(first.problem.budget_bytes),
            baseline_peak_bytes=first.baseline_peak_bytes,
            baseline_cost_ns=first.baseline_cost_ns,
        )
        for p in prepared
    ]
    return tuple(Candidate(c, p) for c, p in zip(captured, same, strict=True))


def at_budget(candidates: Candidates, budget_bytes: int) -> Candidates:
    """Return the candidates under another budget."""
    return tuple(
        replace(c, prepared=replace(c.prepared, problem=c.prepared.problem.with_budget(budget_bytes)))
        for c in candidates
    )


def choose(candidates: Candidates, options: Options, batch: Batch | None = None) -> tuple[Candidate, Plan]:
    """Return the fastest plan that fits, and its candidate; an earlier one where later ones are no faster.

    The noise of lossy codes is checked on `batch`.

    Raises:
        InfeasibleBudget: no plan of any candidate fits; the error is that of the least demanding one.
    """
    share = _share(candidates, options)
    smallest = _smallest(candidates, options)
    found: list[tuple[int, int, Candidate, Plan]] = []
    errors: dict[int, InfeasibleBudget] = {}
    for i, c in enumerate(candidates):
        try:
            plan = make_plan(c.prepared, c.least(share), share, tuple(c.known.schedules))
        except InfeasibleBudget as e:
            errors[id(c)] = e
            continue
        prepared, plan = check_noise(c.captured, c.prepared, plan, share, batch)
        c.known.schedules.append(schedule_of(prepared, plan.steps))
        found.append((plan.cost_ns, i, replace(c, prepared=prepared), plan))
        if plan.cost_ns <= c.prepared.problem.program_cost_ns():
            break  # as fast as the step is when everything is kept
    if not found:
        raise errors[id(smallest)]
    _, _, candidate, plan = min(found, key=lambda f: f[:2])
    least = min(smallest.least_bytes(share), plan.peak_bytes)
    return candidate, replace(plan, minimum_peak_bytes=least, minimum_reason=minimum_reason(smallest.prepared.problem))


def first_that_fits(candidates: Candidates, options: Options) -> Candidate:
    """Return the first candidate with a plan under the budget, the least demanding one if there is none."""
    share = _share(candidates, options)
    fit = (c for c in candidates if c.least_bytes(share) <= c.prepared.problem.budget_bytes)
    return next(fit, None) or _smallest(candidates, options)


def frontier(candidates: Candidates, options: Options, points: int) -> tuple[Plan, ...]:
    """Return up to `points` plans from the least feasible peak to the unplanned one, each cheaper than those before."""
    share = _share(candidates, options)
    minimum = _smallest(candidates, options).least_bytes(share)
    top = candidates[0].prepared.baseline_peak_bytes
    steps = max(1, points - 1)
    budgets = sorted({minimum + (top - minimum) * i // steps for i in range(max(1, points))} | {top})
    best: dict[int, Plan] = {}
    for c in candidates:
        for budget, plan in _plans(c, budgets, share, minimum):
            if budget not in best or plan.cost_ns < best[budget].cost_ns:
                best[budget] = plan
    plans: list[Plan] = []
    for budget in budgets:
        if budget in best and (not plans or best[budget].cost_ns < plans[-1].cost_ns):
            plans.append(best[budget])
    return tuple(plans)


def least_peaks(candidates: Candidates, options: Options) -> tuple[int, ...]:
    """Return the least feasible peak of each form."""
    share = _share(candidates, options)
    return tuple(c.least_bytes(share) for c in candidates)


def _plans(candidate: Candidate, budgets: list[int], options: Options, minimum: int) -> list[tuple[int, Plan]]:
    problem, schedule = candidate.prepared.problem, candidate.least(options).schedule
    limits = solvers.Limits(seconds=options.time_limit, known=() if schedule is None else (schedule,))
    options.report("solving", 0, 1)
    if options.solver == "auto":
        found = solvers.solve_family(problem, budgets, limits)
    else:
        share = replace(limits, seconds=options.time_limit / len(budgets))
        found = tuple(solvers.solve(problem.with_budget(b), options.solver, share) for b in budgets)
    options.report("solving", 1, 1)
    return [
        (b, lift(replace(candidate.prepared, problem=problem.with_budget(b)), solution, minimum))
        for b, solution in zip(budgets, found, strict=True)
        if solution.schedule is not None
    ]


def _smallest(candidates: Candidates, options: Options) -> Candidate:
    """Return the candidate with the smallest least feasible peak."""
    share = _share(candidates, options)
    return min(candidates, key=lambda c: c.least_bytes(share))


def _share(candidates: Candidates, options: Options) -> Options:
    """Return the options with each candidate's part of the time."""
    return replace(options, time_limit=options.time_limit / len(candidates))
