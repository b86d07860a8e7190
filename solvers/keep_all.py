"""Keep everything: the program as it stands. Proves that it fits, or that it does not."""

from __future__ import annotations

from solvers.bounds import ANY_PLAN, cost_floor
from solvers.problem import Limits, Problem, Solution, Status
from solvers.simulate import simulate
from solvers.units import build_units


def solve_keep_all(problem: Problem, limits: Limits) -> Solution:
    """Return the program itself; optimal unless an alternative op is faster than its original."""
    usage = simulate(problem, problem.program)
    cost, floor = problem.program_cost_ns(), cost_floor(problem, build_units(problem))
    if usage.peak_bytes <= problem.budget_bytes:
        status = Status.OPTIMAL if cost <= floor else Status.FEASIBLE
        return Solution(status, problem.program, floor, ANY_PLAN, "keep_all", 0.0, usage.peak_bytes)
    return Solution(Status.INFEASIBLE, None, cost, "keep everything", "keep_all", 0.0, usage.peak_bytes)
