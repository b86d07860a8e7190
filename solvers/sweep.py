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

from solvers.tables import CLASH_NS, Int64, Records, Tables

Params = ParamSpec("Params")
Result = TypeVar("Result")


def compiled(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Return the function compiled for the types of its first call; what is compiled is kept where a disk allows it."""
    try:
        made: object = numba.njit(cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written to
        made = numba.njit(function)
    return cast(Callable[Params, Result], made)


@compiled
def place(  # noqa: C901
    t: Tables, plan: Int64, time: Int64, last: Int64, delta: Int64, burst: Int64, coding: Int64
) -> int:
    """Write when each unit is restored, and what a plan adds to the bytes that are always there; return its cost.

    Of each unit: `time` is the position right before which it is restored. Of each slot: `last` is the last restore
    that reads it. Of each position: `delta` is the change of bytes there, `burst` the largest restore right before it,
    `coding` the encodes right after it. In one piece: handing a dozen arrays to a function costs as much as its work.
    """
    first_fate, fate, held, parent, swap, slot = t.first_fate, t.fate, t.held, t.parent, t.swap, t.slot
    never, cost = len(t.position), t.program_cost_ns
    need = np.full(len(slot), never, np.int64)  # the first restore that reads a slot
    last[:], delta[:], burst[:], coding[:] = -1, 0, 0, 0
    for a in range(len(plan) - 1, -1, -1):
        f = first_fate[a] + plan[a]
        cost += fate[f].cost_ns
        when = fate[f].first_read
        if fate[f].restores:
            for h in range(fate[f].held, fate[f + 1].held):
                if held[h].dropped:
                    when = min(when, need[held[h].slot])
        time[a] = when
        for h in range(fate[f].held, fate[f + 1].held):
            start = when if held[h].dropped else held[h].forward + 1
            end = max(last[held[h].slot], held[h].backward, start - 1 + held[h].dropped)
            delta[start] += held[h].bytes
            delta[end + 1] -= held[h].bytes
        if fate[f].restores and when < never:
            cost += fate[f].restore_ns
            burst[when] = max(burst[when], fate[f].transient)
            for p in range(fate[f].parent, fate[f + 1].parent):
                s = parent[p]
                if slot[s].unit != a:
                    need[s] = min(need[s], when)
                    last[s] = max(last[s], when)
        if fate[f].encode_at >= 0:
            start = fate[f].encode_at + 1
            end = max(fate[f].encoded_until, start, when if fate[f].decodes and when < never else -1)
            delta[start] += fate[f].encoded
            delta[end + 1] -= fate[f].encoded
            coding[start - 1] += fate[f].encoding
        for w in range(fate[f].swap, fate[f + 1].swap):
            delta[swap[w].at] += swap[w].bytes
            delta[swap[w].at + 1] -= swap[w].bytes
    return cost


@compiled
def fill(position: Records, delta: Int64, burst: Int64, coding: Int64, held: Int64, level: Int64) -> None:
    """Write what is held, and the bytes in use at each position, restores before it and encodes after it included."""
    now = 0
    for i in range(len(level)):
        now += delta[i]
        held[i] = plain = position[i].base + now
        restoring = plain - position[i].own + burst[i] if burst[i] > 0 else plain
        encoding = plain - position[i].workspace + coding[i] if coding[i] > 0 else plain
        level[i] = max(plain, restoring, encoding)


@compiled
def clashing(t: Tables, plan: Int64) -> int:
    """Return how many choices ask two alternatives for one op."""
    first_clash, clash, found = t.first_clash, t.clash, 0
    for g in range(len(first_clash) - 1):
        chosen = 0
        for c in range(first_clash[g], first_clash[g + 1]):
            chosen += plan[clash[c].unit] == clash[c].fate
        found += max(chosen - 1, 0)
    return found


@compiled
def noise_of(t: Tables, plan: Int64) -> int:
    """Return the noise of a plan in ppb."""
    first_fate, fate, noise = t.first_fate, t.fate, 0
    for a in range(len(plan)):
        noise += fate[first_fate[a] + plan[a]].noise_ppb
    return noise


@compiled
def levels(t: Tables, plans: Int64) -> tuple[Int64, Int64, NDArray[np.bool_]]:
    """Return for each plan (plan, unit) its cost, its bytes (plan, position), and whether it is refused."""
    count, position = len(plans), t.position
    n = len(position)
    cost, level = np.empty(count, np.int64), np.empty((count, n), np.int64)
    refused = np.empty(count, np.bool_)
    time, last = np.empty(plans.shape[1], np.int64), np.empty(len(t.slot), np.int64)
    delta, burst, coding = np.empty(n + 2, np.int64), np.empty(n + 1, np.int64), np.empty(n + 1, np.int64)
    held = np.empty(n, np.int64)
    for k in range(count):
        clashes = clashing(t, plans[k])
        cost[k] = place(t, plans[k], time, last, delta, burst, coding) + CLASH_NS * clashes
        refused[k] = clashes > 0 or noise_of(t, plans[k]) > t.noise_limit_ppb
        fill(position, delta, burst, coding, held, level[k])
    return cost, level, refused
