"""Plans of several recomputes a value, rounded from the linear program of `any_plan`.

The two-phase rounding of Jain et al. 2020 (Checkmate): what is held at a row to at least a threshold is held there, and
what is read without being there comes back, with all that this needs. Between two rows whatever came back stays. No
rounding fits for certain: `again` brings it down.
"""

from __future__ import annotations

from solvers.any_plan import Relaxation
from solvers.fates import Fate
from solvers.problem import OpId, Schedule, ValueId
from solvers.units import Unit, Units


def round_any(units: Units, relaxation: Relaxation, threshold: float) -> Schedule:
    """Return the schedule that holds what the relaxation holds to `threshold` or more."""
    rounding = _Rounding(units, relaxation, threshold)
    for t in range(len(units.problem.program)):
        rounding.step(t)
    return tuple(rounding.schedule)


class _Rounding:
    """A schedule in the making, and which values are there."""

    def __init__(self, units: Units, relaxation: Relaxation, threshold: float) -> None:
        self.problem, self.unit_of = units.problem, units.unit_of
        self.relaxation, self.threshold = relaxation, threshold
        self.row = {units.problem.turn: 0, **{t: i + 1 for i, t in enumerate(relaxation.rows)}}
        self.fate: dict[int, Fate] = {}  # of each unit whose values may go: how they come back
        for a, unit in enumerate(units.units):
            fate = self._choose(unit)
            if fate is not None:
                self.fate[a] = fate
        self.encodes: dict[int, list[OpId]] = {}
        self.instead: dict[int, tuple[OpId, int]] = {}  # program op -> what reads an encoding in its place, and whose
        for a, fate in self.fate.items():
            if fate.encode is not None:
                self.encodes.setdefault(fate.encode_at, []).append(fate.encode)
            for q, o in fate.instead:
                self.instead.setdefault(q, (o, a))
        self.there: set[ValueId] = set()
        self.schedule: list[OpId] = []

    def _choose(self, unit: Unit) -> Fate | None:
        """An exact codec where the relaxation encodes across the turn (it counts no noise), else a recompute."""
        codecs = [f for f in unit.fates if f.encode is not None and not f.noise_ppb and any(h.dropped for h in f.held)]
        drops = [f for f in unit.fates if f.encode is None and f.restore]
        held, encoded = self.relaxation.held, self.relaxation.encoded
        chosen = any(encoded[v][0] >= self.threshold > held[v][0] for v in unit.values if v in encoded)
        found = codecs if codecs and chosen else drops
        return min(found, key=lambda f: f.cost_ns + f.restore_ns, default=None)

    def step(self, t: int) -> None:
        """Run the program op at position t, after what brings back its operands; then forget what is not held."""
        op = self.problem.program[t]
        if t > self.problem.turn:
            other, a = self.instead.get(op, (op, -1))
            if a >= 0 and any(self.unit_of.get(v) == a and v not in self.there for v in self.problem.ops[op].reads):
                op = other
            for v in self.problem.ops[op].reads:
                self._bring(v)
        self._run(op)
        for encode in self.encodes.get(t, ()):
            self._run(encode)
        if t in self.row:
            self.there = {v for v in self.there if self._held(v, self.row[t])}

    def _run(self, o: OpId) -> None:
        self.schedule.append(o)
        self.there.update(self.problem.ops[o].writes)

    def _held(self, v: ValueId, row: int) -> bool:
        return self.unit_of.get(v) not in self.fate or self.relaxation.held[v][row] >= self.threshold

    def _gone(self, v: ValueId) -> bool:
        return v not in self.there and self.unit_of.get(v) in self.fate

    def _bring(self, v: ValueId) -> None:
        """Let a value come back, its parents first: as deep as the graph is, so no recursion."""
        pending = [v]
        while pending:
            v = pending[-1]
            if not self._gone(v):
                pending.pop()
                continue
            fate = self.fate[self.unit_of[v]]
            missing = [p for p in fate.parents if self._gone(p)]
            pending.extend(missing)
            if not missing:
                for o in fate.restore:
                    self._run(o)
                self.there.add(v)
                pending.pop()
