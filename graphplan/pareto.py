"""pareto: the plans along the memory/time frontier of one model on one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

import solvers
from graphplan.device import Device
from graphplan.errors import GraphplanError
from graphplan.lift import Prepared, lift
from graphplan.optimize import Options, Source, find_least, make_options, prepare_model
from graphplan.plan import Plan
from graphplan.progress import Report, quiet
from graphplan.step import TrainStep
from graphplan.tree import as_tuple
from solvers import Limits


def pareto(
    model: nn.Module,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    points: int = 10,
    codecs: str | Iterable[str] = "exact",
    gradient_noise: float = 0.1,
    solver: str = "auto",
    time_limit: float = 30.0,
    device: Device | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    example_targets: Any = None,
    report: Report = quiet,
    optimizer: Optimizer | None = None,
) -> tuple[Plan, ...]:
    """Return up to `points` plans from the least feasible peak to the unplanned one, evenly spaced in bytes.

    Dominated plans are left out: each returned plan is cheaper than every plan before it. `time_limit` seconds
    are shared by all points, which `solve_family` answers together. Arguments as in `optimize`; with an `optimizer`
    (and a `loss_fn`), the plans are of whole steps, as `train_step` makes them.
    """
    options = make_options("100%", codecs, gradient_noise, solver, time_limit, device, loss_fn, example_targets, report)
    if optimizer is None:
        source = Source.of(model, as_tuple(example_inputs), example_kwargs or {}, options)
    elif loss_fn is None:
        raise GraphplanError("an optimizer makes whole steps, which need loss_fn")
    else:
        step = TrainStep(model, loss_fn, optimizer, options)
        options = step.options
        source = step.source(dict(example_kwargs) if example_kwargs else example_inputs, example_targets)
    return along(prepare_model(model, source, options), options, points)


def along(prepared: Prepared, options: Options, points: int) -> tuple[Plan, ...]:
    """Return up to `points` plans along the frontier of a prepared graph, at most one solve each."""
    smallest = find_least(prepared, options)
    least, top = smallest.least_peak_bytes, prepared.baseline_peak_bytes
    assert least is not None
    assert smallest.schedule is not None
    steps = max(1, points - 1)
    budgets = sorted({least + (top - least) * i // steps for i in range(max(1, points))} | {top})
    problem = prepared.problem
    limits = Limits(seconds=options.time_limit, known=(smallest.schedule,))
    options.report("solving", 0, 1)
    if options.solver == "auto":
        found = solvers.solve_family(problem, budgets, limits)
    else:
        share = replace(limits, seconds=options.time_limit / len(budgets))
        found = tuple(solvers.solve(problem.with_budget(b), options.solver, share) for b in budgets)
    options.report("solving", 1, 1)
    plans: list[Plan] = []
    for budget, solution in zip(budgets, found, strict=True):
        if solution.schedule is None:
            continue
        plan = lift(replace(prepared, problem=problem.with_budget(budget)), solution, least)
        if not plans or plan.cost_ns < plans[-1].cost_ns:
            plans.append(plan)
    return tuple(plans)
