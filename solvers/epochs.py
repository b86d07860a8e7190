"""The epoch model: which fates satisfy the memory rows at chosen program positions, at least cost (CP-SAT).

Only positions that can bind carry a memory row; between two rows the time of a restore is free, so leaving rows out is
a relaxation and every bound stays valid. The formulation follows the checkpointing MILP of Jain et al. 2020
(Checkmate) restricted to one recompute a value (as Bartan et al. 2023, Moccasin, restrict theirs), aggregated over
time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
from ortools.sat.python import cp_model

from solvers.evaluate import Fates
from solvers.fates import Fate, Held
from solvers.joint import spared_bytes
from solvers.problem import OpId, ValueId
from solvers.units import Units, rewrites

Term = tuple[cp_model.IntVar, int]
Cut = tuple[tuple[tuple[int, int], ...], int]  # these (unit, fate) pairs together reach these bytes


class EpochModel:
    """`chosen[a][m]`: unit a has fate m. `restored[a, m]`: it is ever restored. `by[a, m][i]`: before row
    i's op runs.

    `rows` are the positions after the turn that carry a memory row, `forward` those up to the turn.
    """

    def __init__(self, units: Units, rows: Iterable[int], forward: Iterable[int], budget_bytes: int | None) -> None:
        """Build every variable and row; without a budget the peak is minimised instead of the cost."""
        self.units, self.model = units, cp_model.CpModel()
        self.rows, self.forward = sorted(rows), sorted(forward)
        self.never = len(units.problem.program)
        self.one = self.model.new_constant(1)
        self.chosen: list[list[cp_model.IntVar]] = []
        self.restored: dict[tuple[int, int], cp_model.IntVar] = {}
        self.by: dict[tuple[int, int], list[cp_model.IntVar]] = {}
        self.readers: dict[ValueId, dict[int, list[int]]] = {}  # value -> unit -> fates whose restores read it
        self.peak: cp_model.IntVar | None = None
        self.within: dict[int, int] = {}  # index of a constraint with the budget on its right side -> its row
        self.fixed: list[int] = []  # literals that `fix` made true
        self.again = [[rewrites(units.problem, f) for f in u.fates] for u in units.units]
        self.soft: dict[int, list[Held]] = {}
        for a, h in units.soft.values():
            self.soft.setdefault(a, []).append(h)
        self._variables()
        self._availability()
        self._clashes()
        self._noise()
        self._memory(budget_bytes)
        if self.peak is None:
            self.model.minimize(cp_model.LinearExpr.weighted_sum(*self._cost()))
        else:
            self.model.minimize(self.peak)

    def _variables(self) -> None:
        deadline = self._deadlines()
        for a, unit in enumerate(self.units.units):
            fates = [self.model.new_bool_var("") for _ in unit.fates] if len(unit.fates) > 1 else [self.one]
            self.chosen.append(fates)
            if len(fates) > 1:
                self.model.add_exactly_one(fates)
            for m, fate in enumerate(unit.fates):
                if fate.restore:
                    self._restore_variables(a, m, fate, deadline[a, m])
                    for v in dict.fromkeys(fate.parents):  # an op may read a value twice
                        if v in self.units.unit_of:
                            self.readers.setdefault(v, {}).setdefault(a, []).append(m)

    def _restore_variables(self, a: int, m: int, fate: Fate, deadline: int) -> None:
        chosen = self.chosen[a][m]
        restored = chosen
        # A unit without a backward read of its own comes back only when a restore asks for it.
        if fate.first_read == self.never:
            restored = self.model.new_bool_var("")
            self.model.add_implication(restored, chosen)
        count = sum(t < deadline for t in self.rows)
        by = [self.model.new_bool_var("") for _ in range(count)]
        for earlier, later in pairwise([*by, restored]):
            self.model.add_implication(earlier, later)
        self.restored[a, m], self.by[a, m] = restored, by

    def _deadlines(self) -> dict[tuple[int, int], int]:
        """The position by which a restore has surely run: its first read, or its readers' deadline."""
        deadline: dict[tuple[int, int], int] = {}
        latest: dict[ValueId, int] = {}
        for a in reversed(range(len(self.units.units))):
            for m, fate in enumerate(self.units.units[a].fates):
                if not fate.restore:
                    continue
                asked = max((latest.get(h.value, 0) for h in fate.held if h.dropped), default=0)
                deadline[a, m] = asked if fate.first_read == self.never else fate.first_read
                for v in fate.parents:
                    latest[v] = max(latest.get(v, 0), deadline[a, m])
        return deadline

    def _by(self, a: int, m: int, i: int) -> cp_model.IntVar:
        """1 when unit a under fate m is restored before row i's op runs."""
        by = self.by[a, m]
        return by[i] if i < len(by) else self.restored[a, m]

    def _available(self, v: ValueId, i: int) -> list[cp_model.IntVar]:
        """The literals of which one must hold for v to be there at row i (past the rows: ever)."""
        a = self.units.unit_of[v]
        literals = []
        for m, fate in enumerate(self.units.units[a].fates):
            if not any(h.dropped for h in fate.held if h.value == v):
                literals.append(self.chosen[a][m])
            elif fate.restore:
                literals.append(self._by(a, m, i) if i >= 0 else self.model.new_constant(0))
        return literals

    def _availability(self) -> None:
        """A restore needs what it reads, kept or restored no later than itself.

        A unit has one fate: all of them that read a value share its rows, which then are fewer, and bind halves more.
        """
        for v, readers in self.readers.items():
            for a, fates in readers.items():
                for i in range(max(len(self.by[a, m]) for m in fates) + 1):
                    there, restores = self._available(v, i), [self._by(a, m, i) for m in fates]
                    if len(restores) == 1:
                        self.model.add_bool_or([restores[0].Not(), *there])
                    else:
                        signs = [1] * len(there) + [-1] * len(restores)
                        self.model.add(cp_model.LinearExpr.weighted_sum([*there, *restores], signs) >= 0)

    def _clashes(self) -> None:
        for group in self.units.clashes:
            self.model.add_at_most_one(self.chosen[a][m] for a, m in group)

    def _noise(self) -> None:
        """The noise of all chosen fates together is within the limit."""
        noisy = [
            (self.chosen[a][m], fate.noise_ppb)
            for a, unit in enumerate(self.units.units)
            for m, fate in enumerate(unit.fates)
            if fate.noise_ppb
        ]
        if noisy:
            variables, noise = [x for x, _ in noisy], [n for _, n in noisy]
            self.model.add(cp_model.LinearExpr.weighted_sum(variables, noise) <= self.units.problem.noise_limit_ppb)

    def _memory(self, budget_bytes: int | None) -> None:
        """At each row: what is always there, plus what the fates hold, is within the budget (or the peak)."""
        base = self.units.floor_bytes
        if budget_bytes is None:
            top = int(base.max()) + sum(self.units.problem.value_bytes)
            self.peak = self.model.new_int_var(int(base.max()), top, "peak")
        rows = [(t, -1) for t in self.forward] + [(t, i) for i, t in enumerate(self.rows)]
        for t, i in rows:
            terms = [term for a in range(len(self.units.units)) for term in self._held(a, t, i)]
            terms.extend(self._spared(self.units.problem.program[t]))
            variables, sizes = [x for x, _ in terms], [s for _, s in terms]
            if self.peak is not None:
                variables, sizes = [*variables, self.peak], [*sizes, -1]
            limit = (0 if budget_bytes is None else budget_bytes) - int(base[t])
            self.within[self.model.add(cp_model.LinearExpr.weighted_sum(variables, sizes) <= limit).index] = t

    def _held(self, a: int, t: int, i: int) -> list[Term]:
        """What unit a may hold at position t: one term a literal. i = -1: before anything is restored."""
        terms: list[Term] = []
        waiting: set[ValueId] = set()
        for m, fate in enumerate(self.units.units[a].fates):
            again = self.again[a][m]
            for h in (*fate.held, *self.soft.get(a, ())):
                if t <= h.last_forward:
                    continue
                if t > h.last_backward:
                    waiting.add(h.value)
                elif not h.dropped:
                    terms.append((self.chosen[a][m], h.size_bytes))
                    terms.extend(self._rewritten(a, m, h, i) if h.value in again else ())
                elif i >= 0 and fate.restore:
                    terms.append((self._by(a, m, i), h.size_bytes))
            terms.extend((self.chosen[a][m], more) for position, more in fate.swaps if position == t)
            terms.extend(self._encoding(a, m, fate, t, i))
        for h in self.units.units[a].fates[0].held:
            if h.value in waiting:
                terms.extend(self._waiting(h, t, i))
        return terms

    def _spared(self, op: OpId) -> list[Term]:
        """What joint alternatives for an op take less than their parts, of which all must be chosen."""
        terms: list[Term] = []
        for parts, o in self.units.joint.items():
            less = spared_bytes(self.units.problem, o, parts) if self.units.problem.ops[o].instead_of == op else 0
            if less:
                terms.append((self.model.new_bool_var(""), -less))
                for p in parts:
                    chosen = [x for x, f in self._fates() if (op, p) in f.instead]
                    self.model.add(sum(chosen) >= terms[-1][0])
        return terms

    def _fates(self) -> Iterator[tuple[cp_model.IntVar, Fate]]:
        for literals, unit in zip(self.chosen, self.units.units, strict=True):
            yield from zip(literals, unit.fates, strict=True)

    def _rewritten(self, a: int, m: int, h: Held, i: int) -> list[Term]:
        """A value that the restore writes again need not be there before it."""
        gone = [(self.restored[a, m], -h.size_bytes)]
        return gone if i < 0 else [*gone, (self._by(a, m, i), h.size_bytes)]

    def _encoding(self, a: int, m: int, fate: Fate, t: int, i: int) -> list[Term]:
        if fate.encode is None or t <= fate.encode_at:
            return []
        if t <= fate.encoded_until:
            return [(self.chosen[a][m], fate.encoded_bytes)]
        if not fate.decodes:
            return []
        held = [(self.restored[a, m], fate.encoded_bytes)]
        return held if i < 0 else [*held, (self._by(a, m, i), -fate.encoded_bytes)]

    def _waiting(self, h: Held, t: int, i: int) -> list[Term]:
        """A value past its own last read under some fate is still held while a later restore reads it.

        What is restored after row i reads a value that is there already, or is restored after row i itself: as a sum,
        which halves of fates satisfy less easily than clauses.
        """
        literal: cp_model.IntVar | None = None
        elsewhere = self._elsewhere(h, t, i)
        for c, fates in self.readers.get(h.value, {}).items():
            after = [term for k in fates if i < 0 or i < len(self.by[c, k]) for term in self._after(c, k, i, -1)]
            if not after:
                continue
            literal = literal if literal is not None else self.model.new_bool_var("")
            variables, signs = zip((literal, 1), *elsewhere, *after, strict=True)
            self.model.add(cp_model.LinearExpr.weighted_sum(variables, signs) >= 0)
        return [] if literal is None else [(literal, h.size_bytes)]

    def _after(self, a: int, m: int, i: int, sign: int) -> list[Term]:
        """`sign` where unit a under fate m is restored after row i."""
        restored = (self.restored[a, m], sign)
        return [restored, (self._by(a, m, i), -sign)] if 0 <= i else [restored]

    def _elsewhere(self, h: Held, t: int, i: int) -> list[Term]:
        """1 where the unit is restored after row i, or its value is counted at position t as one with reads to come."""
        a = self.units.unit_of[h.value]
        terms: list[Term] = []
        for m, fate in enumerate(self.units.units[a].fates):
            held = next(x for x in fate.held if x.value == h.value)
            restores = held.dropped and bool(fate.restore)
            terms.extend(self._after(a, m, i, 1) if restores else ())
            if t <= held.last_backward and not held.dropped:
                terms.append((self.chosen[a][m], 1))
            elif t <= held.last_backward and restores and 0 <= i:
                terms.append((self._by(a, m, i), 1))
        return terms

    def _cost(self) -> tuple[list[cp_model.IntVar], list[int]]:
        variables, costs = [self.one], [self.units.problem.program_cost_ns()]
        for a, unit in enumerate(self.units.units):
            for m, fate in enumerate(unit.fates):
                if fate.cost_ns:
                    variables.append(self.chosen[a][m])
                    costs.append(fate.cost_ns)
                if fate.restore:
                    variables.append(self.restored[a, m])
                    costs.append(fate.restore_ns)
        return variables, costs

    def add_cut(self, cut: Cut, budget_bytes: int | None) -> None:
        """These fates together reach these bytes: forbid them, or raise the peak with them."""
        pairs, reached = cut
        literals = [self.chosen[a][m] for a, m in pairs]
        if self.peak is not None:
            self.model.add(self.peak >= reached).only_enforce_if(literals)
        elif budget_bytes is not None and reached > budget_bytes:
            self.model.add_bool_or([x.Not() for x in literals])

    def fix(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Let these (unit, fate) pairs hold, and every other unit have any fate."""
        proto = self.model.proto.variables
        for x in self.fixed:
            proto[x].domain[0] = 0
        self.fixed = [self.chosen[a][m].index for a, m in pairs if len(self.chosen[a]) > 1]
        for x in self.fixed:
            proto[x].domain[0] = 1

    def hint(self, fates: Fates) -> None:
        """Suggest a fate vector to the search."""
        self.model.clear_hints()  # type: ignore[no-untyped-call]
        for literals, m in zip(self.chosen, fates, strict=True):
            if len(literals) > 1:
                for k, x in enumerate(literals):
                    self.model.add_hint(x, int(k == m))

    def read(self, value: cp_model.CpSolver | cp_model.CpSolverSolutionCallback) -> Fates:
        """Return the fate vector of a solution."""
        picked = [max(range(len(xs)), key=lambda m: value.value(xs[m])) for xs in self.chosen]
        return np.array(picked, np.int16)
