"""Choices between graphs: several captured forms of one step, of which the fastest plan that fits is taken.

The first form is the step as it is; the others save memory in ways that are not decisions about single activations
(a loss in chunks of rows). Percentages and overheads of every form are of the first. Where that is a roomy one, its
least peak is not looked for: another form's is lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

import solvers
from graphplan import nested
from graphplan.bare import with_noise_measured
from graphplan.capture import Capture
from graphplan.device import Device
from graphplan.errors import InfeasibleBudget, NoParts
from graphplan.lift import Prepared, lift, minimum_reason, schedule_of
from graphplan.noise import Noise
from graphplan.optimize import (
    TIGHTENINGS,
    Options,
    Source,
    check_noise,
    device_of,
    find_least,
    make_plan,
    prepare,
    with_noise,
)
from graphplan.plan import Plan
from graphplan.replay import Batch
from solvers import Schedule, Solution

PARTS = (2, 4, 8)  # of the batch, tried in this order when nothing else fits


@dataclass(slots=True)
class Known:
    """What solving has found out about one form, at any budget."""

    least: Solution | None = None
    schedules: list[Schedule] = field(default_factory=list)
    noise: Noise | None = None  # larger estimates than the first, where a measured plan had broken the cap

    def learn(self, noise: Noise) -> None:
        """Remember larger estimates of noise, by which what was known may round too much."""
        self.noise, self.least, self.schedules = noise, None, []


@dataclass(frozen=True, slots=True)
class Candidate:
    """One form of a step under a budget; `known` is shared by its copies under other budgets.

    `parts`: of the batch, on which the model runs one after the other.
    """

    captured: Capture
    prepared: Prepared
    known: Known = field(default_factory=Known)
    parts: int = 1

    def informed(self) -> Candidate:
        """Return the candidate with the largest estimates of noise that are known of it."""
        noise = self.known.noise
        return self if noise is None else replace(self, prepared=with_noise(self.prepared, noise))

    def least(self, options: Options) -> Solution:
        """Return the plan with the smallest peak that can be found, sought once."""
        if self.known.least is None:
            self.known.least = find_least(self.informed().prepared, options)
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
    candidate, plan = choose(candidates_of(model, source, options), options, source)
    return candidate.prepared, plan


def _captured(source: Source, options: Options) -> tuple[Capture, ...]:
    options.report("capture", 0, 1)
    captured = source.captures()
    options.report("capture", 1, 1)
    return captured


def prepare_candidates(
    captured: Sequence[Capture],
    options: Options,
    device: Device,
    source: Source,
    noise: Noise | None = None,
    like: Candidate | None = None,
) -> Candidates:
    """Profile every form and state its Problem under one budget: that of `like`, or of the first.

    `noise` is what is known of lossy codes.
    """
    run = options.device is None
    prepared: list[Prepared] = []
    for c in captured:
        prepared.append(prepare(c, options, device, run=run, batch=source.batch, known=noise))
        noise = noise or prepared[-1].noise
    first = prepared[0] if like is None else like.prepared
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


def choose(candidates: Candidates, options: Options, source: Source) -> tuple[Candidate, Plan]:
    """Return the fastest plan that fits, and its candidate; an earlier one where later ones are no faster.

    The noise of lossy codes is checked on the source's batch. Where nothing fits, the batch is cut in parts.

    Raises:
        InfeasibleBudget: no plan of any candidate fits; the error is that of the least demanding one.
    """
    try:
        return _fastest(candidates, options, source.batch)
    except InfeasibleBudget as error:
        if source.in_parts is None:
            raise
        return _in_parts(candidates[0], options, source, error)


def candidate_in_parts(first: Candidate, options: Options, source: Source, parts: int) -> Candidate:
    """Return the step on that many parts of the batch, under the budget of `first`.

    Raises:
        NoParts: why that cannot be.
    """
    in_parts = source.in_parts
    assert in_parts is not None
    source = replace(source, captures=lambda: (in_parts(parts),))
    (made,) = prepare_candidates(_captured(source, options), options, first.prepared.device, source, like=first)
    return replace(made, parts=parts)


def with_parts(candidates: Candidates, options: Options, source: Source) -> Candidates:
    """Return the candidates, then the step on 2, 4 and 8 parts of the batch as far as it can be cut."""
    if source.in_parts is None:
        return candidates
    found = list(candidates)
    for parts in PARTS:
        try:
            found.append(candidate_in_parts(candidates[0], options, source, parts))
        except NoParts:
            break
    return tuple(found)


def _in_parts(first: Candidate, options: Options, source: Source, error: InfeasibleBudget) -> tuple[Candidate, Plan]:
    """Return the plan on the fewest parts of the batch that fits.

    Raises:
        InfeasibleBudget: none does, or the batch cannot be cut; the message says why.
    """
    without = error.minimum_bytes
    for parts in PARTS:
        try:
            candidate, plan = _fastest((candidate_in_parts(first, options, source, parts),), options, source.batch)
        except NoParts as e:
            said = f"{error} The batch cannot be cut in {parts} parts: {e}."
            raise InfeasibleBudget(said, minimum_bytes=error.minimum_bytes, binding_op=error.binding_op) from e
        except InfeasibleBudget as e:
            if e.minimum_bytes >= error.minimum_bytes:
                break
            error = e
        else:
            saved = (*plan.saved, ("running the model on parts of the batch", without - plan.peak_bytes))
            return candidate, replace(plan, parts=parts, saved=saved)
    raise error


def _fastest(candidates: Candidates, options: Options, batch: Batch | None) -> tuple[Candidate, Plan]:
    candidates = tuple(c.informed() for c in candidates)
    smallest, least_of = _smallest(candidates, options), _share(candidates, options)
    lowest = smallest.least(least_of)
    share = replace(options, time_limit=options.time_limit / len(candidates))
    found: list[tuple[int, int, Candidate, Plan]] = []
    errors: dict[int, InfeasibleBudget] = {}
    for i, c in enumerate(candidates):
        try:
            found_least = replace(lowest, schedule=None) if c.captured.roomy else c.least(least_of)
            plan = make_plan(c.prepared, found_least, share, tuple(c.known.schedules))
        except InfeasibleBudget as e:
            errors[id(c)] = e
            continue
        prepared, plan = check_noise(c.captured, c.prepared, plan, share, batch)
        if plan.noise and prepared.noise is not None and prepared.noise is not c.prepared.noise:
            c.known.learn(prepared.noise)
        c.known.schedules.append(schedule_of(prepared, plan.steps))
        found.append((plan.cost_ns, i, replace(c, prepared=prepared), plan))
        if plan.cost_ns <= c.prepared.problem.program_cost_ns():
            break  # as fast as the step is when everything is kept
    if not found:
        raise errors[id(smallest)]
    _, _, candidate, plan = min(found, key=lambda f: f[:2])
    least = min(smallest.least_bytes(least_of), plan.peak_bytes)
    return candidate, replace(plan, minimum_peak_bytes=least, minimum_reason=minimum_reason(smallest.prepared.problem))


def first_that_fits(candidates: Candidates, options: Options) -> Candidate:
    """Return the first candidate with a plan under the budget, the least demanding one if there is none."""
    share = _share(candidates, options)
    fit = (c for c in _sought(candidates) if c.least_bytes(share) <= c.prepared.problem.budget_bytes)
    return next(fit, None) or _smallest(candidates, options)


def frontier(candidates: Candidates, options: Options, points: int, batch: Batch | None = None) -> tuple[Plan, ...]:
    """Return up to `points` plans from the least feasible peak to the unplanned one, each cheaper than those before.

    The noise of lossy codes is checked on `batch`.
    """
    share = _share(candidates, options)
    minimum = _smallest(candidates, options).least_bytes(share)
    each = replace(options, time_limit=options.time_limit / len(candidates))
    top = candidates[0].prepared.baseline_peak_bytes
    steps = max(1, points - 1)
    budgets = sorted({minimum + (top - minimum) * i // steps for i in range(max(1, points))} | {top})
    best: dict[int, Plan] = {}
    for c in candidates:
        for budget, plan in _plans(c, budgets, each, minimum, batch):
            if budget not in best or plan.cost_ns < best[budget].cost_ns:
                best[budget] = plan
    plans: list[Plan] = []
    for budget in budgets:
        if budget in best and (not plans or best[budget].cost_ns < plans[-1].cost_ns):
            while plans and plans[-1].peak_bytes >= best[budget].peak_bytes:
                plans.pop()  # found late, for more than it takes
            plans.append(best[budget])
    return tuple(plans)


def least_peaks(candidates: Candidates, options: Options) -> tuple[int, ...]:
    """Return the least feasible peak of each form that is not roomy."""
    share = _share(candidates, options)
    return tuple(c.least_bytes(share) for c in _sought(candidates))


def _plans(
    candidate: Candidate, budgets: list[int], options: Options, minimum: int, batch: Batch | None
) -> list[tuple[int, Plan]]:
    """Return the plan for each budget that one fits, planned again with larger estimates while one breaks the cap."""
    candidate = candidate.informed()
    for tries in range(TIGHTENINGS + 2):  # the last time without lossy codes
        plans, noise = _solved(candidate, budgets, options, minimum), candidate.prepared.noise
        if batch is None or noise is None or not any(p.noise for _, p in plans):
            break
        options.report("noise of the plans", 0, 1)
        found = [p for _, p in plans]
        measured, factor = with_noise_measured(candidate.captured, candidate.prepared, found, batch, options.weights)
        options.report("noise of the plans", 1, 1)
        plans = [(b, p) for (b, _), p in zip(plans, measured, strict=True)]
        if factor == 1:
            break
        if tries < TIGHTENINGS:
            candidate.known.learn(noise.times(factor))
            candidate = candidate.informed()
        else:
            none = with_noise(candidate.prepared, noise.times(math.inf))
            candidate = replace(candidate, prepared=none, known=Known())
    return plans


def _solved(candidate: Candidate, budgets: list[int], options: Options, minimum: int) -> list[tuple[int, Plan]]:
    problem = candidate.prepared.problem
    schedule = None if candidate.captured.roomy else candidate.least(options).schedule
    limits = solvers.Limits(seconds=options.time_limit, known=() if schedule is None else (schedule,))
    options.report("solving", 0, 1)
    if options.solver == "auto":
        found = nested.solve_family(candidate.prepared, budgets, limits)
    else:
        share = replace(limits, seconds=options.time_limit / len(budgets))
        found = tuple(solvers.solve(problem.with_budget(b), options.solver, share) for b in budgets)
    options.report("solving", 1, 1)
    return [
        (
            b,
            replace(
                lift(replace(candidate.prepared, problem=problem.with_budget(b)), solution, minimum),
                parts=candidate.parts,
            ),
        )
        for b, solution in zip(budgets, found, strict=True)
        if solution.schedule is not None
    ]


def _smallest(candidates: Candidates, options: Options) -> Candidate:
    """Return the candidate with the smallest least feasible peak."""
    share = _share(candidates, options)
    return min(_sought(candidates), key=lambda c: c.least_bytes(share))


def _sought(candidates: Candidates) -> Candidates:
    """Return the candidates whose least peak is looked for: a roomy one's only where it is alone."""
    return tuple(c for c in candidates if not c.captured.roomy) or candidates


def _share(candidates: Candidates, options: Options) -> Options:
    """Return the options with the part of the time that each candidate has whose least peak is looked for."""
    return replace(options, time_limit=options.time_limit / len(_sought(candidates)))
