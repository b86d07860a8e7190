"""Hybrid plans beside plans that only recompute and plans that only compress. `python -m bench.hybrid`.

Predicted: every zoo model at its real size, budgets from the least of the plans without codecs (0) to the unplanned
peak (1), what each kind of plan adds to the step. Steps: the same plans run for real, paired. Held: the least that a
plan holds of activations between forward and backward under the cap on noise, and what it costs. Sums: the noise that
single codes are predicted to add, over that of all of them together.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.ground import (
    Ground,
    ground,
    held_at_turn,
    joint_noise,
    plan_of,
    recompute_only,
    turn_only,
    without_encoded,
)
from bench.page import write_between
from bench.processes import rows_of, run_again, save_row

BUDGETS = (0.0, 0.1, 0.25, 0.5, 0.75)
STEPS = BUDGETS[:-1]  # whose steps are run
KINDS = ("hybrid", "recompute", "compress")
STEPS_SECONDS, MOST_PAIRS = 40.0, 41
SUMS = ("int8", "int4", "int2")


def problems_of(here: Ground) -> dict[str, Any]:
    """Return the Problem of each of KINDS."""
    from graphplan.lower import computing_once

    problem = here.prepared.problem
    return {"hybrid": problem, "recompute": recompute_only(here.prepared), "compress": computing_once(problem)}


def predicted(here: Ground, seconds: float) -> dict[str, Any]:
    """Return, at each of BUDGETS, the overhead of each kind (None: nothing found), and the schedules."""
    from graphplan.errors import InfeasibleBudget
    from graphplan.lift import schedule_of
    from graphplan.optimize import find_least, make_plan

    options = replace(here.options, time_limit=seconds)
    kinds = {k: replace(here.prepared, problem=p) for k, p in problems_of(here).items()}
    kinds["recompute"] = replace(kinds["recompute"], instructions=without_encoded(here.prepared.instructions))
    least = {k: find_least(p, options) for k, p in kinds.items()}
    low, top = least["recompute"].least_peak_bytes, here.prepared.baseline_peak_bytes
    assert low is not None
    rows, schedules = [], {}
    for part in BUDGETS:
        budget = int(low + part * (top - low))
        row: dict[str, Any] = {"part": part, "budget": budget}
        for kind, prepared in kinds.items():
            start = time.monotonic()
            at = replace(prepared, problem=prepared.problem.with_budget(budget))
            try:
                plan = make_plan(at, least[kind], options)
            except InfeasibleBudget:
                row[kind] = None
                continue
            row[f"{kind}_s"] = time.monotonic() - start
            row[kind], row[f"{kind}_status"], row[f"{kind}_noise"] = plan.overhead, plan.status, plan.noise
            schedules[part, kind] = schedule_of(at, plan.steps)
        rows.append(row)
    peaks = {k: s.least_peak_bytes for k, s in least.items()}
    return {"least": peaks, "baseline": top, "budgets": rows, "schedules": schedules}


def steps(here: Ground, schedules: dict[Any, Any], pairs: int) -> list[dict[str, Any]]:
    """Run the plans of each budget beside plain steps, in turn; return each kind's time over plain's.

    At least `pairs` times, more where steps are short. A kind whose plan is the hybrid one itself is not run again.
    """
    import graphplan
    from bench.pairs import Ratio, rounds

    def step(module: Any) -> Any:
        def run() -> None:
            outputs, targets = module(*here.example.inputs), here.example.targets
            (here.loss_fn(outputs, targets) if targets is not None else here.loss_fn(outputs)).backward()
            for p in here.model.parameters():
                p.grad = None

        return run

    rows = []
    for part in STEPS:
        found = {k: schedules[part, k] for k in KINDS if (part, k) in schedules}
        kinds = [k for k in found if k == "hybrid" or found[k] != found.get("hybrid")]
        modules = [
            graphplan.apply(here.model, plan_of(here, schedules[part, k]), here.example.inputs, **here.loss)
            for k in kinds
        ]
        calls = tuple(step(m) for m in (here.model, *modules))
        once = sum(rounds(calls, 1)[0]) / 1e9
        times = rounds(calls, max(pairs, min(MOST_PAIRS, int(STEPS_SECONDS / once))))
        row: dict[str, Any] = {"part": part, "same": [k for k in found if k not in kinds]}
        for i, kind in enumerate(kinds):
            row[kind] = asdict(Ratio.of([t[i + 1] / t[0] for t in times]))
            if kind != "hybrid" and "hybrid" in kinds:
                row[f"hybrid over {kind}"] = asdict(Ratio.of([t[1] / t[i + 1] for t in times]))
        rows.append(row)
    return rows


def held(here: Ground, seconds: float) -> list[dict[str, Any]]:
    """Return what plans hold between forward and backward at least: bytes, noise predicted and joint, overhead."""
    import solvers
    from graphplan.graph import StorageKind
    from graphplan.lower import computing_once
    from solvers import Limits

    problem, graph = here.prepared.problem, here.captured.graph
    activations = sum(s.nbytes for s in graph.storages if s.kind is StorageKind.ACTIVATION)
    at_all = held_at_turn(problem, problem.program)
    rows = []
    across = turn_only(problem)
    for kind, only in (("compress", computing_once(across)), ("hybrid", across)):
        least = solvers.least_peak(only, Limits(seconds=seconds))
        assert least.schedule is not None
        rows.append(_held_row(here, kind, least.schedule, activations, at_all))
    # Twelve times less, as fast as may be; again below the cap where all codes together break it, as `optimize` does.
    only = turn_only(problem, activations // 12 + at_all - activations)
    while True:
        fast = solvers.solve(only, "auto", Limits(seconds=2 * seconds, known=(least.schedule,)))
        if fast.schedule is None:
            return rows
        row = _held_row(here, "hybrid, a twelfth", fast.schedule, activations, at_all)
        if row["measured"] * 1e9 <= problem.noise_limit_ppb:
            return [*rows, row]
        only = replace(only, noise_limit_ppb=int(0.9 * only.noise_limit_ppb))


def _held_row(here: Ground, kind: str, schedule: Any, activations: int, at_all: int) -> dict[str, Any]:
    from solvers import simulate

    problem = here.prepared.problem.with_budget(1 << 62)
    usage, joint = simulate(problem, schedule), joint_noise(here, schedule)
    kept = held_at_turn(problem, schedule) - (at_all - activations)
    return {
        "kind": kind, "activations": activations, "held": kept, "ratio": activations / max(1, kept),
        "overhead": usage.cost_ns / problem.program_cost_ns() - 1, "noise": usage.noise_ppb / 1e9,
        "measured": joint.noise, "bias": joint.bias, "peak": usage.peak_bytes,
    }  # fmt: skip


def sums(here: Ground) -> list[dict[str, Any]]:
    """Encode all that a plan may have encoded, and return the sum of the predictions over what is measured of all."""
    from graphplan.noise import REFUSED_PPB

    noise = here.prepared.noise
    assert noise is not None
    rows = []
    for codec in SUMS:
        schedule, used = all_encoded(here, codec, {a for a in noise.rho if noise.ppb(a, codec) < REFUSED_PPB})
        rho = sum(noise.rho[a].get(codec, 0.0) for a in used)
        joint = joint_noise(here, schedule)
        rows.append({"codec": codec, "count": len(used), "sum": rho, "joint": joint.noise, "bias": joint.bias})
    return rows


def all_encoded(here: Ground, codec: str, allowed: Collection[str] | None = None) -> tuple[list[int], list[str]]:
    """Return the program with every (or every allowed) activation that `codec` offers encoded by it, and their names.

    An op that reads several runs from all of them.
    """
    prepared = here.prepared
    items, storages = prepared.instructions.items, here.captured.graph.storages
    offered = {e.id: storages[e.of].name for e in prepared.instructions.encoded if e.codec == codec}
    codes = {e: name for e, name in offered.items() if allowed is None or name in allowed}
    encodes = [i for i, item in enumerate(items) if item.kind == "encode" and codes.keys() & set(item.writes)]
    last = sorted(enumerate(items), key=lambda pair: len(codes.keys() & set(pair[1].reads)))
    known = {e.id for e in prepared.instructions.encoded} - codes.keys()  # others' codes are not made
    last = [(i, item) for i, item in last if known.isdisjoint(item.reads)]
    taken = {item.op: i for i, item in last if item.kind == "variant" and codes.keys() & set(item.reads)}
    read = {codes[s] for i in taken.values() for s in items[i].reads if s in codes}
    schedule = []
    for p in prepared.instructions.program:
        if items[p].kind == "turn":
            schedule.extend(e for e in encodes if any(codes.get(s) in read for s in items[e].writes))
        op = items[p].op
        schedule.append(p if op is None else taken.get(op, p))
    return schedule, sorted(read)


def measure_model(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return one model's rows."""
    here = ground(name, time_limit=args.time_limit)
    row: dict[str, Any] = {"name": name}
    found = predicted(here, args.time_limit)
    schedules = found.pop("schedules")
    row["predicted"] = found
    save_row(f"hybrid_{name}", row)
    if name in args.held:
        row["held"] = held(here, args.time_limit)
        save_row(f"hybrid_{name}", row)
    if name in args.sums:
        row["sums"] = sums(here)
        save_row(f"hybrid_{name}", row)
    if name in args.steps:
        row["steps"] = steps(here, schedules, args.pairs)
    return row


def tables(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return the Markdown of each table, by the name of its place on the page."""
    made = {"hybrid": _predicted_table(rows), "held": _held_table(rows), "noise sums": _sums_table(rows)}
    made["hybrid steps"] = _steps_table(rows)
    return made


def _predicted_table(rows: list[dict[str, Any]]) -> str:
    columns = ["model", "least: recompute only, MB", "compress only", "hybrid", *(f"at {b:.0%}" for b in BUDGETS)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in rows:
        p = r["predicted"]
        cells = [r["name"], *(f"{p['least'][k] / 1e6:.1f}" for k in ("recompute", "compress", "hybrid"))]
        at = {b["part"]: b for b in p["budgets"]}
        cells += [" / ".join(_overhead(at[b][k]) for k in KINDS) if b in at else "" for b in BUDGETS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _overhead(found: float | None) -> str:
    return "none" if found is None else f"{found:+.1%}"


def _held_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | plan | activations, MB | held, MB | ratio | overhead | noise predicted | measured | bias |"]
    lines.append("|" + "---|" * 9)
    for r in rows:
        for h in r.get("held", ()):
            cells = [r["name"], h["kind"], f"{h['activations'] / 1e6:.1f}", f"{h['held'] / 1e6:.1f}"]
            cells += [
                _times(h["ratio"]),
                f"{h['overhead']:+.1%}",
                f"{h['noise']:.3f}",
                f"{h['measured']:.3f}",
                f"{h['bias']:.0%}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 1000 else "all"


def _sums_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | code | activations | sum predicted | joint measured | ratio | bias |", "|" + "---|" * 7]
    for r in rows:
        for s in r.get("sums", ()):
            cells = [r["name"], s["codec"], str(s["count"]), f"{s['sum']:.2e}", f"{s['joint']:.2e}"]
            cells += [f"{s['sum'] / s['joint']:.2f}", f"{s['bias']:.0%}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _steps_table(rows: list[dict[str, Any]]) -> str:
    shown = [*KINDS, "hybrid over recompute", "hybrid over compress"]
    lines = ["| model | budget | " + " | ".join(shown) + " |", "|" + "---|" * (2 + len(shown))]
    for r in rows:
        for s in r.get("steps", ()):
            cells = [r["name"], f"{s['part']:.0%}"]
            cells += [_ratio(s, k) for k in shown]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(row: dict[str, Any], column: str) -> str:
    if column.split()[-1] in row.get("same", ()):
        return "the same plan"
    found = row.get(column)
    return "none" if found is None else f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="zoo models (default: all)")
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds a solve")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--held", nargs="*", default=["resnet50"])
    parser.add_argument("--sums", nargs="*", default=["resnet18", "gpt", "mobilenet_v2", "vit"])
    parser.add_argument("--steps", nargs="*", default=["resnet18", "resnet50", "gpt"])
    parser.add_argument("--write", type=Path, help="Markdown file whose tables are replaced")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        save_row(f"hybrid_{args.one}", measure_model(args.one, args))
        return
    from models_zoo import MODELS

    for name in args.names or MODELS:
        run_again("hybrid", "--one", name, *_options(args))
    rows = rows_of("hybrid_", MODELS)
    for place, text in tables(rows).items():
        print(text, end="\n\n")
        if args.write:
            write_between(args.write, place, text)


def _options(args: argparse.Namespace) -> list[str]:
    words = ["--time-limit", str(args.time_limit), "--pairs", str(args.pairs)]
    return [*words, "--held", *args.held, "--sums", *args.sums, "--steps", *args.steps]


if __name__ == "__main__":
    main()
