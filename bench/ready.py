"""How long `optimize` takes to a module ready to train: every zoo model at its real size. `python -m bench.ready`.

One process a model, the default limit of 30 s and exact codecs; at shares of the unplanned peak, and right above the
least peak, where in most models only repeated recomputes fit. Every row captures and profiles anew.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from bench.processes import rows_of, run_again, save_row

SHARES = ("90%", "75%", "60%", "50%")
ABOVE_LEAST = 1.02
STAGES = ("memory of each op", "time of each op", "least feasible peak", "solving")


def measure_model(name: str) -> dict[str, Any]:
    """Return one model's rows: seconds to a module that is ready, and of each stage."""
    import torch

    from graphplan.errors import InfeasibleBudget
    from models_zoo import MODELS

    torch.manual_seed(0)
    entry = MODELS[name]
    model, example = entry.build(), entry.example()
    rows: list[dict[str, Any]] = []
    least = 0
    for budget in (*SHARES, "least"):
        try:
            row = ready(model, example, entry.loss, int(ABOVE_LEAST * least) if budget == "least" else budget)
        except InfeasibleBudget as e:
            least = e.minimum_bytes
            continue
        least = row["minimum"]
        rows.append({"budget": budget, **row})
    return {"name": name, "rows": rows}


def ready(model: Any, example: Any, loss: Any, budget: int | str) -> dict[str, Any]:
    """Plan once, and return the seconds, in all and by stage, and what the plan is."""
    from graphplan.optimize import make_options
    from graphplan.planned import PlannedModule
    from graphplan.progress import Stages, quiet

    stages = Stages(quiet)
    loss_fn = loss if example.targets is not None else (lambda outputs: loss(outputs, None))
    start = time.perf_counter()
    options = make_options(budget, loss_fn=loss_fn, example_targets=example.targets, report=stages)
    planned = PlannedModule(model, options)
    plan = planned.prepare(*example.inputs)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "nodes": len(planned.entry().prepared.graph.nodes),
        "stages": stages.seconds(),
        "overhead": plan.overhead,
        "gap": plan.gap,
        "solver": plan.solver,
        "peak": plan.peak_bytes,
        "minimum": plan.minimum_peak_bytes,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    columns = [
        "model",
        "nodes",
        "budget",
        "ready, s",
        *(f"{s}, s" for s in ("capture, memory of each op", *STAGES[1:])),
        "rewrite and the rest, s",
        "overhead",
        "gap",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in rows:
        for b in r["rows"]:
            shown = [b["stages"].get(s, 0.0) for s in STAGES]
            cells = [r["name"], str(b["nodes"]), "least + 2 %" if b["budget"] == "least" else b["budget"]]
            cells += [f"{s:.1f}" for s in (b["seconds"], *shown, b["seconds"] - sum(shown))]
            lines.append("| " + " | ".join([*cells, f"{b['overhead']:+.1%}", f"{b['gap']:.2%}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="zoo models (default: all)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        save_row(f"ready_{args.one}", measure_model(args.one))
        return
    from models_zoo import MODELS

    for name in args.names or MODELS:
        run_again("ready", "--one", name)
    print(table(rows_of("ready_", MODELS)))


if __name__ == "__main__":
    main()
