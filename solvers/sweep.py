"""The evaluator's loops, compiled by Numba at their first call and kept on disk after it.

One sweep over the units in reverse topological order finds when each restore happens, and with it what a plan costs
and how many bytes are in use at each position (see `evaluate`). Searches ask for millions of such sweeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from solvers.tables import CLASH_NS, Int64, Tables

Params = ParamSpec("Params")
Result = TypeVar("Result")


def compiled(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Return the function compiled for the types of its first call; what is compiled is kept where a disk allows it."""
    try:
        made = numba.njit(cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written to
        made = numba.njit(function)
    return cast(Callable[Params, Result], made)


@compiled
def _place(t: Tables, fates: Int64, need: Int64, last: Int64, delta: Int64, burst: Int64, coding: Int64) -> int:
    """Write what a plan adds to `base`; return its cost.

    Of each slot: `need` is the first restore that reads it, `last` the last one. Of each position: `delta` is the
    change of bytes there, `burst` the largest restore right before it, `coding` the encodes right after it.
    """
    never, cost = len(t.base), t.program_cost_ns
    need[:], last[:], delta[:], burst[:], coding[:] = never, -1, 0, 0, 0
    for a in range(len(fates) - 1, -1, -1):
        f = t.first_fate[a] + fates[a]
        cost += t.cost_ns[f]
        time = t.first_read[f]
        if t.restores[f]:
            for h in range(t.first_held[f], t.first_held[f + 1]):
                if t.held_dropped[h]:
                    time = min(time, need[t.held_slot[h]])
        for h in range(t.first_held[f], t.first_held[f + 1]):
            start = time if t.held_dropped[h] else t.held_forward[h] + 1
            end = max(last[t.held_slot[h]], t.held_backward[h], start - 1 + t.held_dropped[h])
            delta[start] += t.held_bytes[h]
            delta[end + 1] -= t.held_bytes[h]
        if t.restores[f] and time < never:
            cost += t.restore_ns[f]
            burst[time] = max(burst[time], t.transient[f])
            for p in range(t.first_parent[f], t.first_parent[f + 1]):
                slot = t.parent_slot[p]
                need[slot] = min(need[slot], time)
                last[slot] = max(last[slot], time)
        if t.encode_at[f] >= 0:
            start = t.encode_at[f] + 1
            end = max(t.encoded_until[f], start, time if t.decodes[f] and time < never else -1)
            delta[start] += t.encoded[f]
            delta[end + 1] -= t.encoded[f]
            coding[start - 1] += t.encoding[f]
        for s in range(t.first_swap[f], t.first_swap[f + 1]):
            delta[t.swap_at[s]] += t.swap_bytes[s]
            delta[t.swap_at[s] + 1] -= t.swap_bytes[s]
    return cost


@compiled
def _fill(t: Tables, delta: Int64, burst: Int64, coding: Int64, level: Int64) -> None:
    """Write the bytes in use at each position, restores before it and encodes after it included."""
    held = 0
    for i in range(len(level)):
        held += delta[i]
        plain = t.base[i] + held
        restoring = plain - t.own[i] + burst[i] if burst[i] > 0 else plain
        encoding = plain - t.workspace[i] + coding[i] if coding[i] > 0 else plain
        level[i] = max(plain, restoring, encoding)


@compiled
def _clashing(t: Tables, fates: Int64) -> int:
    """Return how many choices ask two alternatives for one op."""
    found = 0
    for g in range(len(t.first_clash) - 1):
        chosen = 0
        for c in range(t.first_clash[g], t.first_clash[g + 1]):
            chosen += fates[t.clash_unit[c]] == t.clash_fate[c]
        found += max(chosen - 1, 0)
    return found


@compiled
def _refused(t: Tables, fates: Int64) -> bool:
    """Return whether a plan makes more noise than the problem allows."""
    noise = 0
    for a in range(len(fates)):
        noise += t.noise_ppb[t.first_fate[a] + fates[a]]
    return noise > t.noise_limit_ppb


@compiled
def levels(t: Tables, plans: Int64) -> tuple[Int64, Int64, NDArray[np.bool_]]:
    """Return for each plan (plan, unit) its cost, its bytes (plan, position), and whether it is refused."""
    count, n = len(plans), len(t.base)
    cost, level = np.empty(count, np.int64), np.empty((count, n), np.int64)
    refused = np.empty(count, np.bool_)
    need, last = np.empty(t.slots, np.int64), np.empty(t.slots, np.int64)
    delta, burst, coding = np.empty(n + 2, np.int64), np.empty(n + 1, np.int64), np.empty(n + 1, np.int64)
    for k in range(count):
        clashing = _clashing(t, plans[k])
        cost[k] = _place(t, plans[k], need, last, delta, burst, coding) + CLASH_NS * clashing
        refused[k] = clashing > 0 or _refused(t, plans[k])
        _fill(t, delta, burst, coding, level[k])
    return cost, level, refused


@compiled
def outcomes(t: Tables, fates: Int64, some: Int64, budget: float) -> tuple[Int64, NDArray[np.float64], Int64]:
    """Return for each of `some` moves (move, change, 2: unit and fate) the cost, area above the budget and peak."""
    count, n = len(some), len(t.base)
    cost, area, peak = np.empty(count, np.int64), np.empty(count), np.empty(count, np.int64)
    need, last, level = np.empty(t.slots, np.int64), np.empty(t.slots, np.int64), np.empty(n, np.int64)
    delta, burst, coding = np.empty(n + 2, np.int64), np.empty(n + 1, np.int64), np.empty(n + 1, np.int64)
    plan = fates.copy()
    for k in range(count):
        for c in range(some.shape[1]):
            plan[some[k, c, 0]] = some[k, c, 1]
        clashing = _clashing(t, plan)
        cost[k] = _place(t, plan, need, last, delta, burst, coding) + CLASH_NS * clashing
        _fill(t, delta, burst, coding, level)
        top, above = 0, 0.0
        for i in range(n):
            top = max(top, level[i])
            above += max(level[i] - budget, 0.0)
        peak[k], area[k] = top, np.inf if clashing > 0 or _refused(t, plan) else above
        for c in range(some.shape[1]):
            plan[some[k, c, 0]] = fates[some[k, c, 0]]
    return cost, area, peak
