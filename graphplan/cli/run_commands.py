"""run and check: what executes real training steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from graphplan.cli.models import Batch, Inputs, ModelName, Named, Size, resolve
from graphplan.cli.optimizers import LEARNING_RATE, StepName, check_step, loss_of, optimizer_of
from graphplan.cli.output import BROKEN, AsJson, BadInput, answering, show, show_json
from graphplan.cli.plan_commands import Codecs, TimeLimit, load_plan, read_options
from graphplan.cli.tables import grid
from graphplan.measure import Measurement, default_loss, measure, with_targets
from graphplan.plan import Plan
from graphplan.planned import PlannedModule, apply, optimize
from graphplan.progress import bars
from graphplan.step import TrainStep, train_step
from graphplan.units import format_bytes, format_ns
from graphplan.verify import verify

PlanOption = Annotated[Path | None, typer.Option("--plan", help="Execute this saved plan.")]
BudgetOption = Annotated[str | None, typer.Option(help='Or plan now: "512MiB", "1.5GB", or "60%".')]


@dataclass(frozen=True, slots=True)
class Trained:
    """What a few planned training steps gave, and what the meter read."""

    losses: tuple[float, ...]
    step_ns: int
    planned: Measurement
    eager: Measurement | None


def run(
    model: ModelName,
    plan: PlanOption = None,
    budget: BudgetOption = None,
    step: StepName = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps (plain SGD, one batch).")] = 5,
    compare: Annotated[
        bool,
        typer.Option("--compare/--no-compare", help="Measure the plain model too: it must fit in memory."),
    ] = True,
    codecs: Codecs = "exact",
    time_limit: TimeLimit = 30.0,
    size: Size = "real",
    batch: Batch = None,
    inputs: Inputs = None,
    as_json: AsJson = None,
) -> None:
    """Train real steps inside the budget: losses, and the measured peak beside the promise (4 if above)."""
    with answering(as_json) as json_wanted:
        saved = _checked(plan, budget, codecs, time_limit, step)
        named = resolve(model, size, batch, inputs)
        planned = _planned(named, saved, budget, codecs, time_limit, step)
        trained = _train(named, planned, steps, compare)
        broken = trained.planned.peak_bytes > planned.plan.budget_bytes
        if json_wanted:
            show_json({"command": "run", "model": model, "ok": not broken, **_run_json(trained, planned.plan)})
        else:
            show(*_run_tables(model, trained, planned.plan))
        if broken:
            raise typer.Exit(BROKEN)


def check(
    model: ModelName,
    plan: PlanOption = None,
    budget: BudgetOption = None,
    step: StepName = None,
    codecs: Codecs = "exact",
    time_limit: TimeLimit = 30.0,
    size: Size = "real",
    batch: Batch = None,
    inputs: Inputs = None,
    as_json: AsJson = None,
) -> None:
    """Check every promise on one step: outputs, gradients, buffers, randomness, peak (4 if one is broken)."""
    with answering(as_json) as json_wanted:
        saved = _checked(plan, budget, codecs, time_limit, step)
        named = resolve(model, size, batch, inputs)
        planned = _planned(named, saved, budget, codecs, time_limit, step)
        with bars() as report:
            report("checking", 0, 1)
            found = verify(planned, named.module, named.inputs, loss_fn=named.loss_fn, example_targets=named.targets)
        if json_wanted:
            checks = [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in found.checks]
            peaks = {"peak_bytes": found.peak_bytes, "predicted_bytes": found.predicted_bytes}
            show_json({"command": "check", "model": model, "ok": found.ok, **peaks, "checks": checks})
            return
        table = grid(f"Promises of the plan for {model}", ("", "left"), ("what", "left"), ("found", "left"))
        for c in found.checks:
            table.add_row("ok" if c.ok else "FAIL", c.name, c.detail)
        show(table)


def _checked(plan: Path | None, budget: str | None, codecs: str, time_limit: float, step: str | None) -> Plan | None:
    """Read what was typed, before a model is built."""
    if step is not None:
        check_step(step)
    if (plan is None) == (budget is None):
        raise BadInput("give either --plan PLAN.json or --budget")
    if plan is not None:
        saved = load_plan(plan)
        if saved.update and step is None:
            raise BadInput(f"{str(plan)!r} is of a whole step with {saved.update}: name the optimizer with --step")
        return saved
    read_options(budget or "", codecs, "auto", time_limit)
    return None


def _planned(
    named: Named, plan: Plan | None, budget: str | None, codecs: str, time_limit: float, step: str | None
) -> PlannedModule | TrainStep:
    if step is not None:
        return _planned_step(named, plan, budget, codecs, time_limit, step)
    if plan is not None:
        return apply(named.module, plan, named.inputs, loss_fn=named.loss_fn, example_targets=named.targets)
    assert budget is not None
    options = read_options(budget, codecs, "auto", time_limit)
    return optimize(
        named.module,
        budget,
        named.inputs,
        codecs=options.codec_names or "none",
        time_limit=time_limit,
        loss_fn=named.loss_fn,
        example_targets=named.targets,
    )


def _planned_step(
    named: Named, plan: Plan | None, budget: str | None, codecs: str, time_limit: float, step: str
) -> TrainStep:
    loss_fn, optimizer = loss_of(named), optimizer_of(step, named)
    if plan is not None:
        return apply(
            named.module, plan, named.inputs, loss_fn=loss_fn, example_targets=named.targets, optimizer=optimizer
        )
    assert budget is not None
    chosen = read_options(budget, codecs, "auto", time_limit).codec_names or "none"
    return train_step(
        named.module, loss_fn, optimizer, budget, named.inputs, named.targets, codecs=chosen, time_limit=time_limit
    )


def _looped(named: Named, planned: PlannedModule | TrainStep) -> Callable[[], Tensor]:
    """Return one training step, its update included."""
    if isinstance(planned, TrainStep):
        return lambda: planned(named.inputs, named.targets)
    scalar = with_targets(loss_of(named), named.targets)
    optimizer = torch.optim.SGD(planned.parameters(), lr=LEARNING_RATE)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = scalar(planned(*named.inputs))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    return step


def _train(named: Named, planned: PlannedModule | TrainStep, steps: int, compare: bool) -> Trained:
    step = _looped(named, planned)
    losses: list[float] = []
    times: list[int] = []
    with bars() as report:
        for index in range(steps):
            report("training", index, steps)
            start = time.perf_counter_ns()
            loss = step()
            times.append(time.perf_counter_ns() - start)
            losses.append(loss.item())
            del loss
        named.module.zero_grad()
        report("measuring", 0, 2)
        ours = _measured(planned, named)
        report("measuring", 1, 2)
        eager = _measured(named.module, named) if compare else None
        report("measuring", 2, 2)
    return Trained(tuple(losses), int(statistics.median(times[1:] or times)), ours, eager)


def _measured(module: torch.nn.Module | TrainStep, named: Named) -> Measurement:
    return measure(module, named.inputs, named.loss_fn or default_loss, example_targets=named.targets, runs=3)


def _run_tables(model: str, trained: Trained, plan: Plan) -> list[Any]:
    losses = grid(f"Training {model}", ("step", "right"), ("loss", "right"))
    for index, loss in enumerate(trained.losses, 1):
        losses.add_row(str(index), f"{loss:.6g}")
    figures = grid("One step, measured", ("", "left"), ("planned", "right"), ("promise", "right"), ("plain", "right"))
    ours, eager = trained.planned, trained.eager
    peak = format_bytes(eager.peak_bytes) if eager else "not measured"
    figures.add_row("peak", format_bytes(ours.peak_bytes), f"at most {format_bytes(plan.budget_bytes)}", peak)
    ratio = ours.peak_bytes / max(1, plan.peak_bytes)
    figures.add_row("predicted peak", format_bytes(plan.peak_bytes), f"measured / predicted {ratio:.4f}", "")
    plain = format_ns(eager.step_ns) if eager else "not measured"
    plain += " without its update" if eager and plan.update else ""
    figures.add_row(
        "whole step" if plan.update else "forward + backward",
        format_ns(ours.step_ns),
        f"predicted {plan.overhead:+.2%}",
        plain,
    )
    figures.add_row("with the optimiser", format_ns(trained.step_ns), "", "")
    within = ours.peak_bytes <= plan.budget_bytes
    return [losses, figures, f"The measured peak is {'within' if within else 'OVER'} the budget."]


def _run_json(trained: Trained, plan: Plan) -> dict[str, Any]:
    eager = trained.eager
    return {
        "losses": list(trained.losses),
        "train_step_ns": trained.step_ns,
        "budget_bytes": plan.budget_bytes,
        "predicted_peak_bytes": plan.peak_bytes,
        "peak_bytes": trained.planned.peak_bytes,
        "step_ns": trained.planned.step_ns,
        "eager_peak_bytes": eager.peak_bytes if eager else None,
        "eager_step_ns": eager.step_ns if eager else None,
        "overhead": plan.overhead,
    }
