"""One fate a unit -> times, cost, memory profile, schedule.

Restores happen as late as possible: right before the first program op, or the first other restore, that reads what
they bring back. One sweep over the units in reverse topological order finds every time. `profiles` does it for many
fate vectors at once and is slightly pessimistic (it never reports less than `simulate` would); `to_schedule` is exact,
and `simulate` judges it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.fates import Fate
from solvers.problem import Schedule, ValueId
from solvers.simulate import Usage, simulate
from solvers.units import Int64, Units

Fates = NDArray[np.int16]  # (unit,) or (plan, unit): index into Unit.fates
CLASH_NS = 1 << 50  # added to the cost of a fate vector that asks two alternatives for one op


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
        ValueError: two chosen fates each want an alternative of their own for the same op.
    """
    problem = units.problem
    before: dict[int, list[tuple[int, int]]] = {}
    after: dict[int, list[int]] = {}
    instead: dict[int, int] = {}
    for a, t in enumerate(restore_times(units, fates)):
        fate = units.units[a].fates[fates[a]]
        if t < len(problem.program):
            before.setdefault(t, []).extend((a, o) for o in fate.restore)
        if fate.encode is not None:
            after.setdefault(fate.encode_at, []).append(fate.encode)
        for q, alternative in fate.instead:
            if instead.get(q, alternative) != alternative:
                raise ValueError(f"op {q} {problem.ops[q].name!r} has two alternatives chosen")
            instead[q] = alternative
    schedule: list[int] = []
    for t, q in enumerate(problem.program):
        schedule.extend(o for _, o in sorted(before.get(t, []), key=lambda pair: pair[0]))
        schedule.append(instead.get(q, q))
        schedule.extend(sorted(after.get(t, [])))
    return tuple(schedule)


def fates_of(units: Units, schedule: Schedule) -> Fates | None:
    """Return the fate vector that means `schedule`; None when no vector does."""
    ran = set(schedule)
    turn = schedule.index(units.problem.program[units.problem.turn])
    again = set(schedule[turn + 1 :])
    fates = keep_everything(units)
    for a, unit in enumerate(units.units):
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
        area = np.maximum(self.bytes_at - budget_bytes, 0).sum(axis=0, dtype=np.float64)
        return np.where(self.refused, np.inf, area)


def profiles(units: Units, fates: Fates) -> Profiles:
    """Evaluate the (plan, unit) matrix `fates`, all plans in one sweep."""
    sweep = _Sweep(units, len(fates))
    alike = (fates == fates[:1]).all(axis=0)
    for a in reversed(range(len(units.units))):
        own = units.units[a].fates
        if alike[a] and sweep.alike(own[fates[0, a]]):
            sweep.add_to_all(own[fates[0, a]])
            continue
        column = fates[:, a]
        for m in np.unique(column):
            sweep.add(own[m], np.flatnonzero(column == m))
    for group in units.clashes:
        chosen = np.zeros(len(fates), np.int64)
        for a, m in group:
            chosen += fates[:, a] == m
        sweep.cost += CLASH_NS * np.maximum(chosen - 1, 0)
    return sweep.finish()


class _Sweep:
    """The state of one reverse sweep; columns are plans.

    Plans that are compared mostly differ in a unit each. What is the same in all of them is counted once, in plain
    numbers (`all_*`), and `need` and `last` of a value are one number until its plans differ.
    """

    def __init__(self, units: Units, plans: int) -> None:
        self.units, self.n = units, len(units.problem.program)
        self.plans = plans
        self.slot = {v: i for i, v in enumerate(units.unit_of)}
        self.need: list[int | Int64] = [self.n] * len(self.slot)  # first restore that reads each value
        self.last: list[int | Int64] = [-1] * len(self.slot)  # last restore that reads each value
        self.differ: set[int] = set()  # slots whose plans differ
        self.all_delta, self.delta = [0] * (self.n + 2), np.zeros((self.n + 2, plans), np.int64)
        # Restore transients before a position, encode transients after it.
        self.all_burst, self.burst = [0] * (self.n + 1), np.zeros((self.n + 1, plans), np.int64)
        self.all_encode, self.encode = [0] * self.n, np.zeros((self.n, plans), np.int64)
        self.cost = np.full(plans, units.program_cost_ns, np.int64)
        self.noise = np.zeros(plans, np.int64)

    def alike(self, fate: Fate) -> bool:
        """Return whether restores ask for the fate's values at the same times in all plans."""
        return not self.differ or self.differ.isdisjoint(self.slot[h.value] for h in fate.held)

    def add_to_all(self, fate: Fate) -> None:
        """Account for one unit to which all plans give `fate`, and which is `alike`; its readers came before."""
        time = self.n
        if fate.restore:
            asked = (self.need[self.slot[h.value]] for h in fate.held if h.dropped)
            time = min((int(t) for t in asked), default=self.n)
            time = min(time, fate.first_read)
        for h in fate.held:
            end = max(int(self.last[self.slot[h.value]]), h.last_backward)
            start = time if h.dropped else h.last_forward + 1
            self._live_in_all(h.size_bytes, start, max(end, start - (0 if h.dropped else 1)))
        if fate.restore:
            self._restore_in_all(fate, time)
        if fate.encode is not None:
            end = max(fate.encoded_until, fate.encode_at + 1)
            if fate.decodes and time < self.n:
                end = max(end, time)
            self._live_in_all(fate.encoded_bytes, fate.encode_at + 1, end)
            self.all_encode[fate.encode_at] += self._encoding_bytes(fate)
        for position, more in fate.swaps:
            self._live_in_all(more, position, position)
        self.cost += fate.cost_ns
        self.noise += fate.noise_ppb

    def _restore_in_all(self, fate: Fate, time: int) -> None:
        self.all_burst[time] = max(self.all_burst[time], fate.transient_bytes, 1)
        reads = -1
        if time < self.n:
            self.cost += fate.restore_ns
            reads = time
        for v in fate.parents:
            i = self.slot.get(v)
            if i is None:
                continue
            need, last = self.need[i], self.last[i]
            self.need[i] = min(need, time) if isinstance(need, int) else np.minimum(need, time)
            self.last[i] = max(last, reads) if isinstance(last, int) else np.maximum(last, reads)

    def _live_in_all(self, size: int, start: int, end: int) -> None:
        self.all_delta[start] += size
        self.all_delta[end + 1] -= size

    def _encoding_bytes(self, fate: Fate) -> int:
        assert fate.encode is not None
        return fate.encoded_bytes + self.units.problem.ops[fate.encode].workspace_bytes

    def add(self, fate: Fate, rows: Int64) -> None:
        """Account for one unit in the plans `rows`, all of which give it `fate`; its readers came before."""
        time = np.full(len(rows), fate.first_read if fate.restore else self.n)
        if fate.restore:
            for h in fate.held:
                if h.dropped:
                    time = np.minimum(time, _of(self.need[self.slot[h.value]], rows))
        for h in fate.held:
            # A fate without a dropped value has no restore; a kept one stays as under keep.
            end = np.maximum(_of(self.last[self.slot[h.value]], rows), h.last_backward)
            start = time if h.dropped else np.full(len(rows), h.last_forward + 1)
            self._live(h.size_bytes, start, np.maximum(end, start - (0 if h.dropped else 1)), rows)
        if fate.restore:
            self._restore(fate, time, rows)
        if fate.encode is not None:
            self._encoded(fate, time, rows)
        for position, more in fate.swaps:
            self.delta[position, rows] += more
            self.delta[position + 1, rows] -= more
        if fate.cost_ns:
            self.cost[rows] += fate.cost_ns
        if fate.noise_ppb:
            self.noise[rows] += fate.noise_ppb

    def _restore(self, fate: Fate, time: Int64, rows: Int64) -> None:
        restored = time < self.n
        self.cost[rows] += fate.restore_ns * restored
        self.burst[time, rows] = np.maximum(self.burst[time, rows], max(fate.transient_bytes, 1))
        reads = np.where(restored, time, -1)
        for v in fate.parents:
            i = self.slot.get(v)
            if i is None:
                continue
            need, last = self._each(i)
            need[rows] = np.minimum(need[rows], time)
            last[rows] = np.maximum(last[rows], reads)

    def _each(self, i: int) -> tuple[Int64, Int64]:
        """Return `need` and `last` of slot `i` with a number for every plan."""
        if i not in self.differ:
            self.differ.add(i)
            self.need[i], self.last[i] = np.full(self.plans, self.need[i]), np.full(self.plans, self.last[i])
        need, last = self.need[i], self.last[i]
        assert not isinstance(need, int)
        assert not isinstance(last, int)
        return need, last

    def _encoded(self, fate: Fate, time: Int64, rows: Int64) -> None:
        start = np.full(len(rows), fate.encode_at + 1)
        end = np.full(len(rows), max(fate.encoded_until, fate.encode_at + 1))
        if fate.decodes:
            end = np.maximum(end, np.where(time < self.n, time, -1))
        self._live(fate.encoded_bytes, start, end, rows)
        self.encode[fate.encode_at, rows] += self._encoding_bytes(fate)

    def _live(self, size: int, start: Int64, end: Int64, rows: Int64) -> None:
        self.delta[start, rows] += size
        self.delta[end + 1, rows] -= size

    def finish(self) -> Profiles:
        level = np.cumsum(self.delta[: self.n], axis=0)
        level += (np.cumsum(self.all_delta[: self.n]) + self.units.base_bytes)[:, None]
        burst = self._merged(self.burst, self.all_burst, np.maximum)
        encode = self._merged(self.encode, self.all_encode, np.add)
        transients = ((*burst, self.units.own_bytes), (*encode, self.units.workspace_bytes))
        reached = [(t, np.where(more > 0, level[t] - without[t, None] + more, 0)) for t, more, without in transients]
        for t, found in reached:
            level[t] = np.maximum(level[t], found)
        refused = (self.noise > self.units.problem.noise_limit_ppb) | (self.cost >= CLASH_NS)
        return Profiles(self.cost, level, refused)

    def _merged(self, each: Int64, alike: list[int], merge: np.ufunc) -> tuple[Int64, Int64]:
        """Return the positions with transients, and the transients there in every plan."""
        both = np.array(alike[: self.n])
        found = np.flatnonzero(each[: self.n].any(axis=1) | (both > 0))
        return found, merge(each[found], both[found, None])


def _of(each: int | Int64, rows: Int64) -> int | Int64:
    """Return a number for each plan of `rows`, or the one for all."""
    return each if isinstance(each, int) else each[rows]


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
