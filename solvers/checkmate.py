"""Checkmate: the R/S/FREE/U mixed-integer program with frontier-advancing stages.

Jain et al. 2020 (Checkmate: Breaking the Memory Wall with Optimal Tensor Rematerialization, MLSys). In stage t op t
of the program runs for the first time; `run[t][i]` computes op i < t again before it, `saved[t][v]` carries value v
into stage t, `freed[t][k][v]` gives v back after op k of the stage, and the memory during each op is the running sum of
what came and went (the paper's U). Any number of recomputes, in the forward too; the program's order within a
stage. First the linear relaxation is rounded as in the paper (`saved` by a threshold, `run` follows from it; at 0.9 of
the budget, too), then CP-SAT has the time that is left. What only the program writes and reads has no choice:
constants. Cannot model: codecs, take-overs, and it has O(n^2) binaries, so beyond `LARGEST` ops it does not try.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from ortools.linear_solver import pywraplp
from ortools.sat.python import cp_model

from solvers.bounds import cost_floor
from solvers.epochs import EpochModel
from solvers.problem import Limits, OpId, Problem, Schedule, Solution, Status, ValueId
from solvers.relax import LinearProgram
from solvers.restorers import restorers
from solvers.search import Search
from solvers.units import build_units

LARGEST = 160  # ops; the model has about n^2 / 2 stage variables and n^3 / 8 memory terms
PARTS = (1.0, 0.9)  # of the budget, for the linear program: rounding needs room
THRESHOLDS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)  # a value is saved from this part on
POLL_S = 0.2  # between two looks at `limits.cancelled`
STAGED = "any plan of stages in the program's order, without codecs and take-overs"

Literal = cp_model.IntVar


def solve_checkmate(problem: Problem, limits: Limits) -> Solution:
    """Return the optimum of the staged model where CP-SAT finds it in time; `simulate` gives cost and peak."""
    search = Search(problem, limits, "checkmate")
    floor = cost_floor(problem, build_units(problem))
    search.offer(problem.program)
    if search.schedule is not None or len(problem.program) > LARGEST:
        return search.answer(floor, STAGED)
    for part in PARTS:
        if search.schedule is None and search.left() > 0:
            _round(problem, search, part)
    model = _Stages(problem)
    if not model.build(search):
        return search.answer(floor, STAGED)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = max(0.05, search.left())
    solver.parameters.num_workers = limits.threads
    solver.parameters.random_seed = limits.seed
    with watched(limits, solver.stop_search):
        status = solver.solve(model.model)
    if status == cp_model.INFEASIBLE and search.schedule is None:
        return Solution(Status.INFEASIBLE, None, floor, STAGED, "checkmate", search.seconds())
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        search.offer(model.schedule(solver))
    return search.answer(floor, STAGED)


@contextmanager
def watched(limits: Limits, stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop` within `POLL_S` of the caller cancelling: OR-Tools calls back only when it finds something."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(POLL_S):
            if limits.cancelled is not None and limits.cancelled():
                stop()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _round(problem: Problem, search: Search, part: float) -> None:
    """Offer what the thresholds make of the linear relaxation at a part of the budget."""
    room = problem.budget_bytes - problem.fixed_bytes
    model = _Stages(problem.with_budget(problem.fixed_bytes + int(part * room)))
    values = _relaxed(model, search) if model.build(search) else None
    if values is None:
        return
    for threshold in THRESHOLDS:
        saved = [{v for v, x in row.items() if values[x.index] >= threshold} for row in model.saved]
        search.offer(model.completed(saved))


def _relaxed(model: _Stages, search: Search) -> list[float] | None:
    """Return the value of every variable at an optimum of the linear relaxation; None if there is none in time."""
    # It reads nothing but `.model`, a CP-SAT model, and `.within`, which both classes have.
    program = LinearProgram(cast(EpochModel, model))
    solver = pywraplp.Solver.CreateSolver("GLOP")
    # Dual simplex without presolve: see `LinearProgram.solve`.
    solver.SetSolverSpecificParametersAsString("use_dual_simplex: true use_preprocessing: false")
    columns = [solver.NumVar(d[0], d[-1], "") for d in program.domains]
    rows = [solver.Constraint(low, high) for low, high in zip(program.low, program.high, strict=True)]
    for row, column, value in zip(program.rows, program.columns, program.values, strict=True):
        rows[row].SetCoefficient(columns[column], value)
    for column, cost in program.cost.items():
        solver.Objective().SetCoefficient(columns[column], cost)
    solver.SetTimeLimit(max(1, int(1000 * search.left())))
    with watched(search.limits, solver.InterruptSolve):
        status = solver.Solve()
    return [x.solution_value() for x in columns] if status == pywraplp.Solver.OPTIMAL else None


@dataclass(slots=True)
class _Stages:
    """Stage t runs ops 0..t of the program, those before t only where `run[t][i]` holds."""

    problem: Problem
    model: cp_model.CpModel = field(default_factory=cp_model.CpModel)
    within: dict[int, int] = field(default_factory=dict)
    run: list[list[Literal]] = field(default_factory=list)
    saved: list[dict[ValueId, Literal]] = field(default_factory=list)
    freed: list[list[dict[ValueId, Literal]]] = field(default_factory=list)
    op: dict[int, OpId] = field(default_factory=dict)  # position -> what runs when it is computed again
    writer: dict[ValueId, int] = field(default_factory=dict)
    settled: dict[ValueId, int] = field(default_factory=dict)  # values without a choice: the last position that reads

    def build(self, search: Search) -> bool:
        """Declare every variable, then the constraints in the order of the docstring; False: time is up."""
        self._again()
        self._variables()
        for t in range(len(self.problem.program)):
            if search.left() <= 0:
                return False
            self._stage(t)
        end = len(self.problem.program)
        for v in self.problem.keep:
            self.model.add_bool_or([self.saved[end][v]])
        cost = [
            (x, self.problem.ops[self.op[i]].cost_ns) for row in self.run for i, x in enumerate(row) if i in self.op
        ]
        self.model.minimize(cp_model.LinearExpr.weighted_sum([x for x, _ in cost], [c for _, c in cost]))
        return True

    def _again(self) -> None:
        for t, o in enumerate(self.problem.program):
            self.writer.update(dict.fromkeys(self.problem.ops[o].writes, t))
        for v, o in restorers(self.problem).items():
            self.op[self.writer[v]] = o
        free = {v for o in self.op.values() for v in (*self.problem.ops[o].reads, *self.problem.ops[o].writes)}
        for t, o in enumerate(self.problem.program):
            op = self.problem.ops[o]
            self.settled.update({v: t for v in (*op.reads, *op.writes) if v not in free})
        self.settled.update({v: len(self.problem.program) for v in self.problem.keep - free})

    def _variables(self) -> None:
        n, new = len(self.problem.program), self.model.new_bool_var
        zero, one = self.model.new_constant(0), self.model.new_constant(1)
        self.run = [[new("") if i in self.op else zero for i in range(t)] for t in range(n)]
        self.saved = [
            {
                v: one if v in self.settled else new("")
                for v, w in self.writer.items()
                if w < t <= self.settled.get(v, n)
            }
            for t in range(n + 1)
        ]
        self.freed = [[{v: new("") for v in self._touched(t, k)} for k in range(t + 1)] for t in range(n)]

    def _runs(self, t: int, k: int) -> Literal:
        return self.run[t][k] if k < t else self.model.new_constant(1)

    def _op(self, t: int, k: int) -> OpId:
        return self.op.get(k, self.problem.program[k]) if k < t else self.problem.program[t]

    def _touched(self, t: int, k: int) -> set[ValueId]:
        op = self.problem.ops[self._op(t, k)]
        return {*op.reads, *op.writes}

    def _stage(self, t: int) -> None:
        """Saved values were there before; reads are present; memory stays within the budget; what is freed is gone."""
        problem, model = self.problem, self.model
        made: dict[ValueId, list[Literal]] = {}
        size = problem.value_bytes
        level: list[tuple[Literal, int]] = [(x, size[v]) for v, x in self.saved[t].items()]
        for k in range(t + 1):
            runs, op = self._runs(t, k), problem.ops[self._op(t, k)]
            if k < t and k not in self.op:
                continue
            for v in op.reads:
                present = [*([self.saved[t][v]] if v in self.saved[t] else []), *made.get(v, ())]
                model.add_bool_or([runs.Not(), *present])
            level.extend((runs, size[v]) for v in op.writes)
            limit = problem.budget_bytes - problem.fixed_bytes
            terms = [*level, (runs, op.workspace_bytes)]
            model.add(cp_model.LinearExpr.weighted_sum([x for x, _ in terms], [b for _, b in terms]) <= limit)
            for v in op.writes:
                made.setdefault(v, []).append(runs)
            self._free(t, k, runs)
            level.extend((x, -size[v]) for v, x in self.freed[t][k].items())
        for v, x in self.saved[t + 1].items():
            before = [*([self.saved[t][v]] if v in self.saved[t] else []), *made.get(v, ())]
            model.add_bool_or([x.Not(), *before])
            # No copy is given back twice; what is neither freed nor saved stays to the end of the stage.
            gone = [row[v] for row in self.freed[t] if v in row]
            model.add(sum(gone) + x <= sum(before))

    def _free(self, t: int, k: int, runs: Literal) -> None:
        """After op k of stage t a value may go that neither a later op of the stage nor a later stage reads."""
        for v, x in self.freed[t][k].items():
            self.model.add_implication(x, runs)
            for j in range(k + 1, t + 1):
                if v in self.problem.ops[self._op(t, j)].reads and (j == t or j in self.op):
                    self.model.add_bool_or([x.Not(), self._runs(t, j).Not()])

    def schedule(self, solver: cp_model.CpSolver) -> Schedule:
        """Return the ops that run, stage by stage."""
        steps: list[OpId] = []
        for t, row in enumerate(self.run):
            steps.extend(self.op[i] for i, x in enumerate(row) if i in self.op and solver.value(x))
            steps.append(self.problem.program[t])
        return tuple(steps)

    def completed(self, saved: list[set[ValueId]]) -> Schedule:
        """Return the schedule that saves what `saved[t]` says into stage t, and runs again what that asks for."""
        steps: list[OpId] = []
        pinned = {v for v, w in self.writer.items() if w not in self.op}
        for t, o in enumerate(self.problem.program):
            op, have = self.problem.ops[o], saved[t] | pinned
            needed = (set(op.reads) | (saved[t + 1] - set(op.writes))) - have
            again: list[OpId] = []
            for k in reversed(range(t)):
                if k in self.op and needed & set(self.problem.ops[self.op[k]].writes):
                    again.append(self.op[k])
                    needed -= set(self.problem.ops[self.op[k]].writes)
                    needed |= set(self.problem.ops[self.op[k]].reads) - have
            steps += [*reversed(again), o]
        return tuple(steps)
