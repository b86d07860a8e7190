"""The solver lane: solvers on stored Problems, no torch. `python -m bench.solver_lane [NAMES] --solvers auto`.

For each problem and budget B_min + f (B_base - B_min), where B_min is the least peak found and B_base that of the
program: overhead over running every op once, gap to the proven bound in percent of the plan's time, seconds to
a plan within 1 % of the final bound, to a gap of 0.1 %, and in all; peak over budget. One JSON line each is added to
bench/results/solvers.jsonl. With `--single`, B_min is the least peak of plans with one recompute a value, so that every
budget has a plan of the class that is proven, and the problem is called "NAME, one recompute".
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.processes import RESULTS
from solvers import SOLVERS, Limits, Problem, Progress, simulate, solve
from solvers.least import find_least

HERE = Path(__file__).parent
OUT = RESULTS / "solvers.jsonl"
FRACTIONS = (0.9, 0.75, 0.5, 0.25, 0.1)
CLOSE = 0.01  # of the bound
TIGHT = 0.001  # of the plan's time


@dataclass(frozen=True, slots=True)
class Row:
    """One solver's answer at one budget; None where it has none."""

    problem: str
    ops: int
    solver: str
    fraction: float
    budget_bytes: int
    status: str
    seconds: float
    overhead: float | None = None
    gap: float | None = None
    bound_class: str = ""
    close_s: float | None = None
    tight_s: float | None = None
    peak_share: float | None = None

    def __str__(self) -> str:
        head = f"{self.problem:16} {self.fraction:4.2f} {self.solver:10}"
        if self.overhead is None or self.gap is None:
            return f"{head} {self.status:10} {self.seconds:6.1f} s"
        times = " ".join("   -  " if s is None else f"{s:6.2f}" for s in (self.close_s, self.tight_s, self.seconds))
        figures = f"+{self.overhead:8.3%} gap {self.gap:7.3%} {times} peak/budget {self.peak_share:.4f}"
        return f"{head} {self.status:10} {figures}"


class Watch:
    """Notes when the incumbent and the bound moved."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.seen: list[Progress] = []

    def __call__(self, progress: Progress) -> None:
        """Remember one report."""
        self.seen.append(progress)

    def within(self, bound_ns: int, share: float) -> float | None:
        """Return when a plan within `share` of a bound was first held."""
        return next((p.seconds for p in self.seen if p.cost_ns and p.cost_ns <= bound_ns * (1 + share)), None)

    def closed(self, share: float) -> float | None:
        """Return when plan and bound known at that time were first this close."""
        known = (p for p in self.seen if p.cost_ns and p.lower_bound_ns)
        return next((p.seconds for p in known if p.cost_ns - p.lower_bound_ns <= share * p.cost_ns), None)  # type: ignore[operator]


def run(problem: Problem, solver: str, fraction: float, budget: int, seconds: float) -> Row:
    """Solve once and measure."""
    watch, small = Watch(), problem.with_budget(budget)
    answer = solve(small, solver, Limits(seconds=seconds, progress=watch))
    row = Row(problem.name, len(problem.program), solver, fraction, budget, answer.status.name.lower(), answer.seconds)
    if answer.schedule is None:
        return row
    usage = simulate(small, answer.schedule)
    gap = (usage.cost_ns - answer.lower_bound_ns) / usage.cost_ns
    watch(Progress(solver, answer.seconds, usage.cost_ns, answer.lower_bound_ns))
    return replace(
        row,
        overhead=usage.cost_ns / problem.program_cost_ns() - 1,
        gap=gap,
        bound_class=answer.bound_class,
        close_s=watch.within(answer.lower_bound_ns, CLOSE),
        tight_s=watch.closed(TIGHT),
        peak_share=usage.peak_bytes / budget,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: every stored problem that is not small")
    parser.add_argument("--solvers", nargs="+", default=["auto"], choices=[*SOLVERS, "all"])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--single", action="store_true", help="budgets of plans with one recompute a value")
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    args = parser.parse_args()
    OUT.parent.mkdir(exist_ok=True)
    stored = sorted(p.stem for p in (HERE / "problems").glob("*.json") if not p.stem.endswith("_small"))
    names = [n for n in SOLVERS if n != "oracle"] if "all" in args.solvers else args.solvers
    for name in args.names or stored:
        problem = replace(Problem.from_json((HERE / "problems" / f"{name}.json").read_text()), name=name)
        top = simulate(problem, problem.program).peak_bytes
        start = time.perf_counter()
        least = find_least(problem, Limits(seconds=args.seconds))
        low, spent = least.single.peak_bytes if args.single else least.peak_bytes, time.perf_counter() - start
        if args.single:
            problem = replace(problem, name=f"{name}, one recompute")
        print(f"{problem.name}: least {low / 1e6:.1f} of {top / 1e6:.1f} MB, {spent:.1f} s")
        for fraction in args.fractions:
            for solver in names:
                row = run(problem, solver, fraction, low + round(fraction * (top - low)), args.seconds)
                print(row, flush=True)
                with OUT.open("a") as out:
                    out.write(
                        json.dumps({**asdict(row), "least_s": spent, "least_bytes": low, "top_bytes": top}) + "\n"
                    )


if __name__ == "__main__":
    main()
