"""Whole steps whose codecs round beside those whose codecs do not, at the same budgets. `python -m bench.rounding`.

Budgets from the least peak of the exact step (0) to the unplanned one (1): what each adds to the plain loop as planned,
and in steps taken in turn; the noise that the codes add to the gradient, weighed as the optimizer does. With
`--write docs/step.md` the table there is replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.page import write_between
from bench.pairs import Ratio, rounds
from bench.processes import rows_of, run_again, save_row

PARTS = (0.0, 0.25)
ADAM = ("vit", "gpt", "bert")  # the others by SGD with momentum
CODECS = {"exact": "exact", "rounding": "lossy"}
STEPS_SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 40.0, 7, 41


def optimizer_of(name: str, model: Any) -> Any:
    """Return the optimizer that such a model is trained with."""
    import torch

    if name in ADAM:
        return torch.optim.AdamW(model.parameters(), lr=1e-4)
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def measure_model(name: str, seconds: float) -> dict[str, Any]:
    """Return one model's rows."""
    import torch

    import graphplan
    from models_zoo import MODELS

    torch.manual_seed(0)
    entry = MODELS[name]
    model, example = entry.build(), entry.example()
    optimizer = optimizer_of(name, model)
    full = {
        kind: graphplan.train_step(
            model, entry.loss, optimizer, "100%", example.inputs, example.targets, codecs=codecs, time_limit=seconds
        )
        for kind, codecs in CODECS.items()
    }
    first = full["exact"].plan
    low, top = first.minimum_peak_bytes, first.baseline_peak_bytes
    found = []
    for part in PARTS:
        steps = {kind: s.at_budget(int(low + part * (top - low))) for kind, s in full.items()}
        for step in steps.values():
            step.prepare(example.inputs, example.targets)
        found.append({"part": part, **_compared(steps, entry, example)})
    return {"name": name, "optimizer": type(optimizer).__name__, "least": low, "unplanned": top, "budgets": found}


def _compared(steps: dict[str, Any], entry: Any, example: Any) -> dict[str, Any]:
    """Return what the plans of two steps say, and what they take beside the plain loop."""
    first = steps["exact"]

    def plain() -> None:
        loss = entry.loss(first.model(*example.inputs), example.targets)
        loss.backward()
        first.optimizer.step()
        first.optimizer.zero_grad()

    def planned(step: Any) -> Callable[[], object]:
        return lambda: step(example.inputs, example.targets)

    calls = (plain, *map(planned, steps.values()))
    once = sum(rounds(calls, 1)[0]) / 1e9
    times = rounds(calls, max(LEAST_ROUNDS, min(MOST_ROUNDS, int(STEPS_SECONDS / once))))
    plan = steps["rounding"].plan
    row = {kind: step.plan.overhead for kind, step in steps.items()}
    row |= {f"{kind} step": asdict(Ratio.of([t[i + 1] / t[0] for t in times])) for i, kind in enumerate(steps)}
    row["rounding over exact"] = asdict(Ratio.of([t[2] / t[1] for t in times]))
    return {**row, "noise": plan.noise, "measured": plan.noise_measured, "bias": plan.noise_bias}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    columns = (
        "model", "optimizer", "budget, MB", "exact: planned", "rounding: planned", "noise predicted", "measured",
        "exact: steps / plain loop", "rounding: steps / plain loop", "rounding / exact",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in rows:
        for b in r["budgets"]:
            budget = r["least"] + b["part"] * (r["unplanned"] - r["least"])
            ratios = (b["exact step"], b["rounding step"], b["rounding over exact"])
            cells = [
                r["name"], r["optimizer"], f"{budget / 1e6:.1f} ({b['part']:.0%})", f"{b['exact']:+.1%}",
                f"{b['rounding']:+.1%}", f"{b['noise']:.3f}", f"{b['measured']:.3f}",
                *(f"{x['median']:.2f} ({x['low']:.2f} to {x['high']:.2f})" for x in ratios),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["gpt", "resnet50"], help="zoo models")
    parser.add_argument("--time-limit", type=float, default=20.0, help="seconds of solving")
    parser.add_argument("--write", type=Path, help="Markdown file whose table is replaced")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        save_row(f"rounding_{args.one}", measure_model(args.one, args.time_limit))
        return
    for name in args.names:
        run_again("rounding", "--one", name, "--time-limit", args.time_limit)
    text = table(rows_of("rounding_", ["vit", "gpt", "bert", "resnet50", "unet"]))
    print(text)
    if args.write:
        write_between(args.write, "rounding", text)


if __name__ == "__main__":
    main()
