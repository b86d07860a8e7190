"""pareto: the plans along the memory/time frontier of one model on one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from graphplan.choices import candidates_of, frontier
from graphplan.device import Device
from graphplan.errors import GraphplanError
from graphplan.optimize import Source, make_options
from graphplan.plan import Plan
from graphplan.progress import Report, quiet
from graphplan.step import TrainStep
from graphplan.tree import arguments


def pareto(
    model: nn.Module,
    example_inputs: Any,
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
        source = Source.of(model, *arguments(example_inputs, example_kwargs), options)
    elif loss_fn is None:
        raise GraphplanError("an optimizer makes whole steps, which need loss_fn")
    else:
        step = TrainStep(model, loss_fn, optimizer, options)
        options = step.options
        source = step.source(dict(example_kwargs) if example_kwargs else example_inputs, example_targets)
    return frontier(candidates_of(model, source, options), options, points, source.batch)
