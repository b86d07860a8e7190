"""Rounds of the exact solver: an integer program over the memory rows and cuts known so far, and what a round teaches.

CP-SAT solves it, integers all over; `learn` adds the positions at which its plan does not fit as rows, and what happens
between positions as cuts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from ortools.sat.python import cp_model

from solvers.cuts import explain
from solvers.epochs import Cut, EpochModel
from solvers.evaluate import Fates, keep_everything, peaks, profiles, to_schedule
from solvers.greedy import polish, repair
from solvers.problem import Limits
from solvers.relax import MARGIN, LinearProgram
from solvers.search import Search
from solvers.simulate import Usage
from solvers.units import Units

Pairs = tuple[tuple[int, int], ...]  # (unit, fate)

WIDE = 0.01  # a gap for which plans are looked for elsewhere than in rounds
NEW_ROWS = 3
FIRST_ROWS = 2  # peaks of each known plan
LOOSE = 1e-3  # relative gap of a round while its plans still break rows that it does not know


def start_rows(units: Units, *plans: Fates | None, spread: int = 0) -> set[int]:
    """Return the positions of the first memory rows: the turn, the peaks of known plans, `spread` evenly spaced.

    Few rows make a small model: measured, three of them and those that its plans break prove several times faster
    than a dozen more, most of which never bind.
    """
    problem = units.problem
    n, turn = len(problem.program), problem.turn
    rows = {turn, *(int(t) for t in np.linspace(turn + 1, n - 1, spread))} if turn + 1 < n else {turn}
    for fates in (keep_everything(units), *plans):
        if fates is not None:
            rows.update(peaks(profiles(units, fates[None, :]).bytes_at[:, 0], 6 if spread else FIRST_ROWS))
    return rows


def new_rows(level: np.ndarray[tuple[int], np.dtype[np.int64]], above: int, known: set[int]) -> list[int]:
    """Return the positions not yet known at which a profile is highest above a limit."""
    level = np.where(level > above, level, -1)
    level[sorted(known)] = -1
    return peaks(level, NEW_ROWS)


@dataclass(frozen=True, slots=True)
class Found:
    """What one round brought: fates (None: nothing), bound on the objective, other plans met."""

    fates: Fates | None
    bound: float
    infeasible: bool = False
    optimal: bool = False  # to within the round's gap
    objective: int = 0
    others: tuple[Fates, ...] = ()
    work: float = 0.0  # deterministic seconds spent


@dataclass(frozen=True, slots=True)
class Tangent:
    """What the dual of a linear program at one budget says of others: its optimum is convex in the budget."""

    budget_bytes: int
    bound_ns: float
    slope: float  # ns a byte more, at most 0
    below_bytes: float  # the budgets at which all of its cuts hold
    rows: frozenset[int] = frozenset()  # those that bind

    def at(self, budget_bytes: int) -> int:
        """Return a bound on the cost at a budget."""
        if budget_bytes >= self.below_bytes:
            return 0
        change = self.slope * (budget_bytes - self.budget_bytes)
        return math.ceil(self.bound_ns + change - MARGIN * abs(change))


@dataclass(slots=True)
class Rounds:
    """The rows and cuts known so far. `budget_bytes` None: the peak is minimised."""

    units: Units
    budget_bytes: int | None
    rows: set[int]
    cuts: list[Cut] = field(default_factory=list)
    gap: float = LOOSE
    linear: int = 2  # CP-SAT's linearization_level: 2 proves costs, 1 finds small peaks
    work: float | None = None  # CP-SAT's deterministic seconds a round; None: only the clock counts
    tangents: list[Tangent] = field(default_factory=list)  # of linear programs, at this budget and others
    built: tuple[frozenset[int], tuple[Cut, ...], EpochModel] | None = None  # the last model, of these rows and cuts

    @staticmethod
    def after(before: Rounds | None, units: Units, search: Search) -> Rounds:
        """Return the rounds to begin with: rows and cuts of another budget of the same problem are valid here."""
        rows = start_rows(units, search.fates) | (before.rows if before is not None else set())
        cuts, tangents = (list(before.cuts), before.tangents) if before is not None else ([], [])
        return Rounds(units, search.problem.budget_bytes, rows, cuts, tangents=tangents)

    def touch(self, program: LinearProgram, bound: float) -> None:
        """Remember what a linear program of these cuts, just solved, bounds at other budgets."""
        assert self.budget_bytes is not None
        below = min((r for _, r in self.cuts if r > self.budget_bytes), default=math.inf)
        rows = frozenset(program.binding)
        self.tangents.append(Tangent(self.budget_bytes, bound, min(0.0, program.slope), below, rows))

    def bound(self) -> int:
        """Return what the tangents known bound at this budget."""
        return max((t.at(self.budget_bytes) for t in self.tangents if self.budget_bytes is not None), default=0)

    def model(self) -> EpochModel:
        """Return the model that the known rows and cuts make, with nothing fixed; valid until the next round."""
        key = frozenset(self.rows), tuple(self.cuts)
        if self.built is not None and self.built[:2] == key:
            self.built[2].fix(())
            return self.built[2]
        turn = self.units.problem.turn
        after, upto = [t for t in self.rows if t > turn], [t for t in self.rows if t <= turn]
        model = EpochModel(self.units, after, upto, self.budget_bytes)
        for cut in self.cuts:
            model.add_cut(cut, self.budget_bytes)
        self.built = (*key, model)
        return model

    def solve(
        self, limits: Limits, seconds: float, hint: Fates | None, fixed: tuple[tuple[int, int], ...] = ()
    ) -> Found:
        """Solve the relaxation that the known rows and cuts make; with (unit, fate) pairs fixed, it proves nothing."""
        model = self.model()
        model.fix(fixed)
        if hint is not None:
            model.hint(hint)
        solver = cp_model.CpSolver()
        # One worker with every linear relaxation on: deterministic, and it proves in seconds what two default
        # workers (which leave the linear program out) did not in minutes.
        solver.parameters.num_workers = 1
        solver.parameters.linearization_level = self.linear
        solver.parameters.random_seed = limits.seed
        solver.parameters.relative_gap_limit = self.gap
        solver.parameters.max_time_in_seconds = min(1e6, max(0.05, seconds))
        if self.work is not None:
            solver.parameters.max_deterministic_time = self.work
        listener = _Listener(model, limits)
        status = solver.solve(model.model, listener)
        proof = not fixed
        if status == cp_model.INFEASIBLE:
            return Found(None, 0.0, infeasible=proof)
        bound = solver.best_objective_bound if proof else 0.0
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return Found(None, bound, work=_work(solver))
        optimal = proof and status == cp_model.OPTIMAL
        objective, plans = round(solver.objective_value), tuple(listener.plans)
        return Found(model.read(solver), bound, False, optimal, objective, plans, _work(solver))

    def learn(self, fates: Fates, usage: Usage, limit_bytes: int) -> None:
        """Add the rows at which the plan exceeds the limit, and a cut where rows do not suffice."""
        level = np.full(len(self.units.problem.program), -1, np.int64)
        last = -1
        schedule = to_schedule(self.units, fates)
        ops, program = self.units.problem.ops, self.units.problem.program
        inserted = True
        for step, o in enumerate(schedule):
            if last + 1 < len(program) and program[last + 1] in (o, ops[o].instead_of):
                last += 1
                inserted = inserted and step != usage.peak_step
                if usage.bytes_at[step] > limit_bytes and last not in self.rows:
                    level[last] = usage.bytes_at[step]
        new = peaks(level, NEW_ROWS)
        self.rows.update(new)
        if inserted or not new:
            self.cuts.append(explain(self.units, fates, usage, limit_bytes))


def _work(solver: cp_model.CpSolver) -> float:
    return float(solver.response_proto.deterministic_time)


class _Listener(cp_model.CpSolverSolutionCallback):
    """Collects the plans met on the way, and stops the search when the caller cancels."""

    def __init__(self, model: EpochModel, limits: Limits) -> None:
        super().__init__()
        self.model, self.limits = model, limits
        self.plans: list[Fates] = []

    def on_solution_callback(self) -> None:
        """CP-SAT found a better solution."""
        self.plans = [*self.plans[-7:], self.model.read(self)]
        if self.limits.cancelled is not None and self.limits.cancelled():
            self.stop_search()


def take(search: Search, rounds: Rounds, found: Found) -> bool:
    """Offer what a round found and learn where it does not fit; return whether it is optimal."""
    units, budget = rounds.units, search.problem.budget_bytes
    # Simulating costs as much as solving a small part: what costs more than the best plan is left out.
    for fates in found.others:
        if search.cost_ns is None or profiles(units, fates[None, :]).cost_ns[0] < search.cost_ns:
            search.offer(to_schedule(units, fates), fates)
    if found.fates is None:
        return False
    held = search.fates is not None and np.array_equal(found.fates, search.fates)
    usage = None if held else search.offer(to_schedule(units, found.fates), found.fates)
    search.report()
    if usage is not None and usage.peak_bytes > budget:
        rounds.learn(found.fates, usage, budget)
        mend(search, units, found.fates)
    elif found.optimal and rounds.gap <= search.limits.gap / 2:
        return True
    elif found.optimal:
        rounds.gap = search.limits.gap / 2
    return False


def mend(search: Search, units: Units, fates: Fates) -> bool:
    """Offer the nearest plan to `fates` that does fit; return whether it is the best so far."""
    mended, before = repair(search, units, fates), search.cost_ns
    if mended is not None:
        mended = polish(search, units, mended)
        search.offer(to_schedule(units, mended), mended)
    return search.cost_ns != before
