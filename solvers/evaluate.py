"""One fate a unit -> times, cost, memory profile, schedule.

Restores happen as late as possible: right before the first program op, or the first other restore, that reads what
they bring back. One sweep over the units in reverse topological order finds every time. `profiles` does it in compiled
code (`sweep`) and is slightly pessimistic (it never reports less than `simulate` would); `to_schedule` is exact,
and `simulate` judges it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.fates import Fate
from solvers.problem import Schedule, ValueId
from solvers.simulate import Usage, simulate
from solvers.units import Int64, Units

Fates = NDArray[np.int16]  # (unit,) or (plan, unit): index into Unit.fates


def keep_everything(units: Units) -> Fates:
    """Return the fate vector that keeps every value the backward reads.

    A helper (no backward read) is set to drop: nobody asks for it, so nothing is paid, and when another
    unit is dropped later, keeping the helper for it is a choice and not the default.
    """
    never = len(units.problem.program)
    helper = [len(u.fates) > 1 and u.fates[1].name == "drop" and u.fates[1].first_read == never for u in units.units]
    return np.array(helper, np.int16)


def restore_times(units: Units, fates: Fates) -> list[int]:
    """Return for each unit the program position right before which it is restored; len(program) if never."""
    never = len(units.problem.program)
    need = [never] * len(units.units)
    for a in reversed(range(len(units.units))):
        fate = units.units[a].fates[fates[a]]
        # A demand reaches a unit only through a value that its fate dropped.
        need[a] = min(need[a], fate.first_read) if fate.restore else never
        if need[a] < never:
            _demand(units, fates, fate, need, need[a])
    return need


def _demand(units: Units, fates: Fates, fate: Fate, need: list[int], time: int) -> None:
    for v in fate.parents:
        p = units.unit_of.get(v)
        if p is not None and v in _dropped(units, p, int(fates[p])):
            need[p] = min(need[p], time)


def _dropped(units: Units, a: int, m: int) -> tuple[ValueId, ...]:
    return tuple(h.value for h in units.units[a].fates[m].held if h.dropped)


def to_schedule(units: Units, fates: Fates) -> Schedule:
    """Return the schedule that a fate vector means.

    Encodes follow the last forward read of what they encode; restores stand right before the op that needs
    them, in program order among themselves; alternatives stand in the place of the ops they replace.

    Raises:
        ValueError: two chosen fates each want an alternative of their own for the same op, and no joint one stands.
    """
    problem = units.problem
    before: dict[int, list[tuple[int, int]]] = {}
    after: dict[int, list[int]] = {}
    wanted: dict[int, set[int]] = {}
    for a, t in enumerate(restore_times(units, fates)):
        fate = units.units[a].fates[fates[a]]
        if t < len(problem.program):
            before.setdefault(t, []).extend((a, o) for o in fate.restore)
        if fate.encode is not None:
            after.setdefault(fate.encode_at, []).append(fate.encode)
        for q, alternative in fate.instead:
            wanted.setdefault(q, set()).add(alternative)
    instead: dict[int, int] = {}
    for q, several in wanted.items():
        found = units.joint.get(frozenset(several)) if len(several) > 1 else min(several)
        if found is None:
            raise ValueError(f"op {q} {problem.ops[q].name!r} has two alternatives chosen")
        instead[q] = found
    schedule: list[int] = []
    for t, q in enumerate(problem.program):
        schedule.extend(o for _, o in sorted(before.get(t, []), key=lambda pair: pair[0]))
        schedule.append(instead.get(q, q))
        schedule.extend(sorted(after.get(t, [])))
    return tuple(schedule)


def fates_of(units: Units, schedule: Schedule) -> Fates | None:
    """Return the fate vector that means `schedule`; None when no vector does."""
    parts = {o: some for some, o in units.joint.items()}
    ran = {part for o in schedule for part in (o, *parts.get(o, ()))}
    turn = schedule.index(units.problem.program[units.problem.turn])
    again = set(schedule[turn + 1 :])
    fates = keep_everything(units)
    for a, unit in enumerate(units.units):
        # A helper that is not restored is there for those that read it, or nobody asked for it.
        if not again.issuperset(unit.fates[fates[a]].restore):
            fates[a] = 0
        for m, fate in enumerate(unit.fates):
            asked = [o for o in (fate.encode, *(o for _, o in fate.instead)) if o is not None]
            # The longest description wins: a codec with a restore before one without.
            if (asked or fate.restore) and ran.issuperset(asked) and again.issuperset(fate.restore):
                fates[a] = m
    try:
        return fates if to_schedule(units, fates) == schedule else None
    except ValueError:
        return None


def allowed(units: Units, fates: Fates) -> Fates:
    """Return `fates` with units kept instead until it is not refused: of those that clash, then the noisiest."""
    fates = fates.copy()
    for group in units.clashes:
        for a, _ in [(a, m) for a, m in group if fates[a] == m][1:]:
            fates[a] = 0
    noise = np.array([u.fates[m].noise_ppb for u, m in zip(units.units, fates, strict=True)], np.int64)
    total = int(noise.sum())
    for a in np.argsort(-noise, kind="stable"):
        if total <= units.problem.noise_limit_ppb:
            break
        fates[a], total = 0, total - int(noise[a])
    return fates


def exact(units: Units, fates: Fates) -> Usage:
    """Return what `simulate` says about the schedule of a fate vector."""
    return simulate(units.problem, to_schedule(units, fates))


@dataclass(frozen=True, slots=True)
class Profiles:
    """Cost of each plan, and bytes in use at each program position, restores before it included."""

    cost_ns: Int64  # (plan,)
    bytes_at: Int64  # (position, plan)
    refused: NDArray[np.bool_]  # (plan,): more noise than the problem allows, or two alternatives for one op

    def peak_bytes(self) -> Int64:
        """Return the peak of each plan."""
        return np.asarray(self.bytes_at.max(axis=0), np.int64)

    def excess(self, budget_bytes: float) -> NDArray[np.float64]:
        """Return the area above the budget of each plan: bytes times positions; infinite if it is refused."""
        area = np.maximum(self.bytes_at - math.floor(budget_bytes), 0).sum(axis=0, dtype=np.float64)
        return np.where(self.refused, np.inf, area)


def profiles(units: Units, fates: Fates) -> Profiles:
    """Evaluate the (plan, unit) matrix `fates`."""
    from solvers.sweep import levels  # Numba takes a second to import, and not everybody who imports us solves

    cost, level, refused = levels(units.tables, np.ascontiguousarray(fates, np.int64))
    return Profiles(cost, level.T, refused)


def peaks(level: np.ndarray[tuple[int], np.dtype[np.int64]], count: int) -> list[int]:
    """Return the `count` highest positions of a profile, none close to another."""
    level, found = level.astype(np.int64).copy(), list[int]()
    apart = max(1, len(level) // 200)
    for _ in range(count):
        t = int(np.argmax(level))
        if level[t] < 0:
            break
        found.append(t)
        level[max(0, t - apart) : t + apart + 1] = -1
    return found
