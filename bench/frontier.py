"""Frontiers: twenty budgets of one problem as a family, no torch. `python -m bench.frontier [NAMES]`.

The budgets are evenly spaced from the least peak of plans with one recompute a value, where the bounds are of the class
that is proven, to the program's peak. One JSON line each is added to bench/results/frontiers.jsonl: the seconds that
all of them took, and the gaps left. The least peak, searched before, is not in the seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from bench.processes import RESULTS
from solvers import Limits, Problem, simulate, solve_family
from solvers.least import find_least

HERE = Path(__file__).parent
OUT = RESULTS / "frontiers.jsonl"
POINTS = 20
NAMES = ("gpt12", "resnet50", "mobilenet_v2", "unet", "bert", "vit", "densenet121", "gpt24", "gpt24_explicit", "gpt48")


def walk(problem: Problem, seconds: float) -> dict[str, Any]:
    """Solve the family and measure."""
    least, top = find_least(problem, Limits(seconds=seconds)), simulate(problem, problem.program).peak_bytes
    low = least.single.peak_bytes
    budgets = [low + round(i / (POINTS - 1) * (top - low)) for i in range(POINTS)]
    start = time.perf_counter()
    answers = solve_family(problem, budgets, Limits(seconds=seconds, known=(least.schedule,)))
    spent, gaps = time.perf_counter() - start, []
    for answer in answers:
        assert answer.schedule is not None
        cost = simulate(problem, answer.schedule).cost_ns
        gaps.append((cost - answer.lower_bound_ns) / cost)
    figures = {"median_gap": statistics.median(gaps), "least_gap": gaps[0], "worst_gap": max(gaps[1:])}
    return {"ops": len(problem.program), "points": len(gaps), "limit_s": seconds, "seconds": spent, **figures}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a line for each problem."""
    lines = [
        "| problem | ops | budgets | limit, s | seconds | median gap | at the least budget | worst of the others |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: r["ops"]):
        head = f"| {r['problem']} | {r['ops']} | {r['points']} | {r['limit_s']:g} | {r['seconds']:.1f} "
        lines.append(f"{head}| {r['median_gap']:.3%} | {r['least_gap']:.3%} | {r['worst_gap']:.3%} |")
    return "\n".join(lines)


def main() -> None:
    """Walk each frontier and add its row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", default=NAMES)
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    for name in args.names:
        problem = Problem.from_json((HERE / "problems" / f"{name}.json").read_text())
        row = {"problem": name, **walk(problem, args.seconds)}
        print(table([row]).splitlines()[-1], flush=True)
        with OUT.open("a") as out:
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
