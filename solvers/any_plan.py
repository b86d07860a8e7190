"""A bound on every plan in the program's order, however often it recomputes: the epoch linear program.

The linear relaxation of the staged formulation of Jain et al. 2020 (Checkmate), its stages merged between a few memory
rows: an integer solution of the finer program merges into one of this, so the optimum is a bound for any row set, and
the largest over several is taken. With rows t_0 < t_1 < ... after the turn, epoch i is the positions in (t_{i-1}, t_i]:

    held[v, i]       value v is there at row i; held[v, -1] = it was kept over the turn
    again[a, i]      unit a's values are computed again in epoch i, at least once: restore_ns
    decoded[v, i]    value v is decoded in epoch i: the decode's cost
    encoded[v, i]    an encoding of v is there at row i, made before the turn; encoded[v, -1] costs the encode

    held[v, i] <= held[v, i-1] + again[a, i] + decoded[v, i]         v a value of unit a
    again[a, i] <= held[p, i-1] + again[b, i] + decoded[p, i]        for each parent p, a value of b, of the restore
    decoded[v, i] <= encoded[v, i-1] <= encoded[v, i-2]
    1 <= held[v, i-1] + again[a, i] + decoded[v, i] (+ encoded[v, i-1])   where epoch i reads v (or its encoding)
    floor_bytes[t_i] + sum value_bytes * held[v, i] + sum encoded_bytes * encoded[v, i] <= budget_bytes

The last also for i = -1, at the turn. What would make it infeasible for some plan is left out: transients, encodes'
workspace, alternatives' workspace.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
from ortools.glop import parameters_pb2
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt

from solvers.bounds import cost_floor
from solvers.fates import Fate, encoders, value_spans
from solvers.problem import OpId, Problem, ValueId
from solvers.units import Unit, Units

ROWS = 12  # of the first program
LARGEST = 400_000  # coefficients
COEFFICIENT = 2e-5  # seconds for one of them
MARGIN = 1e-6  # of the optimum, for floating point


@dataclass(frozen=True, slots=True)
class Relaxation:
    """An optimum of the linear program; index 0 of `held` and `encoded` is the turn, i + 1 is `rows[i]`."""

    bound_ns: int  # on the cost of every plan in program order
    size: int  # coefficients
    rows: tuple[int, ...]
    held: dict[ValueId, tuple[float, ...]]
    encoded: dict[ValueId, tuple[float, ...]]


def spaced_rows(problem: Problem) -> set[int]:
    """Return the positions of a few memory rows, evenly spaced after the turn."""
    last = len(problem.program) - 1
    return {int(t) for t in np.linspace(min(problem.turn + 1, last), last, ROWS)}


def any_plan_bound(units: Units, budget_bytes: int, rows: Iterable[int], seconds: float) -> int:
    """Return a lower bound in ns on the cost of every plan in program order; the trivial one if time is up."""
    found = relax_any(units, budget_bytes, rows, seconds)
    return cost_floor(units.problem, units) if found is None else found.bound_ns


def relax_any(
    units: Units, budget_bytes: int, rows: Iterable[int], seconds: float, largest: int = LARGEST
) -> Relaxation | None:
    """Return an optimum of the program with these rows; None if it has none or too many coefficients, or time is up."""
    program = _Program(units, sorted(t for t in set(rows) if t > units.problem.turn), budget_bytes)
    program.build()
    solved = program.solve(seconds) if len(program.values) <= largest and seconds > 0 else None
    if solved is None:
        return None
    extra, values = solved
    floor = cost_floor(units.problem, units)
    return Relaxation(
        max(floor, math.ceil(floor + extra * (1 - MARGIN)) - 1),
        len(program.values),
        tuple(program.rows),
        {v: tuple(values[c] for c in columns) for v, columns in program.held.items()},
        {v: tuple(values[c] for c in columns) for v, columns in program.encoded.items()},
    )


@dataclass(slots=True)
class _Program:
    """Columns in [0, 1] with a cost each; rows `sum <= high`."""

    units: Units
    rows: list[int]
    budget: int
    cost: list[float] = field(default_factory=list)
    highs: list[float] = field(default_factory=list)
    row_ids: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    held: dict[ValueId, list[int]] = field(default_factory=dict)
    last_forward: dict[ValueId, int] = field(default_factory=dict)  # until then a value is in `floor_bytes`
    backward: dict[ValueId, tuple[int, ...]] = field(default_factory=dict)  # reads after the turn
    again: list[list[int]] = field(default_factory=list)
    decoded: dict[ValueId, list[int]] = field(default_factory=dict)
    encoded: dict[ValueId, list[int]] = field(default_factory=dict)
    codecs: dict[ValueId, list[Fate]] = field(default_factory=dict)  # the fates of v's unit that encode v

    def build(self) -> None:
        """Declare every column, then the rows in the order of the docstring."""
        encoder = {o: v for v, o in encoders(self.units.problem)}
        self.backward = {v: span.backward for v, span in value_spans(self.units.problem).items()}
        for unit in self.units.units:
            for f in unit.fates:
                if f.encode is not None:
                    self.codecs.setdefault(encoder[f.encode], []).append(f)
            self._columns(unit)
        for a, unit in enumerate(self.units.units):
            for v in unit.values:
                self._flow(v)
                self._reads(v)
            self._parents(a, unit)
        for i, t in enumerate([self.units.problem.turn, *self.rows]):
            self._memory(i - 1, t)

    def _column(self, cost: float) -> int:
        self.cost.append(cost)
        return len(self.cost) - 1

    def _row(self, terms: list[tuple[int, float]], high: float) -> None:
        merged: dict[int, float] = {}
        for column, value in terms:
            merged[column] = merged.get(column, 0.0) + value
        for column, value in sorted(merged.items()):
            self.row_ids.append(len(self.highs))
            self.columns.append(column)
            self.values.append(value)
        self.highs.append(high)

    def _columns(self, unit: Unit) -> None:
        """Index i of each list is row i - 1 for `held` and `encoded`, epoch i for the others."""
        count = len(self.rows) + 1
        restores = [f.restore_ns for f in unit.fates if f.restore and not f.decodes]
        self.again.append([self._column(min(restores)) for _ in range(count)] if restores else [])
        self.last_forward.update((h.value, h.last_forward) for h in unit.fates[0].held)
        for v in unit.values:
            self.held[v] = [self._column(0.0) for _ in range(count)]
            codecs = self.codecs.get(v, [])
            decodes = [f.restore_ns for f in codecs if f.decodes]
            if decodes:
                self.decoded[v] = [self._column(min(decodes)) for _ in range(count)]
            if codecs:
                first = self._column(min(self._encode_ns(f) for f in codecs))
                self.encoded[v] = [first, *(self._column(0.0) for _ in range(count - 1))]

    def _encode_ns(self, fate: Fate) -> int:
        """The encode and what its alternatives cost more; what they cost less is in the floor already."""
        ops = self.units.problem.ops
        assert fate.encode is not None
        return ops[fate.encode].cost_ns + sum(max(0, ops[o].cost_ns - ops[q].cost_ns) for q, o in fate.instead)

    def _there(self, v: ValueId, i: int) -> list[tuple[int, float]]:
        """The columns of which one must hold for v to be read in epoch i."""
        again = self.again[self.units.unit_of[v]]
        found = [(self.held[v][i], 1.0), *([(again[i], 1.0)] if again else [])]
        return found + ([(self.decoded[v][i], 1.0)] if v in self.decoded else [])

    def _flow(self, v: ValueId) -> None:
        for i in range(len(self.rows)):
            self._row([(self.held[v][i + 1], 1.0), *((c, -x) for c, x in self._there(v, i))], 0.0)
            if v in self.encoded:
                self._row([(self.encoded[v][i + 1], 1.0), (self.encoded[v][i], -1.0)], 0.0)
        for i, column in enumerate(self.decoded.get(v, ())):
            self._row([(column, 1.0), (self.encoded[v][i], -1.0)], 0.0)

    def _parents(self, a: int, unit: Unit) -> None:
        """With several restores only what all of them read counts."""
        restores = [set(f.parents) for f in unit.fates if f.restore and not f.decodes]
        common = set.intersection(*restores) if restores else set()
        for p in sorted(v for v in common if v in self.held and self.units.unit_of[v] != a):
            for i, column in enumerate(self.again[a]):
                self._row([(column, 1.0), *((c, -x) for c, x in self._there(p, i))], 0.0)

    def _covered(self, v: ValueId) -> set[OpId]:
        """The program ops in whose place an alternative may read v's encoding."""
        return {q for f in self.codecs.get(v, ()) for q, _ in f.instead}

    def _reads(self, v: ValueId) -> None:
        """Each epoch in which the program reads v: there, or where an alternative reads it, its encoding."""
        problem, last = self.units.problem, self.units.problem.turn
        for i, t in enumerate([*self.rows, len(problem.program) - 1]):
            readers = [problem.program[r] for r in self.backward[v] if last < r <= t]
            last = max(last, t)
            if readers:
                covered = [(self.encoded[v][i], 1.0)] if self._covered(v).issuperset(readers) else []
                self._row([(c, -x) for c, x in (*self._there(v, i), *covered)], -1.0)

    def _memory(self, i: int, t: int) -> None:
        problem, q = self.units.problem, self.units.problem.program[t]
        terms: list[tuple[int, float]] = []
        spare = 0
        for v, held in self.held.items():
            terms.extend([(held[i + 1], problem.value_bytes[v])] if t > self.last_forward[v] else ())
            if v in self.encoded and all(t > f.encode_at for f in self.codecs[v]):
                smallest = min(f.encoded_bytes for f in self.codecs[v])
                terms.append((self.encoded[v][i + 1], smallest))
            if v in problem.ops[q].reads and i >= 0:
                also = [(self.encoded[v][i + 1], -1.0)] if q in self._covered(v) else []
                self._row([(held[i + 1], -1.0), *also], -1.0)
        for unit in self.units.units:
            spare += max((max(0, -more) for f in unit.fates for at, more in f.swaps if at == t), default=0)
        scale = max(1.0, self.budget / 100)
        limit = self.budget - int(self.units.floor_bytes[t]) + spare
        self._row([(c, x / scale) for c, x in terms], limit / scale)

    def solve(self, seconds: float) -> tuple[float, list[float]] | None:
        """Return the optimum in ns and the columns; None when there is none in time."""
        proto, n = model_pb2.ModelProto(), len(self.cost)
        scale = max(1.0, max(self.cost, default=1.0) / 1000)
        proto.variables.ids.extend(range(n))
        proto.variables.lower_bounds.extend([0.0] * n)
        proto.variables.upper_bounds.extend([1.0] * n)
        proto.variables.integers.extend([False] * n)
        proto.linear_constraints.ids.extend(range(len(self.highs)))
        proto.linear_constraints.lower_bounds.extend([-math.inf] * len(self.highs))
        proto.linear_constraints.upper_bounds.extend(self.highs)
        proto.linear_constraint_matrix.row_ids.extend(self.row_ids)
        proto.linear_constraint_matrix.column_ids.extend(self.columns)
        proto.linear_constraint_matrix.coefficients.extend(self.values)
        priced = [(j, c / scale) for j, c in enumerate(self.cost) if c]
        proto.objective.linear_coefficients.ids.extend(j for j, _ in priced)
        proto.objective.linear_coefficients.values.extend(c for _, c in priced)
        glop = parameters_pb2.GlopParameters(use_dual_simplex=True, use_preprocessing=False)
        limit = mathopt.SolveParameters(glop=glop, time_limit=timedelta(seconds=max(0.05, seconds)))
        result = mathopt.solve(mathopt.Model.from_model_proto(proto), mathopt.SolverType.GLOP, params=limit)
        if result.termination.reason is not mathopt.TerminationReason.OPTIMAL:
            return None
        values = result.variable_values()
        columns = sorted(values, key=lambda column: column.id)
        return max(0.0, float(result.objective_value()) * scale), [values[column] for column in columns]
