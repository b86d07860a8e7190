"""Why a plan does not fit: a small set of fates that alone reach the bytes seen. Exact, so a valid cut.

The epoch rows see the moments at which program ops run. What happens between them (restores, encodes) is exact only in
`simulate`; when that refuses a plan which the rows allow, the cut found here excludes the reason.
"""

from __future__ import annotations

from solvers.epochs import Cut
from solvers.evaluate import Fates, restore_times, to_schedule
from solvers.problem import OpId, ValueId
from solvers.simulate import Usage, live_at
from solvers.units import Units, rewrites


def explain(units: Units, fates: Fates, usage: Usage, above_bytes: int) -> Cut:
    """Return fates that together hold more than `above_bytes` at the peak of the plan `fates`."""
    schedule = to_schedule(units, fates)
    reason = _Reason(units, fates)
    step = usage.peak_step
    position, needed = reason.place(schedule, step)
    parts = reason.parts(live_at(units.problem, schedule, step), position)
    reached = usage.peak_bytes - sum(size for size, _ in parts)
    parts = [(size, because) for size, because in parts if because]
    # Few reasons first, then many bytes: what one fate alone holds makes the strongest cut.
    for size, because in sorted(parts, key=lambda p: (len(p[1] - needed), -p[0])):
        if reached > above_bytes:
            break
        reached += size
        needed = needed | because
    if reached <= above_bytes:
        needed, reached = frozenset(range(len(units.units))), usage.peak_bytes
    return tuple((a, int(fates[a])) for a in sorted(needed) if len(units.units[a].fates) > 1), reached


class _Reason:
    """Which units' fates fix when things happen under one fate vector."""

    def __init__(self, units: Units, fates: Fates) -> None:
        self.units, self.fates = units, fates
        self.times = restore_times(units, fates)
        self.readers: dict[ValueId, set[int]] = {}
        for a, unit in enumerate(units.units):
            for fate in unit.fates:
                for v in fate.parents:
                    self.readers.setdefault(v, set()).add(a)
        self.encoding = {e: a for a, u in enumerate(units.units) for e in u.fates[fates[a]].encoded}

    def timing(self, a: int) -> frozenset[int]:
        """The units whose fates fix when unit a is restored: itself, its readers, and so on."""
        seen: set[int] = set()
        todo = [a]
        while todo:
            u = todo.pop()
            if u in seen:
                continue
            seen.add(u)
            if u == a or self.times[u] < len(self.units.problem.program):
                todo.extend(c for v in self.units.units[u].values for c in self.readers.get(v, ()))
        return frozenset(seen)

    def place(self, schedule: tuple[OpId, ...], step: int) -> tuple[int, frozenset[int]]:
        """The program position a step belongs to or precedes, and the units that put it there."""
        problem, passed = self.units.problem, -1
        for s in range(step + 1):
            due = problem.program[passed + 1] if passed + 1 < len(problem.program) else None
            if due is not None and due in (schedule[s], problem.ops[schedule[s]].instead_of):
                passed += 1
            elif s == step:
                return self._inserted(schedule[step], passed)
        op = problem.program[passed]
        wants = (a for a, u in enumerate(self.units.units) if any(q == op for q, _ in u.fates[self.fates[a]].instead))
        return passed, frozenset(wants) if schedule[step] != op else frozenset()

    def _inserted(self, op: OpId, passed: int) -> tuple[int, frozenset[int]]:
        for a, unit in enumerate(self.units.units):
            fate = unit.fates[self.fates[a]]
            if fate.encode == op and passed <= self.units.problem.turn:
                return passed + 1, frozenset({a})
            if op in fate.restore and self.times[a] == passed + 1:
                return passed + 1, self.timing(a)
        raise AssertionError(f"op {op} belongs to no unit")

    def parts(self, live: tuple[ValueId, ...], position: int) -> list[tuple[int, frozenset[int]]]:
        """(bytes, units whose fates make them live) for each live value that a decision put there."""
        size, found = self.units.problem.value_bytes, []
        for v in live:
            if v in self.encoding:
                a = self.encoding[v]
                fate = self.units.units[a].fates[self.fates[a]]
                fixed = position <= fate.encoded_until or not fate.decodes
                found.append((size[v], frozenset({a}) if fixed else self.timing(a)))
            elif v in self.units.soft:
                a, h = self.units.soft[v]
                if position > h.last_forward:
                    found.append((size[v], self._unless_rewritten(a, v)))
            elif v in self.units.unit_of:
                part = self._part(v, position)
                if part is not None:
                    found.append((size[v], part))
        return found

    def _unless_rewritten(self, a: int, v: ValueId) -> frozenset[int]:
        """Unit a's fate holds v, unless its restore writes v again (no units: do not count on v)."""
        again = v in rewrites(self.units.problem, self.units.units[a].fates[self.fates[a]])
        return frozenset() if again else frozenset({a})

    def _part(self, v: ValueId, position: int) -> frozenset[int] | None:
        a = self.units.unit_of[v]
        fate = self.units.units[a].fates[self.fates[a]]
        held = next(h for h in fate.held if h.value == v)
        if position <= held.last_forward:
            return None
        if not held.dropped and not self._unless_rewritten(a, v):
            return frozenset()
        if position <= held.last_backward and (not held.dropped or fate.first_read < position):
            return frozenset({a})
        if not held.dropped:
            # Kept for its readers: their times count, not its own.
            return frozenset({a}).union(*(self.timing(c) for c in self.readers.get(v, ())))
        return self.timing(a).union(*(self.timing(c) for c in self.readers.get(v, ())))
