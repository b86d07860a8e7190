"""Checkmate: the R/S/FREE/U mixed-integer program with frontier-advancing stages.

Jain et al. 2020 (Checkmate: Breaking the Memory Wall with Optimal Tensor Rematerialization, MLSys). In stage t op t
of the program runs for the first time; `run[t][i]` computes op i < t again before it, `saved[t][v]` carries value v
into stage t, `freed[t][k][v]` gives v back after op k of the stage, and the memory during each op is the running sum of
what came and went (the paper's U). Any number of recomputes, in the forward too; the program's order within a
stage. Cannot model: codecs, take-overs, and it has O(n^2) binaries, so beyond `LARGEST` ops it does not try.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ortools.sat.python import cp_model

from solvers.bounds import cost_floor
from solvers.problem import Limits, OpId, Problem, Schedule, Solution, Status, ValueId
from solvers.restorers import restorers
from solvers.search import Search
from solvers.units import build_units

LARGEST = 120  # ops; the model has about n^2 / 2 stage variables and n^3 / 8 memory terms
STAGED = "any plan of stages in the program's order, without codecs and take-overs"

Literal = cp_model.IntVar


def solve_checkmate(problem: Problem, limits: Limits) -> Solution:
    """Return the optimum of the staged model where CP-SAT finds it in time; `simulate` gives cost and peak."""
    search = Search(problem, limits, "checkmate")
    floor = cost_floor(problem, build_units(problem))
    search.offer(problem.program)
    if search.schedule is not None or len(problem.program) > LARGEST:
        return search.answer(floor, STAGED)
    model = _Stages(problem)
    model.build()
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = max(0.05, search.left())
    solver.parameters.num_workers = limits.threads
    solver.parameters.random_seed = limits.seed
    status = solver.solve(model.model)
    if status == cp_model.INFEASIBLE:
        return Solution(Status.INFEASIBLE, None, floor, STAGED, "checkmate", search.seconds())
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        search.offer(model.schedule(solver))
    return search.answer(floor, STAGED)


@dataclass(slots=True)
class _Stages:
    """Stage t runs ops 0..t of the program, those before t only where `run[t][i]` holds."""

    problem: Problem
    model: cp_model.CpModel = field(default_factory=cp_model.CpModel)
    run: list[list[Literal]] = field(default_factory=list)
    saved: list[dict[ValueId, Literal]] = field(default_factory=list)
    freed: list[list[dict[ValueId, Literal]]] = field(default_factory=list)
    op: dict[int, OpId] = field(default_factory=dict)  # position -> what runs when it is computed again
    writer: dict[ValueId, int] = field(default_factory=dict)

    def build(self) -> None:
        """Declare every variable, then the constraints in the order of the docstring."""
        self._again()
        self._variables()
        for t in range(len(self.problem.program)):
            self._stage(t)
        end = len(self.problem.program)
        for v in self.problem.keep:
            self.model.add_bool_or([self.saved[end][v]])
        cost = [
            (x, self.problem.ops[self.op[i]].cost_ns) for row in self.run for i, x in enumerate(row) if i in self.op
        ]
        self.model.minimize(cp_model.LinearExpr.weighted_sum([x for x, _ in cost], [c for _, c in cost]))

    def _again(self) -> None:
        for t, o in enumerate(self.problem.program):
            self.writer.update(dict.fromkeys(self.problem.ops[o].writes, t))
        for v, o in restorers(self.problem).items():
            self.op[self.writer[v]] = o

    def _variables(self) -> None:
        n, new = len(self.problem.program), self.model.new_bool_var
        zero = self.model.new_constant(0)
        self.run = [[new("") if i in self.op else zero for i in range(t)] for t in range(n)]
        self.saved = [{v: new("") for v, w in self.writer.items() if w < t} for t in range(n + 1)]
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
