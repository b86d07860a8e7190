"""Order before planning: ops that free memory, or take none, run as soon as they can.

A gradient that is summed early, or an activation whose last reader runs early, is in memory for less of the step.
The answer is the same Problem with another `program`; its plans are schedules like any other.
"""

from __future__ import annotations

import heapq
from collections.abc import Set
from dataclasses import replace

from solvers.problem import OpId, Problem, ValueId


def free_early(problem: Problem) -> Problem:
    """Return the problem with every op that does not add memory moved as early as what it reads allows.

    An op adds what it writes and takes away what it is the last in its half to read; both halves stay apart, and ops
    that run once keep their order (they draw random numbers or update buffers).
    """
    turn = problem.turn
    first, second = problem.program[:turn], problem.program[turn + 1 :]
    saved = {v for o in problem.program[turn:] for v in problem.ops[o].reads}
    stays = problem.keep | saved
    program = (*_half(problem, first, stays), problem.program[turn], *_half(problem, second, problem.keep))
    moved = replace(problem, program=program)
    moved.verify()
    return moved


def _half(problem: Problem, ops: tuple[OpId, ...], stays: Set[ValueId]) -> list[OpId]:
    """Run the given order, but whenever an op that does not add memory is ready, run that first.

    Values in `stays` are not freed by their last read here.
    """
    before = _dependences(problem, ops)
    after: dict[OpId, list[OpId]] = {o: [] for o in ops}
    for o, needed in before.items():
        for p in needed:
            after[p].append(o)
    missing = {o: len(needed) for o, needed in before.items()}
    readers: dict[ValueId, int] = {}
    for o in ops:
        for v in set(problem.ops[o].reads):
            readers[v] = readers.get(v, int(v in stays)) + 1
    place = {o: i for i, o in enumerate(ops)}
    ready = [(place[o], o) for o in ops if not missing[o]]
    heapq.heapify(ready)
    order: list[OpId] = []
    while ready:
        o = _next(problem, ready, readers)
        order.append(o)
        for v in set(problem.ops[o].reads):
            readers[v] -= 1
        for c in after[o]:
            missing[c] -= 1
            if not missing[c]:
                heapq.heappush(ready, (place[c], c))
    return order


def _next(problem: Problem, ready: list[tuple[int, OpId]], readers: dict[ValueId, int]) -> OpId:
    """Take the earliest ready op that adds no memory, else the earliest one."""
    ordered = sorted(ready)
    taken = next((pair for pair in ordered if _added(problem, pair[1], readers) <= 0), ordered[0])
    ready.remove(taken)
    heapq.heapify(ready)
    return taken[1]


def _added(problem: Problem, o: OpId, readers: dict[ValueId, int]) -> int:
    op, size = problem.ops[o], problem.value_bytes
    freed = sum(size[v] for v in set(op.reads) if readers[v] == 1)
    return sum(size[v] for v in op.writes) - freed


def _dependences(problem: Problem, ops: tuple[OpId, ...]) -> dict[OpId, set[OpId]]:
    """What must run before each op: writers of its reads, other readers of what it takes over, once-only ops."""
    writer = {v: o for o in ops for v in problem.ops[o].writes}
    readers: dict[ValueId, set[OpId]] = {}
    for o in ops:
        for v in problem.ops[o].reads:
            readers.setdefault(v, set()).add(o)
    before: dict[OpId, set[OpId]] = {}
    last_once: OpId | None = None
    for o in ops:
        op = problem.ops[o]
        before[o] = {writer[v] for v in op.reads if v in writer}
        if op.takes_over is not None:
            before[o] |= readers[op.takes_over] - {o}
        if not op.repeatable:
            before[o] |= set() if last_once is None else {last_once}
            last_once = o
    return before
