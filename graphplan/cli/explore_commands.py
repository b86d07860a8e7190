"""pareto, trace, profile: the frontier, the captured graph, and what its ops cost on this machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from graphplan.capture import capture
from graphplan.cli.models import Batch, Inputs, ModelName, Size, resolve
from graphplan.cli.output import AsJson, answering, pyplot, show, show_json
from graphplan.cli.plan_commands import Codecs, DeviceFile, TimeLimit, check_folder, load_device, read_options
from graphplan.cli.tables import FATES, grid, plan_json, share
from graphplan.codecs import choose_codecs
from graphplan.device import Device
from graphplan.graph import Graph, StorageKind
from graphplan.instructions import instructions_of
from graphplan.optimize import device_of
from graphplan.pareto import pareto as frontier
from graphplan.plan import Plan
from graphplan.profile import profile as measure_ops
from graphplan.progress import bars
from graphplan.units import format_bytes, format_ns

BAR = 24  # characters of the longest bar
TOP = 15  # ops listed by `profile`


def pareto(
    model: ModelName,
    points: Annotated[int, typer.Option(min=2, help="Budgets between the least and the unplanned peak.")] = 12,
    codecs: Codecs = "exact",
    time_limit: TimeLimit = 60.0,
    plot: Annotated[Path | None, typer.Option(help="Draw the frontier into this file (.png, .svg, .pdf).")] = None,
    out: Annotated[Path | None, typer.Option(help="Write every plan into this folder.")] = None,
    device: DeviceFile = None,
    size: Size = "real",
    batch: Batch = None,
    inputs: Inputs = None,
    as_json: AsJson = None,
) -> None:
    """Print and draw the frontier: how much time each budget costs, down to the least that any plan needs."""
    with answering(as_json) as json_wanted:
        options = read_options("100%", codecs, "auto", time_limit)
        machine = load_device(device)
        check_folder(plot)
        if plot is not None:
            pyplot()  # refused now, not after the plans are made
        check_folder(None if out is None else out / "plan.json")
        named = resolve(model, size, batch, inputs)
        with bars() as report:
            plans = frontier(
                named.module, named.inputs, points=points, codecs=options.codec_names or "none", time_limit=time_limit,
                device=machine, loss_fn=named.loss_fn, example_targets=named.targets, report=report,
            )  # fmt: skip
        if out is not None:
            for p in plans:
                p.save(out / f"plan_{p.budget_bytes}.json")
        if plot is not None:
            draw(plans, plot)
        if json_wanted:
            show_json({"command": "pareto", "model": model, "plans": [plan_json(p) for p in plans]})
        else:
            show(_frontier_table(plans), "Each line is the fastest plan found within its peak.")


def trace(
    model: ModelName,
    out: Annotated[Path | None, typer.Option(help="Write the text here instead.")] = None,
    code: Annotated[bool, typer.Option("--code", help="The fx program as Python instead.")] = False,
    size: Size = "real",
    batch: Batch = None,
    inputs: Inputs = None,
    as_json: AsJson = None,
) -> None:
    """Capture a training step and print its ops and storages; nothing is run or planned."""
    with answering(as_json) as json_wanted:
        check_folder(out)
        named = resolve(model, size, batch, inputs)
        with bars() as report:
            report("capture", 0, 1)
            graph = capture(named.module, named.inputs, None).graph
        text = graph.module.code if code else str(graph)
        if out is not None:
            out.write_text(text + "\n")
        if json_wanted:
            show_json({"command": "trace", "model": model, **_graph_json(graph), "text": text})
        else:
            show(f"wrote {out}" if out is not None else text)


def profile(
    model: ModelName,
    out: Annotated[Path | None, typer.Option(help="Save what was measured, for `--device` elsewhere.")] = None,
    size: Size = "real",
    batch: Batch = None,
    inputs: Inputs = None,
    as_json: AsJson = None,
) -> None:
    """Measure time and workspace of every op of a model's step on this machine."""
    with answering(as_json) as json_wanted:
        check_folder(out)
        named = resolve(model, size, batch, inputs)
        with bars() as report:
            captured = capture(named.module, named.inputs, None)
            instructions = instructions_of(captured.graph, choose_codecs("exact"))
            machine = Device.this(device_of(named.module, captured))
            costs = measure_ops(captured.graph, instructions, machine, progress=report)
        if out is not None:
            machine.save(out)
        rows = _by_target(captured.graph, [costs.cost_ns[i] for i in instructions.program])
        total = sum(ns for _, _, ns in rows)
        if json_wanted:
            ops = [{"op": name, "count": n, "ns": ns} for name, n, ns in rows]
            show_json({"command": "profile", "model": model, "device": machine.name, "step_ns": total, "ops": ops})
            return
        table = grid(f"{model} on {machine.name}, {machine.threads} threads", ("op", "left"), ("calls", "right"))
        table.add_column("time", justify="right")
        table.add_column("of the step", justify="right")
        for name, n, ns in rows[:TOP]:
            table.add_row(name, str(n), format_ns(ns), share(ns, total))
        show(table, f"All ops once: {format_ns(total)}." + (f" Saved in {out}." if out else ""))


def draw(plans: Sequence[Plan], path: Path) -> None:
    """Draw overhead against peak, and the proven bound."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), dpi=130)
    peaks = [p.peak_bytes / 2**20 for p in plans]
    axes.plot(peaks, [100 * p.overhead for p in plans], marker="o", linewidth=1.6, label="plan")
    bounds = [100 * (p.lower_bound_ns / max(1, p.baseline_cost_ns) - 1) for p in plans]
    axes.plot(peaks, bounds, linestyle="--", linewidth=1.2, label="proven bound")
    axes.axvline(plans[-1].baseline_peak_bytes / 2**20, color="grey", linewidth=1, label="unplanned peak")
    axes.set_xlabel("peak of one training step (MiB)")
    axes.set_ylabel("predicted extra time (%)")
    axes.set_title(f"{plans[0].model}: time against memory", loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _frontier_table(plans: Sequence[Plan]) -> Any:
    unplanned = plans[-1].baseline_peak_bytes
    columns = [("peak", "right"), ("of unplanned", "right"), ("overhead", "right"), ("gap", "right")]
    fates = [(name, "right") for name in FATES.values()]
    table = grid(f"Frontier of {plans[0].model}, unplanned {format_bytes(unplanned)}", *columns, *fates, ("", "left"))
    worst = max(p.overhead for p in plans) or 1.0
    for p in plans:
        counts = [str(n) for n, _ in p.counts().values()]
        bar = "█" * round(BAR * p.overhead / worst)
        figures = format_bytes(p.peak_bytes), share(p.peak_bytes, unplanned), f"{p.overhead:+.2%}", f"{p.gap:.2%}"
        table.add_row(*figures, *counts, bar)
    return table


def _graph_json(graph: Graph) -> dict[str, Any]:
    counts = {k.value: sum(s.nbytes for s in graph.storages if s.kind is k) for k in StorageKind}
    return {"fingerprint": graph.fingerprint, "ops": len(graph.ops), "storages": len(graph.storages), "bytes": counts}


def _by_target(graph: Graph, costs: Sequence[int]) -> list[tuple[str, int, int]]:
    """Return (op, calls, ns), most time first; `costs` are the program's, the turn and the end among them."""
    turn = sum(not op.backward for op in graph.ops)
    found: dict[str, list[int]] = defaultdict(list)
    for op in graph.ops:
        found[op.target].append(costs[op.id + int(op.id >= turn)])
    return sorted(((name, len(ns), sum(ns)) for name, ns in found.items()), key=lambda row: -row[2])
