"""pareto: the plans along the memory/time frontier of one model on one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from graphplan.capture import capture
from graphplan.device import Device
from graphplan.errors import InfeasibleBudget
from graphplan.lift import schedule_of
from graphplan.optimize import device_of, find_least, make_options, make_plan, prepare
from graphplan.plan import Plan
from graphplan.progress import Report, quiet
from graphplan.tree import as_tuple


def pareto(
    model: nn.Module,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    points: int = 10,
    codecs: str | Iterable[str] = "exact",
    solver: str = "auto",
    time_limit: float = 30.0,
    device: Device | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    example_targets: Any = None,
    report: Report = quiet,
) -> tuple[Plan, ...]:
    """Return up to `points` plans from the least feasible peak to the unplanned one, evenly spaced in bytes.

    Dominated plans are left out: each returned plan is cheaper than every plan before it. `time_limit` seconds
    are shared by all points. Arguments as in `optimize`.
    """
    share = time_limit / max(1, points)
    options = make_options("100%", codecs, 0.1, solver, share, device, loss_fn, example_targets, report)
    captured = capture(model, as_tuple(example_inputs), example_kwargs)
    there = device or Device.this(device_of(model, captured))
    prepared = prepare(captured, options, there, run=device is None)
    smallest = find_least(prepared, options)
    top = make_plan(prepared, smallest, options)
    least = top.minimum_peak_bytes
    plans: list[Plan] = []
    for i in range(max(1, points) - 1):
        budget = least + (top.peak_bytes - least) * i // max(1, points - 1)
        try:
            known = tuple(schedule_of(prepared, p.steps) for p in plans)
            plan = make_plan(replace(prepared, problem=prepared.problem.with_budget(budget)), smallest, options, known)
        except InfeasibleBudget:
            continue
        if not plans or plan.cost_ns < plans[-1].cost_ns:
            plans.append(plan)
    if not plans or top.cost_ns < plans[-1].cost_ns:
        plans.append(top)
    return tuple(plans)
