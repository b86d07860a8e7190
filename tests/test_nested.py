"""Searches among more choices: never worse than among fewer, whichever of them fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import solvers
from graphplan import nested
from graphplan.choices import candidates_of
from graphplan.lift import Prepared
from graphplan.lower import computing_once, without_codecs
from graphplan.optimize import Source, find_least, make_options
from solvers import Limits, Problem, Schedule, Solution, Status

PART = 0.3  # of the range of budgets


def ground() -> tuple[Prepared, Solution]:
    """Return a net with exact and lossy codes, at a budget where each kind of plan fits, and its least plan."""
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 1, 1))]
    model, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 24 * 24, 5)), torch.randn(8, 16, 24, 24)
    loss: dict[str, Any] = {"loss_fn": F.cross_entropy, "example_targets": torch.randint(5, (8,))}
    options = make_options("100%", "lossy", time_limit=4, **loss)
    (only,) = candidates_of(model, Source.of(model, (x,), {}, options), options)
    prepared = only.prepared
    least = find_least(prepared, options)
    low = least.single_peak_bytes
    assert low is not None
    budget = low + PART * (prepared.baseline_peak_bytes - low)
    return replace(prepared, problem=prepared.problem.with_budget(int(budget))), least


def cost(problem: Problem, schedule: Schedule | None) -> int:
    assert schedule is not None
    usage = solvers.simulate(problem, schedule)
    assert usage.peak_bytes <= problem.budget_bytes
    return usage.cost_ns


def parts(prepared: Prepared) -> dict[str, Problem]:
    problem = prepared.problem
    return {
        "no codecs": without_codecs(problem, prepared.instructions),
        "no rounding": replace(problem, noise_limit_ppb=0),
        "nothing twice": computing_once(problem),
        "everything": problem,
    }


@pytest.mark.parametrize("works", ["no codecs", "no rounding", "nothing twice", "everything"])
@pytest.mark.parametrize("below_single", [False, True])
def test_one_search_that_finds_something_is_enough(
    works: str, below_single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, least = ground()
    part, solve = parts(prepared)[works], solvers.solve

    def only(problem: Problem, solver: str, limits: Limits) -> Solution:
        if problem == part:
            return replace(solve(problem, solver, limits), status=Status.FEASIBLE)
        return Solution(Status.NOT_FOUND, None, 0, "any plan", "none")

    monkeypatch.setattr(nested.solvers, "solve", only)
    least = replace(least, single_peak_bytes=1 << 62 if below_single else 0)
    found = nested.solve(prepared, "auto", Limits(seconds=4), least)
    assert cost(prepared.problem, found.schedule) <= cost(part, solve(part, "auto", Limits(seconds=4)).schedule)
    assert found.status is Status.FEASIBLE


def test_later_searches_start_from_what_earlier_ones_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """But plans without codecs are searched as if there were none: no worse for those that are allowed."""
    (prepared, least), solve = ground(), solvers.solve
    names = {p: name for name, p in parts(prepared).items()}
    asked: list[tuple[str, int]] = []

    def unproven(problem: Problem, solver: str, limits: Limits) -> Solution:
        asked.append((names[problem], len(limits.known)))
        return replace(solve(problem, solver, limits), status=Status.FEASIBLE)

    monkeypatch.setattr(nested.solvers, "solve", unproven)
    nested.solve(prepared, "auto", Limits(seconds=2), least)
    assert [name for name, _ in asked] == [
        "nothing twice", "everything", "no codecs", "no rounding", "nothing twice", "everything"
    ]  # fmt: skip
    starts = dict(asked)
    assert starts["no codecs"] == starts["nothing twice"] == 0
    assert starts["everything"] >= 3


def test_what_is_proven_best_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (prepared, least), solve = ground(), solvers.solve
    asked: list[Problem] = []

    def counted(problem: Problem, solver: str, limits: Limits) -> Solution:
        asked.append(problem)
        return solve(problem, solver, limits)

    monkeypatch.setattr(nested.solvers, "solve", counted)
    found = nested.solve(prepared, "auto", Limits(seconds=20), least)
    assert found.status is Status.OPTIMAL
    assert asked[-1] == prepared.problem
    assert len(asked) == 2  # a pool's result and indices have codes: nothing recomputed comes first


def test_a_budget_below_all_that_was_found_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (prepared, least), solve = ground(), solvers.solve
    assert least.least_peak_bytes is not None
    prepared = replace(prepared, problem=prepared.problem.with_budget(least.least_peak_bytes - 1))
    asked: list[Problem] = []

    def counted(problem: Problem, solver: str, limits: Limits) -> Solution:
        asked.append(problem)
        return solve(problem, solver, limits)

    monkeypatch.setattr(nested.solvers, "solve", counted)
    assert nested.solve(prepared, "auto", Limits(seconds=2), least).schedule is None
    assert asked == [prepared.problem]


@pytest.mark.parametrize("works", ["no codecs", "no rounding", "everything"])
def test_one_family_that_finds_something_is_enough(works: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, _ = ground()
    part, solve = parts(prepared)[works], solvers.solve_family
    budgets = [prepared.problem.budget_bytes, prepared.baseline_peak_bytes]

    def only(problem: Problem, budgets: Any, limits: Limits) -> tuple[Solution, ...]:
        if problem == part:
            return solve(problem, budgets, limits)
        return tuple(Solution(Status.NOT_FOUND, None, 0, "any plan", "none") for _ in budgets)

    monkeypatch.setattr(nested.solvers, "solve_family", only)
    found = nested.solve_family(prepared, budgets, Limits(seconds=4))
    for budget, answer, own in zip(budgets, found, solve(part, budgets, Limits(seconds=4)), strict=True):
        at = prepared.problem.with_budget(budget)
        assert cost(at, answer.schedule) <= cost(part.with_budget(budget), own.schedule)
