"""plan, show, diff, solvers, models: what needs no training step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import solvers
from graphplan.choices import candidates_of, first_that_fits, plan_model
from graphplan.cli.models import Batch, Inputs, ModelName, Named, Size, resolve, zoo
from graphplan.cli.optimizers import StepName, check_step, loss_of, optimizer_of
from graphplan.cli.output import AsJson, BadInput, answering, show, show_json
from graphplan.cli.tables import grid, plan_json, plan_tables
from graphplan.device import Device
from graphplan.lift import Prepared, infeasible, lift
from graphplan.optimize import Options, Source, make_options
from graphplan.plan import Plan
from graphplan.progress import Report, Stages, bars
from graphplan.step import TrainStep
from graphplan.units import format_bytes, format_ns
from solvers import Limits, Solution

ALL = "all"

Budget = Annotated[str, typer.Option(help='"512MiB", "1.5GB", or "60%" of the unplanned step\'s peak.')]
Codecs = Annotated[str, typer.Option(help='"exact", "none", or names with commas.')]
SolverName = Annotated[str, typer.Option(help='A name from `graphplan solvers`, or "all" to compare them.')]
TimeLimit = Annotated[float, typer.Option(help="Seconds for solving.")]
Out = Annotated[Path | None, typer.Option(help="Write the plan here (JSON).")]
DeviceFile = Annotated[
    Path | None, typer.Option("--device", help="Plan for the machine saved in this file (`graphplan profile --out`).")
]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan written by `graphplan plan --out`.")]


@dataclass(frozen=True, slots=True)
class Row:
    """One solver's answer under one budget."""

    solution: Solution
    peak_bytes: int | None
    cost_ns: int | None


def plan(
    model: ModelName,
    budget: Budget,
    codecs: Codecs = "exact",
    solver: SolverName = "auto",
    time_limit: TimeLimit = 30.0,
    out: Out = None,
    device: DeviceFile = None,
    step: StepName = None,
    graph: Annotated[bool, typer.Option("--graph", help="Print the captured graph too.")] = False,
    size: Size = "real",
    batch: Batch = None,
    inputs: Inputs = None,
    as_json: AsJson = None,
) -> None:
    """Plan a model's training step under a budget and say what the plan does; nothing is trained."""
    with answering(as_json) as json_wanted:
        checked = read_options(budget, codecs, "auto" if solver == ALL else solver, time_limit, load_device(device))
        check_folder(out)
        with bars() as report:
            stages = Stages(report)
            named = resolve(model, size, batch, inputs)
            options = with_loss(checked, named, stages, step)
            rows: list[Row] = []
            if solver == ALL:
                prepared, made, rows = compare(named, options, step)
            else:
                prepared, made = plan_model(named.module, source_of(named, step, options), options)
        if out is not None:
            made.save(out)
        if json_wanted:
            extra = {"graph": str(prepared.graph)} if graph else {}
            _plan_as_json(made, rows, out, {**extra, "stages_s": stages.seconds()})
            return
        if graph:
            show(str(prepared.graph))
        show(*plan_tables(made))
        if rows:
            show(_solver_table(rows, made))
        show("Took " + ", ".join(f"{stage} {s:.1f} s" for stage, s in stages.seconds().items()) + ".")
        show(_next(model, budget, out, size, batch, inputs, step))


def show_plan(path: PlanFile, as_json: AsJson = None) -> None:
    """Show a saved plan: its figures, its peak, and every activation that is not simply kept."""
    with answering(as_json) as json_wanted:
        made = load_plan(path)
        if json_wanted:
            show_json({"command": "show", **plan_json(made), "decisions": _decisions_json(made)})
        else:
            show(*plan_tables(made, decisions=True))


def diff(before: PlanFile, after: PlanFile, as_json: AsJson = None) -> None:
    """Show what the second plan does differently: figures, then each activation whose fate changed."""
    with answering(as_json) as json_wanted:
        a, b = load_plan(before), load_plan(after)
        if not json_wanted:
            show(a.diff(b))
            return
        first, second = _decisions_json(a), _decisions_json(b)
        names = sorted(first.keys() | second.keys())
        changed = {n: {"before": first.get(n), "after": second.get(n)} for n in names if first.get(n) != second.get(n)}
        same = a.fingerprint == b.fingerprint
        show_json({"command": "diff", "same_graph": same, **_sides(a, b), "changed": changed})


def list_solvers(as_json: AsJson = None) -> None:
    """List the solvers and what each one proves."""
    with answering(as_json) as json_wanted:
        if json_wanted:
            show_json({"command": "solvers", "solvers": dict(solvers.DESCRIPTIONS)})
            return
        table = grid("Solvers", ("name", "left"), ("what it does", "left"))
        for name in solvers.SOLVERS:
            table.add_row(name, solvers.DESCRIPTIONS[name])
        show(table)


def list_models(as_json: AsJson = None) -> None:
    """List the models of models_zoo."""
    with answering(as_json) as json_wanted, bars() as report:
        table = zoo()
        rows: list[tuple[str, int, str]] = []
        for name, entry in table.items():
            report("counting parameters", len(rows), len(table))
            rows.append((name, _parameters(entry.build), entry.source))
        if json_wanted:
            listed = [{"name": f"models_zoo:{n}", "parameters": p, "source": s} for n, p, s in rows]
            show_json({"command": "models", "models": listed})
            return
        out = grid("Models", ("name", "left"), ("parameters", "right"), ("source", "left"))
        for name, count, source in rows:
            out.add_row(f"models_zoo:{name}", f"{count:,}", source)
        show(
            out,
            "Or your own: package.module:factory or file.py:factory, giving a module and its example inputs.",
        )


def read_options(
    budget: str, codecs: str, solver: str = "auto", time_limit: float = 30.0, device: Device | None = None
) -> Options:
    """Check what was typed before any model is built."""
    chosen: str | list[str] = codecs
    if "," in codecs:
        chosen = [c.strip() for c in codecs.split(",") if c.strip()]
    return make_options(budget, chosen, solver=solver, time_limit=time_limit, device=device)


def with_loss(options: Options, named: Named, report: Report, step: str | None = None) -> Options:
    """Return the options with the model's own loss, so that its memory is reserved, or for a whole step."""
    if step is not None:
        check_step(step)
        return replace(options, whole_step=True, report=report)
    return replace(options, loss_fn=named.loss_fn, example_targets=named.targets, report=report)


def load_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        BadInput: there is no such file, or it is not text.
        PlanFormatError: it is not a plan.
    """
    try:
        return Plan.load(path)
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read plan {str(path)!r}: {e.strerror if isinstance(e, OSError) else e}") from e


def load_device(path: Path | None) -> Device | None:
    """Read a device file, if one is named.

    Raises:
        BadInput: there is no such file.
        DeviceFormatError: it is not a device file.
    """
    try:
        return None if path is None else Device.load(path)
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read device {str(path)!r}: {e.strerror if isinstance(e, OSError) else e}") from e


def check_folder(out: Path | None) -> None:
    """Refuse an output path that could not be written, before the work is done."""
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise BadInput(f"--out {str(out)!r}: no folder {str(out.parent)!r}, or it names a folder itself")


def source_of(named: Named, step: str | None, options: Options) -> Source:
    """Return the model's forward and backward, or its whole step with a new optimizer, to be captured."""
    if step is None:
        return Source.of(named.module, named.inputs, {}, options)
    whole = TrainStep(named.module, loss_of(named), optimizer_of(step, named), options)
    return whole.source(named.inputs, named.targets)


def compare(named: Named, options: Options, step: str | None = None) -> tuple[Prepared, Plan, list[Row]]:
    """Ask every solver under one budget; the plan returned is the fastest that fits.

    Raises:
        InfeasibleBudget: no solver found a plan.
    """
    candidates = candidates_of(named.module, source_of(named, step, options), options)
    prepared = first_that_fits(candidates, options).prepared
    limits = Limits(seconds=options.time_limit)
    rows: list[Row] = []
    for name in solvers.SOLVERS:
        options.report(f"solver {name}", 0, 1)
        rows.append(_row(prepared, solvers.solve(prepared.problem, name, limits)))
        options.report(f"solver {name}", 1, 1)
    least = solvers.least_peak(prepared.problem, limits).least_peak_bytes
    assert least is not None
    found = [(r.cost_ns, i, r.solution) for i, r in enumerate(rows) if r.cost_ns is not None]
    if not found:
        raise infeasible(prepared, least)
    return prepared, lift(prepared, min(found)[2], least), rows


def _row(prepared: Prepared, solution: Solution) -> Row:
    if solution.schedule is None:
        return Row(solution, None, None)
    usage = solvers.simulate(prepared.problem, solution.schedule)
    return Row(solution, usage.peak_bytes, usage.cost_ns)


def _solver_table(rows: list[Row], made: Plan) -> Any:
    columns = [
        ("solver", "left"),
        ("answer", "left"),
        ("peak", "right"),
        ("overhead", "right"),
        ("gap", "right"),
    ]
    table = grid("Solvers under this budget", *columns, ("time", "right"))
    for r in rows:
        s, spent = r.solution, format_ns(r.solution.seconds * 1e9)
        if r.cost_ns is None or r.peak_bytes is None:
            table.add_row(s.solver, s.status.name.lower(), "", "", "", spent)
            continue
        overhead = r.cost_ns / max(1, made.baseline_cost_ns) - 1
        gap = max(0, r.cost_ns - s.lower_bound_ns) / max(1, r.cost_ns)
        table.add_row(
            s.solver,
            s.status.name.lower(),
            format_bytes(r.peak_bytes),
            f"{overhead:+.2%}",
            f"{gap:.2%}",
            spent,
        )
    return table


def _row_json(row: Row) -> dict[str, Any]:
    s = row.solution
    return {
        "solver": s.solver,
        "status": s.status.name.lower(),
        "peak_bytes": row.peak_bytes,
        "cost_ns": row.cost_ns,
        "lower_bound_ns": s.lower_bound_ns,
        "bound_class": s.bound_class,
        "seconds": s.seconds,
    }


def _plan_as_json(made: Plan, rows: list[Row], out: Path | None, extra: dict[str, Any]) -> None:
    if rows:
        extra = {**extra, "solvers": [_row_json(r) for r in rows]}
    show_json({"command": "plan", **plan_json(made), "out": str(out) if out else None, **extra})


def _next(
    model: str, budget: str, out: Path | None, size: str, batch: int | None, inputs: list[str] | None, step: str | None
) -> str:
    words = ["graphplan run", model, f"--plan {out}" if out else f"--budget {budget!r}"]
    words += [f"--step {step}"] if step else []
    words += [f"--size {size}"] if size != "real" else []
    words += [f"--batch {batch}"] if batch else []
    words += [f"--input {text!r}" for text in inputs or ()]
    return "Next: " + " ".join(words)


def _decisions_json(made: Plan) -> dict[str, dict[str, Any]]:
    return {
        n: {"fate": d.fate, "bytes": d.nbytes, "codec": d.codec, "encoded_bytes": d.encoded_bytes}
        for n, d in made.decisions.items()
    }


def _sides(a: Plan, b: Plan) -> dict[str, Any]:
    keys = ("budget_bytes", "peak_bytes", "overhead", "gap")
    return {"before": {k: getattr(a, k) for k in keys}, "after": {k: getattr(b, k) for k in keys}}


def _parameters(build: Any) -> int:
    with torch.device("meta"):
        module: nn.Module = build()
    return sum(p.numel() for p in module.parameters())
