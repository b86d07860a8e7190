"""Render what the lanes measured into docs/bench.md and docs/plots/*.svg. `python -m bench.report`."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from typing import Any

from bench import frontier, ready, solver_report
from bench.executed import SWEPT
from bench.page import pyplot
from bench.processes import RESULTS, ROOT, rows_of
from models_zoo import MODELS

DOCS = ROOT / "docs"
WRONG = 100  # times what the last bit of the weights does to a gradient: then it is not rounding
EAGER = ("checkpoint", "ckptplan", "pytorch_budget")  # methods on the same kernels as ours
Row = dict[str, Any]


def read(name: str, *keys: str) -> list[Row]:
    """Return the rows of one lane, the last for each combination of `keys` that was run."""
    path = RESULTS / name
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found: dict[tuple[Any, ...], Row] = {}
    for r in rows:
        key = tuple(r[k] for k in keys)
        if key not in found or not str(r.get("failed", "")).startswith("not run"):
            found[key] = r
    return list(found.values())


def wrong(row: Row) -> bool:
    """Return whether a peer's gradients differ from plain PyTorch's by more than rounding."""
    return bool(row["error"] > WRONG * max(row["rounding"], 1e-7))


def executed(rows: list[Row]) -> str:
    """Return a table for each model."""
    parts = []
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = _sorted([r for r in rows if r["model"] == model and "same_as" not in r])
        plain, least = mine[0]["plain_peak"], mine[0]["minimum"]
        parts.append(
            f"### {model}: plain {_mb(plain)} MB, ours at least {_mb(least)} MB, rounding {mine[0]['rounding']:.0e}\n"
        )
        parts.append(
            "| method | peak, MB | step | ready, s | gradient error | ours: peak, MB | ours: step | ours / peer |"
        )
        parts.append("|---|---|---|---|---|---|---|---|")
        parts.extend(_line(r) for r in mine)
        parts.append("")
        parts.extend(_same(_sorted([r for r in rows if r["model"] == model and "same_as" in r])))
    return "\n".join(parts)


def _sorted(rows: list[Row]) -> list[Row]:
    """Return the rows method by method, budgets from the largest to the smallest."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    budget = [-float(r["setting"]) if r["method"] in SWEPT else 0.0 for r in rows]
    order = sorted(range(len(rows)), key=lambda i: (methods.index(rows[i]["method"]), budget[i], i))
    return [rows[i] for i in order]


def _same(rows: list[Row]) -> list[str]:
    """Return which settings made the program of another one."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for r in rows:
        groups[r["method"], r["same_as"]].append(r["setting"])
    said = [f"{method} {', '.join(s)}: peak of {first}" for (method, first), s in groups.items()]
    return [f"Not timed again: {'; '.join(said)}.\n"] if said else []


def _line(r: Row) -> str:
    name = f"{r['method']} {r['setting']}"
    if "failed" in r:
        return f"| {name} | {r['failed']} | | | | | | |"
    error = f"{r['error']:.1e}" + (" **wrong**" if wrong(r) else "")
    head = f"| {name} | {_mb(r['peak'])} | {_ratio(r['time'])} | {r['ready_s']:.1f} | {error} "
    if "ours_time" not in r:
        return head + f"| {r['ours_failed']} | | |"
    return head + f"| {_mb(r['ours_peak'])} | {_ratio(r['ours_time'])} | {_ratio(r['ours_over_peer'])} |"


def summary(rows: list[Row]) -> str:
    """Return who is faster at the peers' own peaks, and where we lose."""
    done = [r for r in rows if "ours_over_peer" in r]
    lines = [
        "| peer | points | ours faster or equal | geometric mean of ours / peer | wrong gradients | ours infeasible |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for method in dict.fromkeys(r["method"] for r in rows):
        here = [r for r in done if r["method"] == method]
        ratios = [r["ours_over_peer"][1] for r in here]
        bad = sum(wrong(r) for r in rows if r["method"] == method and "failed" not in r)
        out = sum("ours_failed" in r for r in rows if r["method"] == method)
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else float("nan")
        wins = sum(x <= 1 for x in ratios)
        lines.append(f"| {method} | {len(here)} | {wins} | {mean:.2f} | {bad} | {out} |")
    lost = [
        f"{r['model']} against {r['method']} {r['setting']}: {_ratio(r['ours_over_peer'])}"
        for r in done
        if r["ours_over_peer"][1] > 1
    ]
    lost += [
        f"{r['model']} against {r['method']} {r['setting']}: ours {r['ours_failed']}"
        for r in rows
        if "ours_failed" in r
    ]
    overheads = defaultdict(list)
    for r in done:
        if r["method"] in EAGER:
            overheads[r["method"]].append((r["ours_time"][1] - 1, r["time"][1] - 1))
    for method, pairs in overheads.items():
        ours, theirs = (sum(p[i] for p in pairs) / len(pairs) for i in (0, 1))
        lines.append(f"\nMean overhead at {method}'s own peaks: ours {ours:+.1%}, theirs {theirs:+.1%}.")
    lines.append("\nWhere we lose (median of ours / peer above 1, or our least peak above theirs):\n")
    lines += [f"* {text}" for text in lost] or ["* nowhere in these points"]
    return "\n".join(lines)


def prediction(rows: list[Row]) -> str:
    """Return predicted against measured, for every executed point of ours that was not read back from a page."""
    done = [r for r in rows if "predicted_peak" in r and "ours_time" in r]
    if not done:
        return "no points"
    peaks = [r["predicted_peak"] / r["ours_peak"] for r in done]
    times = sorted(r["predicted"] / r["ours_time"][1] for r in done)
    over = sum(r["ours_peak"] > r["peak"] for r in done)
    return (
        f"{len(done)} points: predicted / measured peak {min(peaks):.6f} to {max(peaks):.6f}; measured peaks over the "
        f"budget: {over}. Predicted / measured step (both over plain PyTorch's): median {times[len(times) // 2]:.2f}, "
        f"{times[0]:.2f} to {times[-1]:.2f}."
    )


def draw(rows: list[Row]) -> list[str]:
    """Draw time against peak for each model; return the file names."""
    plt = pyplot()
    folder = DOCS / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for model in dict.fromkeys(r["model"] for r in rows):
        done = [r for r in rows if r["model"] == model and "time" in r]
        if not done:
            continue
        figure, axes = plt.subplots(figsize=(8, 5))
        for method in dict.fromkeys(r["method"] for r in done):
            mine = [r for r in done if r["method"] == method]
            right = [r for r in mine if not wrong(r)]
            bad = [r for r in mine if wrong(r)]
            points = axes.scatter([r["peak"] / 1e6 for r in right], [r["time"][1] for r in right], label=method)
            if bad:
                colour = points.get_facecolor()[0] if right else None
                x, y = [r["peak"] / 1e6 for r in bad], [r["time"][1] for r in bad]
                axes.scatter(x, y, marker="x", color=colour, label=f"{method}, wrong gradients")
        ours = _by_peak([r for r in done if "ours_time" in r])
        axes.plot([p for p, _, _ in ours], [t for _, t, _ in ours], "k.-", linewidth=1, label="graphplan")
        axes.plot([p for p, _, _ in ours], [b for _, _, b in ours], "k:", linewidth=1, label="proven bound (predicted)")
        axes.axvline(done[0]["plain_peak"] / 1e6, color="grey", linewidth=0.8)
        axes.set(
            xlabel="measured peak, MB",
            ylabel="step / plain PyTorch's step",
            title=f"{model}: time against measured peak",
        )
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / f"{model}.svg", metadata={"Date": None})
        plt.close(figure)
        names.append(f"{model}.svg")
    return names


def _by_peak(rows: list[Row]) -> list[tuple[float, float, float]]:
    """Return (peak in MB, median step, bound) of ours, one for each peak."""
    found: dict[float, list[Row]] = defaultdict(list)
    for r in rows:
        found[r["ours_peak"] / 1e6].append(r)
    steps = {peak: statistics.median(r["ours_time"][1] for r in group) for peak, group in found.items()}
    return [(peak, steps[peak], max(r.get("bound", math.nan) for r in group)) for peak, group in sorted(found.items())]


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f}"


def _ratio(r: list[float]) -> str:
    return f"{r[1]:.2f} ({r[0]:.2f} to {r[2]:.2f})"


def main() -> None:
    rows = [r for r in read("executed.jsonl", "model", "method", "setting", "small") if not r["small"]]
    lanes = read("solvers.jsonl", "problem", "solver", "fraction")
    text = (ROOT / "bench" / "report.md").read_text()
    parts = {
        "executed": executed(rows),
        "summary": summary(rows),
        "prediction": prediction(rows),
        "ready": ready.table(rows_of("ready_", MODELS)),
        "solver_summary": solver_report.summary(lanes),
        "solver_compared": solver_report.compared(lanes),
        "frontiers": frontier.table(read("frontiers.jsonl", "problem")),
        "solvers": solver_report.every(lanes),
        "plots": "\n".join(f"![{n}](plots/{n})" for n in draw(rows)),
    }
    solver_report.draw(lanes, DOCS / "plots" / "solvers.svg")
    (DOCS / "bench.md").write_text(text.format(**parts))


if __name__ == "__main__":
    main()
