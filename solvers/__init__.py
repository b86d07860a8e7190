"""Solvers for `Problem`: every answer is a schedule that `simulate` has checked. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from solvers.auto import solve_auto
from solvers.bounds import ANY_PLAN, ONE_RECOMPUTE, WorkingSet, working_set
from solvers.checkmate import solve_checkmate
from solvers.chen import solve_chen
from solvers.dtr import solve_dtr
from solvers.family import solve_family
from solvers.greedy import solve_greedy
from solvers.ilp import solve_ilp
from solvers.keep_all import solve_keep_all
from solvers.least import least_peak
from solvers.melon import solve_melon
from solvers.moccasin import solve_moccasin
from solvers.oracle import solve_oracle
from solvers.problem import (
    Kind,
    Limits,
    MalformedProblem,
    Op,
    OpId,
    Problem,
    Progress,
    Schedule,
    Solution,
    Status,
    ValueId,
)
from solvers.pytorch_knapsack import solve_pytorch_knapsack
from solvers.rotor import solve_rotor
from solvers.simulate import InvalidSchedule, Usage, fits, live_at, simulate, take_overs

SOLVERS: dict[str, Callable[[Problem, Limits], Solution]] = {
    "auto": solve_auto,
    "keep_all": solve_keep_all,
    "chen": solve_chen,
    "greedy": solve_greedy,
    "ilp": solve_ilp,
    "melon": solve_melon,
    "dtr": solve_dtr,
    "checkmate": solve_checkmate,
    "moccasin": solve_moccasin,
    "rotor": solve_rotor,
    "pytorch_knapsack": solve_pytorch_knapsack,
    "oracle": solve_oracle,
}

DESCRIPTIONS: dict[str, str] = {
    "auto": "keep_all if it fits, else greedy, then ilp for the time left; proves what ilp proves",
    "keep_all": "every op once; proves that the program fits or does not, nothing about other plans",
    "chen": "sqrt(n) segments of equal bytes (Chen et al. 2016), best count; proves nothing, no codecs",
    "greedy": "most memory for the time, then polish; seconds at any size, proves nothing",
    "ilp": "proves optimal or infeasible among plans with one recompute a value; cannot see two recomputes",
    "melon": "size * lifetime / cost (Wang et al. 2022); proves nothing, no codecs",
    "dtr": "online eviction (Kirisame et al. 2021), recomputes any number of times; proves nothing, no codecs",
    "checkmate": "the staged MILP (Jain et al. 2020): any recomputes, no codecs; small problems only",
    "moccasin": "retention intervals on CP-SAT (Bartan et al. 2023); proves nothing here, no codecs",
    "rotor": "optimal for chains (Beaumont et al. 2019); skips and workspace escape it, no codecs",
    "pytorch_knapsack": "PyTorch's budget on our costs, its best ratio; cannot price chains or transients, no codecs",
    "oracle": "proves optimal or infeasible among all schedules; only for problems of about 14 values",
}


class SolverBroken(RuntimeError):
    """A solver answered with a schedule that `simulate` refuses or that does not fit: a bug in the solver."""


def solve(problem: Problem, solver: str = "auto", limits: Limits | None = None) -> Solution:
    """Return the answer of the named solver, its schedule checked again with `simulate`.

    Raises:
        MalformedProblem: the problem breaks an invariant.
        KeyError: no solver has this name; `SOLVERS` lists them.
        SolverBroken: the answer does not hold what it says.
    """
    if solver not in SOLVERS:
        raise KeyError(f"no solver {solver!r}; there are {', '.join(SOLVERS)}")
    problem.verify()
    solution = SOLVERS[solver](problem, limits or Limits())
    if solution.bound_class != ONE_RECOMPUTE and solution.schedule is not None:
        # Bounds on classes that hold every plan in this order, or more.
        solution = replace(solution, any_bound_ns=max(solution.any_bound_ns, solution.lower_bound_ns))
    _check(problem, solution)
    return solution


def _check(problem: Problem, solution: Solution) -> None:
    found = solution.status in (Status.OPTIMAL, Status.FEASIBLE)
    if found != (solution.schedule is not None):
        raise SolverBroken(f"{solution.solver} says {solution.status.name} but its schedule says otherwise")
    if solution.schedule is None:
        return
    try:
        usage = simulate(problem, solution.schedule)
    except InvalidSchedule as e:
        raise SolverBroken(f"{solution.solver} answered with an invalid schedule: {e}") from e
    if usage.peak_bytes > problem.budget_bytes:
        raise SolverBroken(
            f"{solution.solver} answered with {usage.peak_bytes} bytes for a budget of {problem.budget_bytes}"
        )
    if max(solution.lower_bound_ns, solution.any_bound_ns) > usage.cost_ns:
        raise SolverBroken(f"{solution.solver} bounds its own plan of {usage.cost_ns} ns by {solution.lower_bound_ns}")


__all__ = [
    "ANY_PLAN",
    "DESCRIPTIONS",
    "SOLVERS",
    "InvalidSchedule",
    "Kind",
    "Limits",
    "MalformedProblem",
    "Op",
    "OpId",
    "Problem",
    "Progress",
    "Schedule",
    "Solution",
    "SolverBroken",
    "Status",
    "Usage",
    "ValueId",
    "WorkingSet",
    "fits",
    "least_peak",
    "live_at",
    "simulate",
    "solve",
    "solve_family",
    "take_overs",
    "working_set",
]
