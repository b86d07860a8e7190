"""Plans as tables for people and as flat JSON for programs."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from graphplan.plan import Plan
from graphplan.units import format_bytes, format_ns

FATES = {"keep": "kept", "recompute": "recomputed", "compress": "compressed"}


def grid(title: str, *columns: tuple[str, str]) -> Table:
    """Return an empty table; each column is (heading, "left" or "right")."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
    for heading, justify in columns:
        table.add_column(heading, justify="right" if justify == "right" else "left", overflow="fold")
    return table


def plan_tables(plan: Plan, *, decisions: bool = False) -> list[Table | str]:
    """Return what a person wants to know of a plan; with `decisions`, each activation that is not just kept."""
    parts: list[Table | str] = [_figures(plan), _alive(plan), f"Least feasible peak: {_least(plan)}."]
    if decisions:
        parts.append(_decisions(plan))
    return parts


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the same figures as one flat object."""
    counts = plan.counts()
    return {
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "status": plan.status,
        "solver": plan.solver,
        "budget_bytes": plan.budget_bytes,
        "baseline_peak_bytes": plan.baseline_peak_bytes,
        "peak_bytes": plan.peak_bytes,
        "minimum_peak_bytes": plan.minimum_peak_bytes,
        "minimum_reason": plan.minimum_reason,
        "cost_ns": plan.cost_ns,
        "baseline_cost_ns": plan.baseline_cost_ns,
        "lower_bound_ns": plan.lower_bound_ns,
        "overhead": plan.overhead,
        "gap": plan.gap,
        "bound_class": plan.bound_class,
        "any_bound_ns": plan.any_bound_ns,
        "any_gap": plan.any_gap,
        "activations": {FATES[f]: {"count": n, "bytes": b} for f, (n, b) in counts.items()},
        "encoded_bytes": encoded_bytes(plan),
        "peak_step": plan.peak_step,
        "peak_live": [{"name": name, "bytes": n} for name, n in plan.peak_live],
        "fixed_bytes": plan.fixed_bytes,
        "outside_bytes": plan.outside_bytes,
        "device": plan.device,
        "torch_version": plan.torch_version,
        "measured": plan.measured,
    }


def encoded_bytes(plan: Plan) -> int:
    """Return what the compressed activations take while they wait."""
    return sum(d.encoded_bytes for d in plan.decisions.values())


def share(part: int, whole: int) -> str:
    """Return e.g. "59.8 %"."""
    return f"{100 * part / max(1, whole):.1f} %"


def _figures(plan: Plan) -> Table:
    table = grid(f"Plan for {plan.model}: {plan.solver}, {plan.status}", ("", "left"), ("", "right"), ("", "left"))
    table.show_header = False
    unplanned = plan.baseline_peak_bytes
    table.add_row("budget", format_bytes(plan.budget_bytes), f"{share(plan.budget_bytes, unplanned)} of unplanned")
    table.add_row("unplanned peak", format_bytes(unplanned), f"step {format_ns(plan.baseline_cost_ns)}, every op once")
    table.add_row("planned peak", format_bytes(plan.peak_bytes), f"{share(plan.peak_bytes, unplanned)} of unplanned")
    table.add_row("predicted overhead", f"{plan.overhead:+.2%}", f"step {format_ns(plan.cost_ns)}")
    table.add_row("gap", f"{plan.gap:.2%}", f"to the best plan of class: {plan.bound_class}")
    table.add_row("", f"{plan.any_gap:.2%}", "to any plan in this order, however often it recomputes")
    for fate, (count, nbytes) in plan.counts().items():
        note = f"{count} activation{'' if count == 1 else 's'}"
        if fate == "compress" and count:
            note += f", {format_bytes(encoded_bytes(plan))} while they wait"
        table.add_row(FATES[fate], format_bytes(nbytes), note)
    table.add_row("held for the loss", format_bytes(plan.outside_bytes), "p.grad is None when the step begins")
    return table


def _alive(plan: Plan) -> Table:
    table = grid(f"In use at the peak, step {plan.peak_step}", ("storage", "left"), ("size", "right"))
    table.add_row("parameters, buffers, inputs, targets", format_bytes(plan.fixed_bytes))
    for name, nbytes in plan.peak_live:
        table.add_row(name, format_bytes(nbytes))
    rest = plan.peak_bytes - plan.fixed_bytes - sum(n for _, n in plan.peak_live)
    if rest > 0:
        table.add_row("smaller storages and the op's workspace", format_bytes(rest))
    return table


def _least(plan: Plan) -> str:
    return f"{format_bytes(plan.minimum_peak_bytes)}, because {plan.minimum_reason}"


def _decisions(plan: Plan) -> Table:
    table = grid("Not kept as they are", ("activation", "left"), ("size", "right"), ("fate", "left"))
    for name, d in plan.decisions.items():
        if d.fate != "keep":
            how = "" if d.codec is None else f" to {format_bytes(d.encoded_bytes)} by {d.codec}"
            table.add_row(name, format_bytes(d.nbytes), FATES[d.fate] + how)
    return table
