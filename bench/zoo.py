"""The README's table: every zoo model at its real size, measured. `python -m bench.zoo --write README.md`.

Each model runs in a process of its own. Peaks are `graphplan.measure`'s; times are paired steps (forward, loss,
backward) of the planned module and of plain PyTorch in one process.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.page import write_between
from bench.processes import rows_of, run_again, save_row


def measure_model(name: str, pairs: int, time_limit: float) -> dict[str, Any]:
    """Plan and measure one model; return the row's figures."""
    import torch

    import graphplan
    from bench.pairs import paired
    from models_zoo import MODELS

    torch.manual_seed(0)
    entry = MODELS[name]
    model, example = entry.build(), entry.example()
    targets = example.targets
    loss_fn = entry.loss if targets is not None else (lambda outputs: entry.loss(outputs, None))
    loss = {"loss_fn": loss_fn, "example_targets": targets}

    start = time.perf_counter()
    full = graphplan.optimize(model, "100%", example.inputs, time_limit=time_limit, **loss)
    seconds = time.perf_counter() - start
    least, top = full.plan.minimum_peak_bytes, full.plan.baseline_peak_bytes
    middle, at_least = full.at_budget((least + top) // 2), full.at_budget(least)
    start = time.perf_counter()
    middle.prepare(*example.inputs)
    seconds += time.perf_counter() - start
    at_least.prepare(*example.inputs)

    def step(module: Any) -> Any:
        def run() -> None:
            outputs = module(*example.inputs)
            (loss_fn(outputs, targets) if targets is not None else loss_fn(outputs)).backward()
            for p in module.parameters():
                p.grad = None

        return run

    def measured(module: Any) -> graphplan.Measurement:
        return graphplan.measure(module, example.inputs, loss_fn, example_targets=targets, runs=3)

    def peak(module: Any) -> int:
        return measured(module).peak_bytes

    eager = measured(model)
    row = {
        "name": name,
        "nodes": len(full.graph_module.graph.nodes),
        "parameter_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "eager_peak": eager.peak_bytes,
        "step_seconds": eager.step_ns / 1e9,
        "profile_seconds": profile_seconds(full),
        "planning_seconds": seconds,
        "full": _figures(full.plan, peak(full), paired(step(full), step(model), pairs)),
        "middle": _figures(middle.plan, peak(middle), paired(step(middle), step(model), pairs)),
        "least": _figures(at_least.plan, peak(at_least), paired(step(at_least), step(model), max(3, pairs // 2))),
    }
    report = graphplan.verify(middle, model, example.inputs, **loss)
    row["verified"] = report.ok
    return row


def profile_seconds(planned: Any) -> float:
    """Return the seconds that profiling the planned graph from nothing takes."""
    import graphplan
    from graphplan.profile import profile

    entry = planned.entry()
    start = time.perf_counter()
    profile(entry.prepared.graph, entry.prepared.instructions, graphplan.Device.this())
    return time.perf_counter() - start


def _figures(plan: Any, measured: int, ratio: Any) -> dict[str, Any]:
    return {
        "budget": plan.budget_bytes,
        "predicted": plan.peak_bytes,
        "measured": measured,
        "overhead": plan.overhead,
        "gap": plan.gap,
        "status": plan.status,
        "counts": {fate: n for fate, (n, _) in plan.counts().items()},
        "ratio": asdict(ratio),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    columns = (
        "model", "plain PyTorch, MB", "unplanned graph, MB", "least feasible, MB", "middle budget, MB",
        "keep / recompute / compress", "predicted overhead", "time, middle", "time, 100 %", "time, least",
        "planning, s", "profile, steps",
    )  # fmt: skip
    head = "| " + " | ".join(columns) + " |"
    lines = [head, "|" + "---|" * len(columns)]
    for r in rows:
        m, f, least = r["middle"], r["full"], r["least"]
        cells = [
            f"{r['name']} ({r['nodes']} nodes)",
            _mb(r["eager_peak"]),
            _mb(f["measured"]),
            _mb(least["measured"]),
            _mb(m["measured"]),
            " / ".join(str(m["counts"][k]) for k in ("keep", "recompute", "compress")),
            f"{m['overhead']:+.1%} ({m['status']}, gap {m['gap']:.2%})",
            _ratio(m["ratio"]),
            _ratio(f["ratio"]),
            _ratio(least["ratio"]),
            f"{r['planning_seconds']:.1f}",
            f"{r['profile_seconds'] / r['step_seconds']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f}"


def _ratio(r: dict[str, float]) -> str:
    return f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="zoo models (default: all)")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--time-limit", type=float, default=20.0)
    parser.add_argument("--write", type=Path, help="Markdown file whose table is replaced")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        save_row(f"zoo_{args.one}", measure_model(args.one, args.pairs, args.time_limit))
        return
    from models_zoo import MODELS

    for name in args.names or MODELS:
        run_again("zoo", "--one", name, "--pairs", args.pairs, "--time-limit", args.time_limit)
    rows = rows_of("zoo_", MODELS)
    text = table(rows)
    print(text)
    if args.write:
        write_between(args.write, "zoo table", text)


if __name__ == "__main__":
    main()
