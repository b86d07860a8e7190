"""What moves would make of a plan, without a sweep over everything for each: only what a move changes is found again.

A unit is *touched* when a move gives it another fate, or when a restore that reads its values begins or ends to be
there or moves. Touched units are found in reverse topological order, so that whoever reads one was found before it.
What they hold otherwise shifts the bytes in use between a few positions, by the same at each of them, unless a restore
or an encode at the position changes, too: such positions are found again one by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from solvers.sweep import clashing, compiled, fill, noise_of, place
from solvers.tables import CLASH_NS, Int64, Records, Tables

Bools = NDArray[np.bool_]
# Arguments as numbers of one type: of a literal, which has a type of its own, Numba compiles the function once more.
ZERO: Any = np.int64(0)
MORE: Any = np.int64(1)
LESS: Any = np.int64(-1)


@compiled
def outcomes(  # noqa: C901  in one piece, as `place` is
    t: Tables, fates: Int64, some: Int64, budget: int
) -> tuple[Int64, NDArray[np.float64], Int64]:
    """Return for each of `some` moves (move, change, 2: unit and fate) the cost, area above the budget and peak."""
    first_fate, fate, held, swap, slot, reader = t.first_fate, t.fate, t.held, t.swap, t.slot, t.reader
    parent, position, n, units = t.parent, t.position, len(t.position), len(fates)
    cost, area, peak = np.empty(len(some), np.int64), np.empty(len(some)), np.empty(len(some), np.int64)
    time0, last0 = np.empty(units, np.int64), np.empty(len(slot), np.int64)
    delta, burst0, coding = np.empty(n + 2, np.int64), np.empty(n + 1, np.int64), np.empty(n + 1, np.int64)
    plain, level = np.empty(n, np.int64), np.empty(n, np.int64)
    cost0, noise0 = place(t, fates, time0, last0, delta, burst0, coding), noise_of(t, fates)
    fill(position, delta, burst0, coding, plain, level)
    delta[:] = 0
    plan, time, burst, last = fates.copy(), time0.copy(), burst0.copy(), last0.copy()
    touched, moved = np.zeros(units, np.bool_), np.zeros(n + 2, np.bool_)
    order, marks = np.empty(units, np.int64), np.empty(4 * len(held) + 4 * len(swap) + 10 * units, np.int64)
    for k in range(len(some)):
        noise, changed, newest = noise0, 0, 0
        for c in range(some.shape[1]):
            a, f = some[k, c, 0], first_fate[some[k, c, 0]] + some[k, c, 1]
            noise += fate[f].noise_ppb - fate[first_fate[a] + plan[a]].noise_ppb
            plan[a], touched[a], newest = some[k, c, 1], True, max(newest, a)
        cost[k], count, moves = cost0, ZERO, False
        for a in range(newest, -1, -1):
            if not touched[a]:
                continue
            order[changed] = a
            changed += 1
            f0, f = first_fate[a] + fates[a], first_fate[a] + plan[a]
            time[a] = _restored_at(first_fate, fate, held, slot, reader, f, plan, time, n, last)
            cost[k] += fate[f].cost_ns - fate[f0].cost_ns
            cost[k] += fate[f].restore_ns if fate[f].restores and time[a] < n else 0
            cost[k] -= fate[f0].restore_ns if fate[f0].restores and time0[a] < n else 0
            count = _hold(fate, held, swap, f0, time0[a], n, last0, LESS, delta, coding, marks, count, moved)
            count = _hold(fate, held, swap, f, time[a], n, last, MORE, delta, coding, marks, count, moved)
            if f != f0 or time[a] != time0[a]:
                moves = True
                for when in (time0[a], time[a]):
                    moved[when], burst[when] = True, 0
                    marks[count], marks[count + 1], count = when, when + 1, count + 2
                for g in (f0, f):
                    for p in range(fate[g].parent, fate[g + 1].parent):
                        touched[slot[parent[p]].unit] = True
        if moves:
            _restore_again(first_fate, fate, plan, time, moved, burst, n)
        clashes = clashing(t, plan)
        cost[k] += CLASH_NS * clashes
        _sort(marks, count)
        above, peak[k] = _shifted(position, plain, level, delta, burst, coding, moved, marks[:count], budget)
        area[k] = np.inf if clashes > 0 or noise > t.noise_limit_ppb else above
        for c in range(changed):
            a = order[c]
            _code(fate, first_fate[a] + plan[a], LESS, coding)
            _code(fate, first_fate[a] + fates[a], MORE, coding)
            burst[time[a]], burst[time0[a]] = burst0[time[a]], burst0[time0[a]]
            plan[a], time[a], touched[a] = fates[a], time0[a], False
        for i in marks[:count]:
            delta[i], moved[i] = 0, False
    return cost, area, peak


@compiled
def _restored_at(
    first_fate: Int64,
    fate: Records,
    held: Records,
    slot: Records,
    reader: Records,
    f: int,
    plan: Int64,
    time: Int64,
    never: int,
    last: Int64,
) -> int:
    """Return when a unit is restored under fate f, and write the last restore that reads each of its slots."""
    found = fate[f].first_read
    for h in range(fate[f].held, fate[f + 1].held):
        s = held[h].slot
        last[s] = -1
        for r in range(slot[s].reader, slot[s + 1].reader):
            u = reader[r].unit
            if time[u] < never and first_fate[u] + plan[u] == reader[r].fate:
                last[s] = max(last[s], time[u])
                if fate[f].restores and held[h].dropped:
                    found = min(found, time[u])
    return found  # type: ignore[no-any-return]


@compiled
def _hold(
    fate: Records,
    held: Records,
    swap: Records,
    f: int,
    time: int,
    never: int,
    last: Int64,
    sign: int,
    delta: Int64,
    coding: Int64,
    marks: Int64,
    count: int,
    moved: Bools,
) -> int:
    """Add what a unit under fate f holds, or take it away (sign -1); return how many positions `marks` has now."""
    for h in range(fate[f].held, fate[f + 1].held):
        start = time if held[h].dropped else held[h].forward + 1
        end = max(last[held[h].slot], held[h].backward, start - 1 + held[h].dropped) + 1
        delta[start] += sign * held[h].bytes
        delta[end] -= sign * held[h].bytes
        marks[count], marks[count + 1], count = start, end, count + 2
    if fate[f].encode_at >= 0:
        start = fate[f].encode_at + 1
        end = max(fate[f].encoded_until, start, time if fate[f].decodes and time < never else -1) + 1
        delta[start] += sign * fate[f].encoded
        delta[end] -= sign * fate[f].encoded
        _code(fate, f, sign, coding)
        moved[start - 1] = True
        marks[count], marks[count + 1], marks[count + 2], count = start - 1, start, end, count + 3
    for w in range(fate[f].swap, fate[f + 1].swap):
        delta[swap[w].at] += sign * swap[w].bytes
        delta[swap[w].at + 1] -= sign * swap[w].bytes
        marks[count], marks[count + 1], count = swap[w].at, swap[w].at + 1, count + 2
    return count


@compiled
def _code(fate: Records, f: int, sign: int, coding: Int64) -> None:
    """Add what an encode under fate f takes, or take it away."""
    if fate[f].encode_at >= 0:
        coding[fate[f].encode_at] += sign * fate[f].encoding


@compiled
def _restore_again(
    first_fate: Int64, fate: Records, plan: Int64, time: Int64, moved: Bools, burst: Int64, never: int
) -> None:
    """Find the largest restore again at the positions where restores moved."""
    for a in range(len(plan)):
        if moved[time[a]] and time[a] < never:
            f = first_fate[a] + plan[a]
            burst[time[a]] = max(burst[time[a]], fate[f].transient if fate[f].restores else 0)


@compiled
def _sort(marks: Int64, count: int) -> None:
    """Sort the first few numbers in place (Shell's way; Numba takes 2 s to compile numpy's)."""
    for gap in (132, 57, 23, 10, 4, 1):
        for i in range(gap, count):
            mark, at = marks[i], i
            while at >= gap and marks[at - gap] > mark:
                marks[at] = marks[at - gap]
                at -= gap
            marks[at] = mark


@compiled
def _between(level: Int64, begin: int, end: int, budget: int) -> tuple[int, int]:
    """Return the area above a budget and the peak of some positions. A loop so plain that it runs on vectors."""
    above, top, part = 0, 0, level[begin:end]
    for i in range(len(part)):  # numba makes no vectors of `for x in part`, nor of indices that may be negative
        above += max(part[i] - budget, 0)
        top = max(top, part[i])
    return above, top


@compiled
def _shifted(
    position: Records,
    plain: Int64,
    level: Int64,
    delta: Int64,
    burst: Int64,
    coding: Int64,
    moved: Bools,
    marks: Int64,
    budget: int,
) -> tuple[int, int]:
    """Return the area above the budget and the peak, the bytes in use shifted by `delta` between the marks."""
    n = len(level)
    above, top, shift, begin = 0, 0, 0, ZERO
    for m in range(len(marks) + 1):
        end = min(marks[m], n) if m < len(marks) else n
        if m and end < n and end == marks[m - 1]:
            continue
        area, peak = _between(level, begin, end, budget - shift)
        above, top = above + area, max(top, peak + shift)
        begin = end
        if end == n:
            break
        shift += delta[end]
        if moved[end]:
            now = plain[end] + shift
            restoring = now - position[end].own + burst[end] if burst[end] > 0 else now
            encoding = now - position[end].workspace + coding[end] if coding[end] > 0 else now
            now = max(now, restoring, encoding)
            above, top, begin = above + max(now - budget, 0), max(top, now), end + 1
    return above, top
