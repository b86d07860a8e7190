"""Leave out what a schedule repeats without need: the dearest first, while it still fits the budget.

Without a repeated step the version of a value that was there before it lives on, up to the last read of the version
that the step wrote. What that takes is added to the bytes in use; what it frees (the step's own reads, its workspace)
is not counted before the next pass, so that a pass costs one simulation and never allows what does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.problem import OpId, Problem, Schedule, ValueId
from solvers.search import Search
from solvers.simulate import simulate, take_overs
from solvers.units import Int64

PASS_WORK = 2e-5  # of `Search.spend`, for each step of the schedule


@dataclass(slots=True)
class _Version:
    """One write of a value: in memory from step `start` to `end`, read until `read`, which takes it over if later."""

    before: _Version | None
    start: int
    end: int
    read: int
    gone: bool = False

    def heir(self) -> _Version:
        """Return the version that stays and lives on in the place of this one."""
        found = self.before
        while found is not None and found.gone:
            found = found.before
        assert found is not None
        return found


def spare(search: Search, schedule: Schedule) -> Schedule:
    """Return `schedule`, which fits, without the repeats that it can do without."""
    while search.left() > 0:
        search.spend(PASS_WORK * len(schedule))
        gone = _needless(search.problem, schedule)
        if not gone:
            break
        schedule = tuple(o for t, o in enumerate(schedule) if t not in gone)
    return schedule


def repeats(problem: Problem, schedule: Schedule) -> list[int]:
    """Return the steps that write again what is written already: without any of them it is a schedule still."""
    return _repeated(problem, schedule, _versions(problem, schedule))


def _needless(problem: Problem, schedule: Schedule) -> set[int]:
    """Return repeated steps that may all be left out."""
    level = np.array(simulate(problem, schedule).bytes_at, np.int64)
    written = _versions(problem, schedule)
    repeated = _repeated(problem, schedule, written)
    gone = set()
    for t in sorted(repeated, key=lambda t: (-problem.ops[schedule[t]].cost_ns, t)):
        if _extend(problem, level, written[t]):
            gone.add(t)
    return gone


def _repeated(problem: Problem, schedule: Schedule, written: list[dict[ValueId, _Version]]) -> list[int]:
    def again(o: OpId, versions: dict[ValueId, _Version]) -> bool:
        return problem.ops[o].repeatable and bool(versions) and all(v.before is not None for v in versions.values())

    return [t for t, o in enumerate(schedule) if again(o, written[t])]


def _extend(problem: Problem, level: Int64, versions: dict[ValueId, _Version]) -> bool:
    """Let the versions before these live on in their place; change nothing and return False if that does not fit."""
    added = []
    for value, version in versions.items():
        if version.read > version.start:
            added.append((version.heir().end + 1, version.start, problem.value_bytes[value]))
            # What was written before the turn is not written over after it.
            added.append((version.end + 1, version.read + 1, problem.value_bytes[value]))
    for first, last, size in added:
        level[first:last] += size
    if any(level[first:last].max(initial=0) > problem.budget_bytes for first, last, _ in added):
        for first, last, size in added:
            level[first:last] -= size
        return False
    for version in versions.values():
        version.gone, heir = True, version.heir()
        if version.read > version.start:
            heir.read = heir.end = version.read
    return True


def _versions(problem: Problem, schedule: Schedule) -> list[dict[ValueId, _Version]]:
    """Return the versions that each step writes."""
    taken = take_overs(problem.ops, schedule, problem.program[problem.turn], problem.keep)
    current: dict[ValueId, _Version] = {}
    written: list[dict[ValueId, _Version]] = []
    for t, o in enumerate(schedule):
        for v in problem.ops[o].reads:
            current[v].read, current[v].end = t, t - 1 if taken.get(t) == v else t
        written.append({v: _Version(current.get(v), t, t, t) for v in problem.ops[o].writes})
        current.update(written[t])
    for v in problem.keep:
        current[v].read = current[v].end = len(schedule) - 1
    return written
