"""The parts of a solve, timed alone on a stored Problem. `pytest bench/test_speed.py --benchmark-autosave`.

Not part of `make test`: it asserts nothing about time. Use it before and after a change to the solvers, with
`--benchmark-compare`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solvers import Limits, Problem, simulate, solve
from solvers.epochs import EpochModel
from solvers.evaluate import keep_everything, profiles
from solvers.least import _known, find_least
from solvers.units import build_units

PROBLEMS = Path(__file__).parent / "problems"


@pytest.fixture(scope="module", params=["resnet50", "gpt12"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem.from_json((PROBLEMS / f"{request.param}.json").read_text())


def test_simulate(benchmark: Any, problem: Problem) -> None:
    usage = benchmark(simulate, problem, problem.program)
    assert usage.cost_ns == problem.program_cost_ns()


def test_shrink_to_units(benchmark: Any, problem: Problem) -> None:
    assert benchmark(build_units, problem).units


def test_evaluate_100_plans(benchmark: Any, problem: Problem) -> None:
    units = build_units(problem)
    plans = np.repeat(keep_everything(units)[None, :], 100, axis=0)
    assert len(benchmark(profiles, units, plans).peak_bytes()) == 100


def test_build_an_epoch_model(benchmark: Any, problem: Problem) -> None:
    units = build_units(problem)
    rows = range(problem.turn + 1, len(problem.program), 20)
    assert benchmark(EpochModel, units, list(rows), [], 1 << 40)


def test_least_peak(benchmark: Any, problem: Problem) -> None:
    def run() -> int:
        _known.clear()
        return find_least(problem, Limits()).peak_bytes

    assert benchmark.pedantic(run, rounds=2) > 0


@pytest.mark.parametrize("fraction", [0.75, 0.25])
def test_auto(benchmark: Any, problem: Problem, fraction: float) -> None:
    top, low = simulate(problem, problem.program).peak_bytes, find_least(problem, Limits()).peak_bytes
    small = problem.with_budget(low + round(fraction * (top - low)))
    answer = benchmark.pedantic(solve, args=(small, "auto", Limits(seconds=30, gap=1e-3)), rounds=3)
    assert answer.schedule is not None
