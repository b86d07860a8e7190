"""The units of a problem as flat arrays, which is what compiled code reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from solvers.fates import Fate
from solvers.problem import Problem, ValueId

Int64 = NDArray[np.int64]
Clashes = Sequence[Sequence[tuple[int, int]]]
CLASH_NS = 1 << 50  # added to the cost of a fate vector that asks two alternatives for one op


class Tables(NamedTuple):
    """Fates are numbered through: those of unit a begin at `first_fate[a]`. `first_*[i]` is where the rows of i begin,
    and there is one more of them than of i. Positions are program positions, `len(base)` for "never"; a slot is the
    number of a value that some unit owns.
    """

    first_fate: Int64
    # of each fate
    cost_ns: Int64
    noise_ppb: Int64
    restores: Int64  # whether it has a restore
    restore_ns: Int64
    first_read: Int64
    transient: Int64  # bytes while restoring, at least one
    encode_at: Int64  # -1: it does not encode
    encoding: Int64  # bytes while encoding
    encoded: Int64  # bytes of the encoding
    encoded_until: Int64
    decodes: Int64
    # of each value that a fate holds
    first_held: Int64
    held_slot: Int64
    held_bytes: Int64
    held_forward: Int64
    held_backward: Int64
    held_dropped: Int64
    # of what a fate's restore reads, and of the workspace that its alternatives add
    first_parent: Int64
    parent_slot: Int64
    first_swap: Int64
    swap_at: Int64
    swap_bytes: Int64
    # of each group of (unit, fate) pairs of which one may hold
    first_clash: Int64
    clash_unit: Int64
    clash_fate: Int64
    # of each position
    base: Int64
    own: Int64
    workspace: Int64
    slots: int
    program_cost_ns: int
    noise_limit_ppb: int


def tabulate(
    problem: Problem,
    each: Sequence[tuple[Fate, ...]],
    slot: dict[ValueId, int],
    clashes: Clashes,
    positions: tuple[Int64, Int64, Int64],
) -> Tables:
    """Return the tables of units with the fates `each`; `positions` are base, own and workspace bytes."""
    never, fates = len(problem.program), [f for own in each for f in own]
    held = [h for f in fates for h in f.held]
    parents = [[slot[v] for v in f.parents if v in slot] for f in fates]
    swaps = [pair for f in fates for pair in f.swaps]
    pairs = [pair for group in clashes for pair in group]
    scratch = [0 if f.encode is None else problem.ops[f.encode].workspace_bytes for f in fates]
    return Tables(
        _firsts(each),
        _ints(f.cost_ns for f in fates),
        _ints(f.noise_ppb for f in fates),
        _ints(bool(f.restore) for f in fates),
        _ints(f.restore_ns for f in fates),
        _ints(f.first_read if f.restore else never for f in fates),
        _ints(max(f.transient_bytes, 1) for f in fates),
        _ints(-1 if f.encode is None else f.encode_at for f in fates),
        _ints(f.encoded_bytes + more for f, more in zip(fates, scratch, strict=True)),
        _ints(f.encoded_bytes for f in fates),
        _ints(f.encoded_until for f in fates),
        _ints(f.decodes for f in fates),
        _firsts([f.held for f in fates]),
        _ints(slot[h.value] for h in held),
        _ints(h.size_bytes for h in held),
        _ints(h.last_forward for h in held),
        _ints(h.last_backward for h in held),
        _ints(h.dropped for h in held),
        _firsts(parents),
        _ints(s for some in parents for s in some),
        _firsts([f.swaps for f in fates]),
        _ints(t for t, _ in swaps),
        _ints(more for _, more in swaps),
        _firsts(clashes),
        _ints(a for a, _ in pairs),
        _ints(m for _, m in pairs),
        *positions,
        len(slot),
        problem.program_cost_ns(),
        problem.noise_limit_ppb,
    )


def _ints(numbers: Iterable[int]) -> Int64:
    return np.fromiter(numbers, np.int64)


def _firsts(groups: Sequence[Sequence[object]]) -> Int64:
    return np.fromiter(accumulate(map(len, groups), initial=0), np.int64)
