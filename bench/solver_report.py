"""The solver lane's part of the report: a line for each problem, every row, and solve time against size."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.page import pyplot

Row = dict[str, Any]


def summary(rows: list[Row]) -> str:
    """Return `auto`'s times for each problem: medians over the budgets, and the slowest budget in brackets."""
    least = ("least peak, MB", "of the program's, MB", "found in, s")
    columns = ("problem", "ops", *least, "plan within 1 %, s", "gap 0.1 %, s", "worst gap left")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, mine in _by_problem(rows):
        close, tight = (_median([r[k] for r in mine]) for k in ("close_s", "tight_s"))
        worst = max((r["gap"] for r in mine if r["gap"] is not None), default=float("nan"))
        first = mine[0]
        peaks = (f"{first[k] / 1e6:.1f}" if first.get(k) else "" for k in ("least_bytes", "top_bytes"))
        cells = [name, str(first["ops"]), *peaks, f"{first['least_s']:.1f}", close, tight, f"{worst:.3%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_problem(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    auto = [r for r in rows if r["solver"] == "auto"]
    names = sorted({(r["ops"], r["problem"]) for r in auto})
    return [(name, [r for r in auto if r["problem"] == name]) for _, name in names]


def _median(seconds: list[float | None]) -> str:
    """Return the median and the largest; a budget where it was not reached counts as the longest."""
    known = [float("inf") if s is None else s for s in seconds]
    middle, worst = ("not reached" if s == float("inf") else f"{s:.2f}" for s in (statistics.median(known), max(known)))
    return f"{middle} ({worst})"


def compared(rows: list[Row]) -> str:
    """Return, for each solver, how its plans compare with auto's where both have one."""
    best = {(r["problem"], r["fraction"]): r for r in rows if r["solver"] == "auto" and r["overhead"] is not None}
    lines = [
        "| solver | budgets | plans | median extra time over auto's plan | median seconds |",
        "|---|---|---|---|---|",
    ]
    for solver in sorted({r["solver"] for r in rows} - {"auto"}):
        mine = [r for r in rows if r["solver"] == solver and (r["problem"], r["fraction"]) in best]
        pairs = [(r, best[r["problem"], r["fraction"]]) for r in mine if r["overhead"] is not None]
        extra = [(1 + r["overhead"]) / (1 + b["overhead"]) - 1 for r, b in pairs]
        middle = f"{statistics.median(extra):+.2%}" if extra else ""
        seconds = statistics.median(r["seconds"] for r in mine)
        lines.append(f"| {solver} | {len(mine)} | {len(pairs)} | {middle} | {seconds:.1f} |")
    return "\n".join(lines)


def every(rows: list[Row]) -> str:
    """Return a line for each problem, solver and budget."""
    lines = [
        "| problem (ops) | f | solver | overhead | gap | within 1 %, s | gap 0.1 %, s | total, s | peak / budget |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        head = f"| {r['problem']} ({r['ops']}) | {r['fraction']:g} | {r['solver']} "
        if r["overhead"] is None:
            lines.append(head + f"| {r['status']} | | | | {r['seconds']:.1f} | |")
            continue
        close, tight = ("-" if r[k] is None else f"{r[k]:.2f}" for k in ("close_s", "tight_s"))
        figures = f"| {r['overhead']:+.2%} | {r['gap']:.3%} | {close} | {tight} | {r['seconds']:.1f} "
        lines.append(f"{head}{figures}| {r['peak_share']:.4f} |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Draw the seconds to a plan within 1 % and to a gap of 0.1 % against the ops of the problem."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5))
    for key, label in (("close_s", "plan within 1 % of the bound"), ("tight_s", "gap of 0.1 %")):
        points = [(r["ops"], r[key]) for r in rows if r["solver"] == "auto" and r[key] is not None]
        axes.scatter([ops for ops, _ in points], [max(s, 0.01) for _, s in points], s=14, label=label)
    axes.set(xscale="log", yscale="log", xlabel="ops of the problem", ylabel="seconds", title="auto: time to answer")
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
