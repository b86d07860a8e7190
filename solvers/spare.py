"""Leave out what a schedule repeats without need: the dearest first, while it still fits the budget.

Without a repeated step the version of a value that was there before it lives on, up to the last read of the version
that the step wrote; what the step itself read may end earlier. Both change the bytes in use at a few steps only, so a
step that is left out costs two or three slices of an array and no simulation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import numpy as np

from solvers.problem import Problem, Schedule, ValueId
from solvers.search import Search
from solvers.simulate import simulate
from solvers.units import Int64

PASS_WORK = 1e-5  # of `Search.spend`, for each step of the schedule
NEVER = -(1 << 60)  # bytes in use at a step that was left out


@dataclass(slots=True, eq=False)
class _Version:
    """One write of a value: the step that writes it, the steps that read it, in order, and the versions beside it."""

    value: ValueId
    start: int
    before: _Version | None
    after: _Version | None = None
    reads: list[int] = field(default_factory=list)


def spare(search: Search, schedule: Schedule, random: Random | None = None) -> Schedule:
    """Return `schedule`, which fits, without the repeats that it can do without: the dearest first.

    With `random`, in an order in which dear ones are likely to come early: near the least peak much depends on it.
    """
    problem = search.problem
    lives = Lives(problem, schedule)
    level = np.array(simulate(problem, schedule).bytes_at, np.int64)
    weight = {t: problem.ops[schedule[t]].cost_ns * (1.0 if random is None else random.random()) for t in lives.repeats}
    repeated = sorted(weight, key=lambda t: (-weight[t], t))
    gone, before = set[int](), -1
    while len(gone) > before and search.left() > 0:
        search.spend(PASS_WORK * len(schedule))
        before = len(gone)
        for step in repeated:
            several = [step]
            while several:
                t = several.pop()
                if t not in gone and lives.leave_out(t, level):
                    gone.add(t)
                    several += lives.unread_since(t)
    return tuple(o for t, o in enumerate(schedule) if t not in gone)


def repeats(problem: Problem, schedule: Schedule) -> list[int]:
    """Return the steps that write again what is written already: without any of them it is a schedule still."""
    return list(Lives(problem, schedule).repeats)


class Lives:
    """Which steps write and read each version of each value; `repeats` write nothing but what is written already."""

    def __init__(self, problem: Problem, schedule: Schedule) -> None:
        self.problem, self.schedule = problem, schedule
        self.turn = schedule.index(problem.program[problem.turn])
        self.read: list[list[_Version]] = []
        self.written: list[list[_Version]] = []
        self.repeats: dict[int, None] = {}
        current: dict[ValueId, _Version] = {}
        for t, o in enumerate(schedule):
            op = problem.ops[o]
            self.read.append([current[v] for v in dict.fromkeys(op.reads)])
            for version in self.read[t]:
                version.reads.append(t)
            self.written.append([_Version(v, t, current.get(v)) for v in dict.fromkeys(op.writes)])
            if op.repeatable and op.writes and current.keys() >= set(op.writes):
                self.repeats[t] = None
            for version in self.written[t]:
                if version.before is not None:
                    version.before.after = version
                current[version.value] = version

    def unread_since(self, step: int) -> list[int]:
        """Return the repeats of whose writes nothing is read any more since a step is left out."""
        written = (x.start for x in self.read[step])
        return [t for t in written if t in self.repeats and not any(x.reads for x in self.written[t])]

    def leave_out(self, step: int, level: Int64) -> bool:
        """Leave out a repeat, and say so in `level`; change nothing and return False if that goes over the budget."""
        reads = {x: [t for t in x.reads if t != step] for x in self.read[step]}
        last, changes = dict[_Version, bool](), list[tuple[int, int, int]]()
        for version in self.written[step]:
            heir = _heir(version)
            reads[heir] = reads.get(heir, heir.reads) + version.reads
            last[heir] = version.after is None
            changes.append((version.start, self._end(version), -self._size(version)))
        for x, then in reads.items():
            end, later = self._end(x), self._end(x, then, last.get(x, False))
            changes.append((end, later, self._size(x)) if later > end else (later, end, -self._size(x)))
        if not self._change(level, step, changes):
            return False
        for x, then in reads.items():
            x.reads = then
        for version in self.written[step]:
            self._replace(version, _heir(version))
        return True

    def _size(self, version: _Version) -> int:
        return self.problem.value_bytes[version.value]

    def _end(self, version: _Version, reads: list[int] | None = None, last: bool = False) -> int:
        """Return the step after its last in memory, if `reads` read it, and if it is the last of its value."""
        reads = version.reads if reads is None else reads
        if (last or version.after is None) and version.value in self.problem.keep:
            return len(self.schedule)
        if not reads:
            return version.start + 1
        late, taken = version.start >= self.turn, self.problem.ops[self.schedule[reads[-1]]].takes_over
        # What was written before the turn is not written over after it.
        return reads[-1] + (taken != version.value or late != (reads[-1] > self.turn))

    def _change(self, level: Int64, step: int, changes: list[tuple[int, int, int]]) -> bool:
        """Add to the bytes in use between steps, those of `step` left out; undo it if that goes over the budget."""
        before, budget = level[step], self.problem.budget_bytes
        level[step] = NEVER
        for first, end, size in changes:
            level[first:end] += size
        if all(size <= 0 or level[first:end].max(initial=0) <= budget for first, end, size in changes):
            return True
        for first, end, size in changes:
            level[first:end] -= size
        level[step] = before
        return False

    def _replace(self, version: _Version, heir: _Version) -> None:
        """Let the version before live on in the place of one that is no longer written."""
        heir.after = version.after
        if version.after is not None:
            version.after.before = heir
        for t in version.reads:
            self.read[t] = [heir if x is version else x for x in self.read[t]]


def _heir(version: _Version) -> _Version:
    assert version.before is not None
    return version.before
