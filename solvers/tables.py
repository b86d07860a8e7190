"""The units of a problem as flat arrays, which is what compiled code reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, repeat
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from solvers.fates import Fate
from solvers.problem import Problem, ValueId

Int64 = NDArray[np.int64]
Records = NDArray[Any]  # rows with named columns of integers
Clashes = Sequence[Sequence[tuple[int, int]]]
CLASH_NS = 1 << 50  # added to the cost of a fate vector that asks two alternatives for one op


FATE = np.dtype(
    [
        ("cost_ns", np.int64),
        ("noise_ppb", np.int64),
        ("restores", np.int64),  # whether it has a restore
        ("restore_ns", np.int64),
        ("first_read", np.int64),
        ("transient", np.int64),  # bytes while restoring, at least one
        ("encode_at", np.int64),  # -1: it does not encode
        ("encoding", np.int64),  # bytes while encoding
        ("encoded", np.int64),  # bytes of the encoding
        ("encoded_until", np.int64),
        ("decodes", np.int64),
        ("held", np.int64),  # where its rows of `Tables.held` begin; they end where those of the next fate begin
        ("parent", np.int64),
        ("swap", np.int64),
    ]
)
HELD = np.dtype([(name, np.int64) for name in ("slot", "bytes", "forward", "backward", "dropped")])
SWAP = np.dtype([("at", np.int64), ("bytes", np.int64)])
SLOT = np.dtype([("unit", np.int64), ("reader", np.int64)])  # its owner, and where its rows of `Tables.reader` begin
CHOICE = np.dtype([("unit", np.int64), ("fate", np.int64)])
POSITION = np.dtype([("base", np.int64), ("own", np.int64), ("workspace", np.int64)])


class Tables(NamedTuple):
    """Fates are numbered through: those of unit a begin at `first_fate[a]`. Positions are program positions,
    `len(position)` for "never"; a slot is the number of a value that some unit owns. Where rows of one array belong to
    a row of another, there is one row more of that.
    """

    first_fate: Int64
    fate: Records  # FATE
    held: Records  # HELD: a value that a fate holds
    parent: Int64  # slots that a fate's restore reads
    swap: Records  # SWAP: workspace that a fate's alternatives add
    slot: Records  # SLOT
    reader: Records  # CHOICE: the fates, numbered through, of other units whose restores read a slot
    first_clash: Int64
    clash: Records  # CHOICE: of each group one may hold
    position: Records  # POSITION
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
    fates = [f for own in each for f in own]
    parents = [[slot[v] for v in f.parents if v in slot] for f in fates]
    owner = _owners(each, slot)
    readers = _readers(each, parents, owner)
    scratch = [0 if f.encode is None else problem.ops[f.encode].workspace_bytes for f in fates]
    firsts = zip(_firsts([f.held for f in fates]), _firsts(parents), _firsts([f.swaps for f in fates]), strict=True)
    rows = [*map(_row, fates, scratch, repeat(len(problem.program))), (0,) * 11]
    return Tables(
        _firsts(each),
        np.array([(*row, *first) for row, first in zip(rows, firsts, strict=True)], FATE),
        np.array(
            [(slot[h.value], h.size_bytes, h.last_forward, h.last_backward, h.dropped) for f in fates for h in f.held],
            HELD,
        ),
        np.fromiter((s for some in parents for s in some), np.int64),
        np.array([pair for f in fates for pair in f.swaps], SWAP),
        np.array(list(zip([*owner, 0], _firsts(readers), strict=True)), SLOT),
        np.array([pair for some in readers for pair in some], CHOICE),
        _firsts(clashes),
        np.array([pair for group in clashes for pair in group], CHOICE),
        np.array(list(zip(*positions, strict=True)), POSITION),
        problem.program_cost_ns(),
        problem.noise_limit_ppb,
    )


def _row(f: Fate, scratch_bytes: int, never: int) -> tuple[int, ...]:
    """Return the columns of FATE up to those that say where rows begin."""
    return (
        f.cost_ns,
        f.noise_ppb,
        bool(f.restore),
        f.restore_ns,
        f.first_read if f.restore else never,
        max(f.transient_bytes, 1),
        -1 if f.encode is None else f.encode_at,
        f.encoded_bytes + scratch_bytes,
        f.encoded_bytes,
        f.encoded_until,
        f.decodes,
    )


def _owners(each: Sequence[tuple[Fate, ...]], slot: dict[ValueId, int]) -> list[int]:
    owner = [0] * len(slot)
    for a, own in enumerate(each):
        for h in own[0].held:
            owner[slot[h.value]] = a
    return owner


def _readers(
    each: Sequence[tuple[Fate, ...]], parents: list[list[int]], owner: list[int]
) -> list[list[tuple[int, int]]]:
    """Return the (unit, fate) pairs that read each slot, of other units than its own."""
    readers: list[list[tuple[int, int]]] = [[] for _ in owner]
    units = (a for a, own in enumerate(each) for _ in own)
    for f, (a, slots) in enumerate(zip(units, parents, strict=True)):
        for s in dict.fromkeys(slots):
            if owner[s] != a:
                readers[s].append((a, f))
    return readers


def _firsts(groups: Sequence[Sequence[object]]) -> Int64:
    return np.fromiter(accumulate(map(len, groups), initial=0), np.int64)
