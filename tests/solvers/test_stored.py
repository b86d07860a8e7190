"""Every stored Problem again: the plan's cost is compared exactly with what it was, and no bound lies above it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from solvers import ANY_PLAN, Limits, Problem, Solution, Status, least_peak, simulate, solve

ROOT = Path(__file__).parents[2]
COSTS = ROOT / "tests" / "golden" / "stored_costs.json"
STORED = {p.stem: p for p in sorted((ROOT / "bench" / "problems").glob("*.json"))}
SMALL = [n for n in STORED if n.endswith("_small") and not n.startswith("lstm")]
FRACTIONS = (0.75, 0.5, 0.25)


def answers(name: str, seconds: float) -> list[tuple[Problem, Solution]]:
    """Auto's answers at three budgets between the least peak found and the program's."""
    problem = Problem.from_json(STORED[name].read_text())
    top, low = simulate(problem, problem.program).peak_bytes, least_peak(problem).least_peak_bytes
    assert low is not None
    budgets = [problem.with_budget(low + round(f * (top - low))) for f in FRACTIONS]
    return [(p, solve(p, "auto", Limits(seconds=seconds))) for p in budgets]


@pytest.mark.parametrize("name", SMALL)
def test_the_cost_of_a_small_step_is_what_it_was(name: str) -> None:
    found = []
    for problem, answer in answers(name, 60):
        assert answer.schedule is not None
        assert answer.status is Status.OPTIMAL or answer.bound_class == ANY_PLAN  # more recomputes are not proven best
        found.append(simulate(problem, answer.schedule).cost_ns)
    known = json.loads(COSTS.read_text()) if COSTS.exists() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        COSTS.write_text(json.dumps({**known, name: found}, indent=1, sort_keys=True) + "\n")
    else:
        assert found == known[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in STORED if n not in SMALL])
def test_a_real_step_has_a_plan_and_a_bound_below_it(name: str) -> None:
    for problem, answer in answers(name, 20):
        assert answer.schedule is not None
        usage = simulate(problem, answer.schedule)
        assert usage.peak_bytes <= problem.budget_bytes
        assert answer.lower_bound_ns <= usage.cost_ns
