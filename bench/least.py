"""What codecs do to the least feasible peak of every zoo model at its real size. `python -m bench.least`.

One capture and one profile a model serve every choice of codecs; lossy ones may add 0.1 of the gradient's variance.
"Across the turn" is what a plan at its least peak holds of activations between forward and backward, encoded or not.
The last columns put every choice at one budget: the least peak of the plans without codecs.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.ground import ground
from bench.page import write_between
from bench.processes import rows_of, run_again, save_row

CHOICES = ("none", "exact", "lossy")


def measure_model(name: str, time_limit: float) -> dict[str, Any]:
    """Return one model's row: figures of the plan at the least peak for each of CHOICES."""
    from graphplan.errors import InfeasibleBudget
    from graphplan.optimize import find_least, make_options, make_plan, prepare

    here = ground(name, time_limit=time_limit)
    row: dict[str, Any] = {"name": name}
    for codecs in CHOICES:
        options, prepared = here.options, here.prepared
        if codecs != "lossy":
            options = make_options("100%", codecs, time_limit=time_limit, **here.loss)
            prepared = prepare(here.captured, options, here.device)
        row.setdefault("baseline", prepared.baseline_peak_bytes)
        least = find_least(prepared, options)
        assert least.least_peak_bytes is not None
        at_least = _at(prepared, least.least_peak_bytes)
        plan = make_plan(at_least, least, options)
        row[codecs] = _figures(plan, least.least_peak_bytes)
        shared = _at(prepared, row[CHOICES[0]]["least"])
        try:
            row[codecs]["shared"] = make_plan(shared, least, options).overhead
        except InfeasibleBudget:
            row[codecs]["shared"] = None
    return row


def _at(prepared: Any, budget_bytes: int) -> Any:
    return replace(prepared, problem=prepared.problem.with_budget(budget_bytes))


def _figures(plan: Any, least: int) -> dict[str, Any]:
    decisions = plan.decisions.values()
    return {
        "least": least,
        "overhead": plan.overhead,
        "activations": sum(d.nbytes for d in decisions),
        "held": sum(d.nbytes if d.fate == "keep" else d.encoded_bytes for d in decisions),
        "counts": {fate: n for fate, (n, _) in plan.counts().items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    columns = ["model", "unplanned, MB", "activations, MB"]
    for c in CHOICES:
        columns += [f"{c}: least, MB", f"{c}: across the turn, MB", f"{c}: keep / recompute / compress"]
    columns += [f"{c}: overhead at the least of {CHOICES[0]}" for c in CHOICES]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in rows:
        cells = [r["name"], _mb(r["baseline"]), _mb(r[CHOICES[0]]["activations"])]
        for c in CHOICES:
            counts = " / ".join(str(r[c]["counts"][k]) for k in ("keep", "recompute", "compress"))
            cells += [_mb(r[c]["least"]), _mb(r[c]["held"]), counts]
        cells += ["infeasible" if r[c]["shared"] is None else f"{r[c]['shared']:+.1%}" for c in CHOICES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="zoo models (default: all)")
    parser.add_argument("--time-limit", type=float, default=20.0)
    parser.add_argument("--write", type=Path, help="Markdown file whose table is replaced")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        save_row(f"least_{args.one}", measure_model(args.one, args.time_limit))
        return
    from models_zoo import MODELS

    for name in args.names or MODELS:
        run_again("least", "--one", name, "--time-limit", args.time_limit)
    rows = rows_of("least_", MODELS)
    text = table(rows)
    print(text)
    if args.write:
        write_between(args.write, "least peaks", text)


if __name__ == "__main__":
    main()
