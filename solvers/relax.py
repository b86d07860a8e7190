"""The epoch model with its integers relaxed (GLOP), rounded: bounds, and good starts for repair.

A fractional optimum at a budget below what any plan reaches still says which values a small peak keeps. The linear
program is read off the CP-SAT model, so that there is one formulation.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
from ortools.glop import parameters_pb2
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt

from solvers.epochs import EpochModel
from solvers.evaluate import Fates, allowed

LINEAR_SIZE = 250_000  # coefficients of a linear program that is too slow to solve
COEFFICIENT = 15e-6  # seconds for one of them
MARGIN = 1e-6  # of an optimum, for what floating point may have added to it
ENDLESS = 2**62  # an end of a domain that is none
Vector = np.ndarray[tuple[int], np.dtype[np.float64]]
LEVELS = (0.0005, 0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 0.9995)  # keep a unit that is kept to at least this part


class LinearProgram:
    """Rows of a linear program over the variables of a CP-SAT model; a literal -1 - x means 1 - x."""

    def __init__(self, model: EpochModel) -> None:
        """Translate every constraint; rows of bytes are scaled to hundredths of their largest coefficient."""
        self.model, proto = model, model.model.proto
        self.low, self.high = list[float](), list[float]()
        self.rows, self.columns, self.values = list[int](), list[int](), list[float]()
        self.within = list[tuple[int, int, float]]()  # such a row, its position, and what its bytes are divided by
        for i, c in enumerate(proto.constraints):
            if i in model.within and c.has_linear():
                self.within.append((len(self.low), model.within[i], _scale(c.linear.coeffs)))
            self._translate(c)
        self.duals: Vector = np.zeros(len(self.low))  # of the optimum, or where time cut the search for it
        self.domains = [list(v.domain) for v in proto.variables]
        self.offset = float(proto.objective.offset)
        self.scale = max(1.0, float(max(map(abs, proto.objective.coeffs), default=1)) / 1000)
        self.cost = {v: c / self.scale for v, c in zip(proto.objective.vars, proto.objective.coeffs, strict=True)}

    def __len__(self) -> int:
        """Return the number of coefficients."""
        return len(self.values)

    def _translate(self, c: Any) -> None:
        unless = [-1 - e for e in c.enforcement_literal]
        if c.has_bool_and():
            for x in c.bool_and.literals:
                self._clause([x, *unless])
        elif c.has_bool_or():
            self._clause([*c.bool_or.literals, *unless])
        elif c.has_linear():
            self._linear(list(c.linear.vars), list(c.linear.coeffs), list(c.linear.domain))
        elif c.has_exactly_one():
            self._clause(list(c.exactly_one.literals), 1.0)
        elif c.has_at_most_one():
            self._clause(list(c.at_most_one.literals), 1.0, -math.inf)

    def _clause(self, literals: list[int], high: float = math.inf, low: float = 1.0) -> None:
        negated = 0
        found: dict[int, float] = {}
        for x in literals:
            v, sign = (x, 1.0) if x >= 0 else (-1 - x, -1.0)
            negated += x < 0
            found[v] = found.get(v, 0.0) + sign
        self._row(found, low - negated, high - negated)

    def _linear(self, variables: list[int], coefficients: list[int], domain: list[int]) -> None:
        scale = _scale(coefficients)
        found: dict[int, float] = {}
        for v, c in zip(variables, coefficients, strict=True):
            found[v] = found.get(v, 0.0) + c / scale
        low, high = (math.copysign(math.inf, x) if abs(x) >= ENDLESS else x / scale for x in (domain[0], domain[-1]))
        self._row(found, low, high)

    def _row(self, found: dict[int, float], low: float, high: float) -> None:
        row = len(self.low)
        for v in sorted(found):
            self.rows.append(row)
            self.columns.append(v)
            self.values.append(found[v])
        self.low.append(low)
        self.high.append(high)

    def solve(self, seconds: float) -> tuple[list[float] | None, float]:
        """Return the value of every variable at an optimum, and a bound on the objective.

        Where there is none, or time is up first, the values are None and the bound is that of the duals so far, minus
        infinity if there are none.
        """
        proto = model_pb2.ModelProto()
        n, m = len(self.domains), len(self.low)
        proto.variables.ids.extend(range(n))
        proto.variables.lower_bounds.extend(float(d[0]) for d in self.domains)
        proto.variables.upper_bounds.extend(float(d[-1]) for d in self.domains)
        proto.variables.integers.extend([False] * n)
        proto.linear_constraints.ids.extend(range(m))
        proto.linear_constraints.lower_bounds.extend(self.low)
        proto.linear_constraints.upper_bounds.extend(self.high)
        proto.linear_constraint_matrix.row_ids.extend(self.rows)
        proto.linear_constraint_matrix.column_ids.extend(self.columns)
        proto.linear_constraint_matrix.coefficients.extend(self.values)
        proto.objective.linear_coefficients.ids.extend(sorted(self.cost))
        proto.objective.linear_coefficients.values.extend(self.cost[v] for v in sorted(self.cost))
        # Measured: the dual simplex without presolve is up to 15 times faster on these programs.
        glop = parameters_pb2.GlopParameters(use_dual_simplex=True, use_preprocessing=False)
        parameters = mathopt.SolveParameters(glop=glop, time_limit=timedelta(seconds=max(0.05, seconds)))
        program = mathopt.Model.from_model_proto(proto)
        result = mathopt.solve(program, mathopt.SolverType.GLOP, params=parameters)
        values, bound = None, -math.inf
        if result.termination.reason is mathopt.TerminationReason.OPTIMAL:
            optimum, found = result.objective_value() * self.scale + self.offset, result.variable_values()
            values = [found[v] for v in program.variables()]
            bound = optimum - MARGIN * abs(optimum)
        if result.solutions and result.solutions[0].dual_solution is not None:
            prices = result.solutions[0].dual_solution.dual_values
            self.duals = self.signed(np.array([prices[row] for row in program.linear_constraints()]))
            if values is None:
                bound = self.lagrangian()
        return values, bound

    @property
    def slope(self) -> float:
        """What the bound of the duals changes by, in its unit a byte of budget."""
        return self.scale * sum(float(self.duals[row]) / by for row, _, by in self.within)

    @property
    def binding(self) -> set[int]:
        """The positions whose memory rows hold that bound up."""
        return {t for row, t, _ in self.within if self.duals[row] < 0}

    def signed(self, duals: Vector) -> Vector:
        """Return the duals (rows,) without those that price an end which a row has not."""
        sides = np.where(duals > 0, self.low, self.high)
        return np.where(np.isfinite(sides), duals, 0.0)

    def lagrangian(self) -> float:
        """Return what the duals bound: no value of the objective is smaller, whatever they are."""
        sides = np.where(self.duals > 0, self.low, self.high)
        prices = np.zeros(len(self.domains))
        prices[list(self.cost)] = list(self.cost.values())
        prices -= np.bincount(self.columns, np.array(self.values) * self.duals[self.rows], len(prices))
        least, most = np.array([(d[0], d[-1]) for d in self.domains], float).T
        bound = (prices * np.where(prices > 0, least, most)).sum()
        bound += self.duals @ np.where(self.duals == 0, 0.0, sides)
        bound = float(bound) * self.scale + self.offset
        return bound - MARGIN * abs(bound)


def coefficients(model: EpochModel) -> int:
    """Return how many coefficients the linear program of a model has at least, without translating it."""
    # Only where it is linear: to read another part of a constraint makes it one of that kind.
    return sum(len(c.linear.vars) for c in model.model.proto.constraints if c.has_linear())


def _scale(terms: Sequence[int]) -> float:
    return max(1.0, max(map(abs, terms), default=1) / 100)


class Beside:
    """A linear program that a thread of its own solves, on another core than the search."""

    def __init__(self, program: LinearProgram, left: Callable[[], float]) -> None:
        """Begin; `left()` are the seconds that there are, at most 0 when they are over or the caller cancels."""
        self.program, self.bound, self._left = program, 0, left
        self._thread = threading.Thread(target=self._solve, args=(program,), daemon=True)
        self._thread.start()

    def _solve(self, program: LinearProgram) -> None:
        _, bound = program.solve(self._left())
        if math.isfinite(bound):
            self.bound = math.ceil(bound)

    def wait(self) -> int:
        """Return the bound on the objective as soon as it is there, or 0 when time is over."""
        while self._thread.is_alive() and self._left() > 0:
            self._thread.join(0.05)
        return self.bound


def round_all(model: EpochModel, values: list[float]) -> Fates:
    """Return one fate vector a level: keep what is kept to at least that part, else the largest other fate."""
    plans = np.zeros((len(LEVELS), len(model.chosen)), np.int16)
    for a, literals in enumerate(model.chosen):
        if len(literals) > 1:
            parts = np.array([values[x.index] for x in literals])
            plans[:, a] = np.where(parts[0] >= np.array(LEVELS), 0, 1 + int(np.argmax(parts[1:])))
    return np.unique([allowed(model.units, p) for p in plans], axis=0)
