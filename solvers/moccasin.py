"""Moccasin: retention intervals and a cumulative constraint on CP-SAT.

Bartan et al. 2023 (Moccasin: Efficient Tensor Rematerialization for Neural Networks, ICML), with C = 2: each value
has one retention interval from its write, and an optional second one from its recompute; memory is a cumulative
constraint over all of them. Phase 1 minimises the capacity for a start, phase 2 the recompute cost. Time here is the
program's positions: a recompute at position t runs right before program[t]. The intervals' presence is the plan;
`to_schedule` places its restores as late as possible. Cannot model: codecs, what happens between two positions (where
`simulate` refuses the plan for that, its excess is taken off the capacity and phase 2 runs again).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from ortools.sat.python import cp_model

from solvers.bounds import ANY_PLAN, cost_floor
from solvers.checkmate import watched
from solvers.evaluate import Fates, keep_everything, to_schedule
from solvers.problem import Limits, Problem, Solution, ValueId
from solvers.search import Search
from solvers.units import Units, build_units

TRIES = 6  # capacities
FEASIBLE_SHARE = 0.3  # of the time, for phase 1


def solve_moccasin(problem: Problem, limits: Limits) -> Solution:
    """Return the cheapest plan that the intervals give and that fits; proves nothing about plans with codecs."""
    units = build_units(problem)
    search = Search(problem, limits, "moccasin")
    search.offer(problem.program, keep_everything(units))
    capacity, hint = problem.budget_bytes, None
    if search.schedule is None:
        hint = _Model(units, None).solve(FEASIBLE_SHARE * search.left(), limits, None)
    for _ in range(TRIES):
        if search.schedule is not None or search.left() <= 0.1:
            break
        fates = _Model(units, capacity).solve(search.left(), limits, hint)
        if fates is None:
            break
        usage = search.offer(to_schedule(units, fates), fates)
        capacity -= max(0, usage.peak_bytes - problem.budget_bytes)
        hint = fates
    return search.answer(cost_floor(problem, units), ANY_PLAN)


@dataclass(slots=True)
class _Model:
    """`second[a]`: unit a is computed again, at position `start[a]`; it is held to `end1[a]`, and then to `end2[a]`."""

    units: Units
    capacity: int | None  # None: minimise it
    model: cp_model.CpModel = field(default_factory=cp_model.CpModel)
    second: list[cp_model.IntVar] = field(default_factory=list)
    start: list[cp_model.IntVar] = field(default_factory=list)
    end1: list[cp_model.IntVar] = field(default_factory=list)
    end2: list[cp_model.IntVar] = field(default_factory=list)

    def solve(self, seconds: float, limits: Limits, hint: Fates | None) -> Fates | None:
        """Return which units to drop (fate 1), or None."""
        self._intervals()
        self._precedence()
        self._memory()
        # Constants share one variable, and a variable may have one hint.
        for a, unit in enumerate(self.units.units if hint is not None else ()):
            if len(unit.fates) > 1 and unit.fates[1].name == "drop":
                self.model.add_hint(self.second[a], int(hint[a] == 1))  # type: ignore[index]
        solver = cp_model.CpSolver()
        solver.parameters.max_time_in_seconds = max(0.05, seconds)
        solver.parameters.num_workers = limits.threads
        solver.parameters.random_seed = limits.seed
        with watched(limits, solver.stop_search):
            status = solver.solve(self.model)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None
        return np.array([solver.value(x) for x in self.second], np.int16)

    def _intervals(self) -> None:
        n, turn, model = len(self.units.problem.program), self.units.problem.turn, self.model
        for unit in self.units.units:
            may = len(unit.fates) > 1 and unit.fates[1].name == "drop"
            held = unit.fates[0].held
            first = max(h.last_forward for h in held)
            last = max(first, *(h.last_backward for h in held))
            self.second.append(model.new_bool_var("") if may else model.new_constant(0))
            self.start.append(model.new_int_var(turn + 1, n, ""))
            self.end1.append(model.new_int_var(first, n, ""))
            self.end2.append(model.new_int_var(turn + 1, n, ""))
            read = unit.fates[1].first_read if may else n
            # The program's reads: all by the first interval, or all by the second.
            model.add(self.end1[-1] >= last).only_enforce_if(self.second[-1].Not())
            if may and read < n:
                model.add(self.start[-1] <= read).only_enforce_if(self.second[-1])
            model.add(self.end2[-1] >= max(last, turn + 1)).only_enforce_if(self.second[-1])
            model.add(self.end2[-1] >= self.start[-1])

    def _precedence(self) -> None:
        """A recompute at `start` reads its parents there: in their first interval or in their second."""
        for a, unit in enumerate(self.units.units):
            for v in unit.fates[1].parents if len(unit.fates) > 1 and unit.fates[1].name == "drop" else ():
                p = self._unit(v)
                if p is None:
                    continue
                now = [self.model.new_bool_var(""), self.model.new_bool_var("")]
                self.model.add_bool_or([self.second[a].Not(), *now])
                self.model.add(self.end1[p] >= self.start[a]).only_enforce_if(now[0])
                self.model.add_implication(now[1], self.second[p])
                self.model.add(self.start[p] <= self.start[a]).only_enforce_if(now[1])
                self.model.add(self.end2[p] >= self.start[a]).only_enforce_if(now[1])

    def _unit(self, v: ValueId) -> int | None:
        return self.units.unit_of.get(v)

    def _memory(self) -> None:
        model, base, never = self.model, self.units.base_bytes, len(self.units.problem.program)
        intervals, demands = [], []
        for a, unit in enumerate(self.units.units):
            first = max(h.last_forward for h in unit.fates[0].held) + 1
            length = model.new_int_var(0, never + 1, "")
            model.add(length == self.end1[a] + 1 - first)
            intervals.append(model.new_interval_var(first, length, self.end1[a] + 1, ""))
            again = model.new_int_var(0, never + 1, "")
            model.add(again == self.end2[a] + 1 - self.start[a])
            intervals.append(
                model.new_optional_interval_var(self.start[a], again, self.end2[a] + 1, self.second[a], "")
            )
            demands += [unit.size_bytes, unit.size_bytes]
        low, begin = int(base.min()), 0
        for t in range(1, never + 1):
            if t == never or base[t] != base[begin]:
                if base[begin] > low:
                    intervals.append(model.new_fixed_size_interval_var(begin, t - begin, ""))
                    demands.append(int(base[begin]) - low)
                begin = t
        if self.capacity is None:
            capacity = model.new_int_var(0, int(base.max()) + sum(demands), "capacity")
            model.add_cumulative(intervals, demands, capacity)
            model.minimize(capacity)
            return
        model.add_cumulative(intervals, demands, max(0, self.capacity - low))
        costs = [u.fates[1].restore_ns if len(u.fates) > 1 else 0 for u in self.units.units]
        model.minimize(cp_model.LinearExpr.weighted_sum(self.second, costs))
