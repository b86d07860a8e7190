"""The oracle: the true optimum over every schedule that `simulate` accepts. Exponential; for tests.

A state is (how many of the run-once ops have run, which values are live, which of these crossed the turn and
may not be taken over, which noisy encodes have run). Dijkstra over running any op that may run and freeing any
value finds the cheapest schedule, or, with the peak as the length of a path, the least peak.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from solvers.problem import Limits, OpId, Problem, Schedule, Solution, Status
from solvers.search import Search
from solvers.simulate import simulate

EVERY_PLAN = "any schedule at all"
STATES = 2_000_000  # states settled before the oracle gives up

State = tuple[int, int, int, int]  # run-once ops done; live values, those of them that crossed, noisy ops: bit masks


def solve_oracle(problem: Problem, limits: Limits) -> Solution:
    """Return the cheapest schedule of all, or proof that none fits; NOT_FOUND if too large."""
    search = Search(problem, limits, "oracle")
    path = _dijkstra(_Moves(problem), problem.budget_bytes, search)
    if path is None:
        return search.answer(0, EVERY_PLAN)
    if not path:
        return Solution(Status.INFEASIBLE, None, 0, EVERY_PLAN, "oracle", search.seconds())
    cost = search.offer(path[0]).cost_ns
    return search.answer(cost, EVERY_PLAN)


def oracle_least_peak(problem: Problem, limits: Limits | None = None) -> int | None:
    """Return the smallest peak of any schedule, in bytes; None when the problem is too large."""
    search = Search(problem, limits or Limits(), "oracle")
    path = _dijkstra(_Moves(problem), None, search)
    return simulate(problem, path[0]).peak_bytes if path else None


@dataclass(frozen=True, slots=True)
class _Move:
    op: OpId
    reads: int
    writes: int
    turn: int  # index among the run-once ops; -1: may run any number of times
    cost_ns: int
    extra_bytes: int  # workspace, and values that it both reads and writes (two versions stand)
    takes_over: int  # mask of the value whose memory it may use
    taken_bytes: int
    noisy: int  # mask of the op among the noisy ones


class _Moves:
    """The ops as bit masks."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.once = [o for o in problem.program if not problem.ops[o].repeatable]
        index = {o: i for i, o in enumerate(self.once)}
        self.keep = _mask(problem.keep)
        self.turn = index[problem.program[problem.turn]]
        self.takeable = _mask(frozenset(op.takes_over for op in problem.ops if op.takes_over is not None))
        self.noise = [op.noise_ppb for op in problem.ops]
        self.moves = []
        for o, op in enumerate(problem.ops):
            twice = sum(problem.value_bytes[v] for v in set(op.reads) & set(op.writes))
            reads, writes = _mask(op.reads), _mask(op.writes)
            extra = op.workspace_bytes + twice
            over, taken = (0, 0) if op.takes_over is None else (1 << op.takes_over, problem.value_bytes[op.takes_over])
            noisy = 1 << o if op.noise_ppb else 0
            self.moves.append(_Move(o, reads, writes, index.get(o, -1), op.cost_ns, extra, over, taken, noisy))

    def bytes(self, live: int) -> int:
        """Return the bytes of a mask of values, fixed bytes included."""
        size = self.problem.value_bytes
        return self.problem.fixed_bytes + sum(size[v] for v in range(live.bit_length()) if live >> v & 1)

    def allows(self, noisy: int) -> bool:
        """Return whether the ops of a mask together are within the noise limit."""
        total = sum(n for o, n in enumerate(self.noise) if noisy >> o & 1)
        return total <= self.problem.noise_limit_ppb

    def frees(self, live: int) -> Iterator[int]:
        """Yield the masks with one value less."""
        rest = live
        while rest:
            bit = rest & -rest
            yield live ^ bit
            rest ^= bit


def _mask(values: frozenset[int] | tuple[int, ...]) -> int:
    mask = 0
    for v in values:
        mask |= 1 << v
    return mask


def _dijkstra(moves: _Moves, budget: int | None, search: Search) -> list[Schedule] | None:
    """Return [cheapest schedule], [] when there is none, None when the search was cut short."""
    start: State = (0, 0, 0, 0)
    best: dict[State, int] = {start: 0}
    came: dict[State, tuple[State, OpId]] = {}
    queue: list[tuple[int, State]] = [(0, start)]
    settled: set[State] = set()
    while queue:
        length, state = heapq.heappop(queue)
        if state in settled:
            continue
        settled.add(state)
        if state[0] == len(moves.once) and state[1] & moves.keep == moves.keep:
            return [_walk(came, state)]
        if len(settled) > STATES or (len(settled) % 4096 == 0 and search.left() <= 0):
            return None
        for after, op, longer in _steps(moves, state, length, budget):
            if longer < best.get(after, 1 << 62):
                best[after], came[after] = longer, (state, op)
                heapq.heappush(queue, (longer, after))
    return []


def _steps(moves: _Moves, state: State, length: int, budget: int | None) -> Iterator[tuple[State, OpId, int]]:
    done, live, crossed, noisy = state
    for after in moves.frees(live):
        yield (done, after, crossed & after, noisy), -1, length
    for move in moves.moves:
        if move.reads & ~live or move.turn not in (-1, done):
            continue
        if move.turn < 0 and not move.writes & ~live:
            continue
        noise_then = noisy | move.noisy
        if noise_then != noisy and not moves.allows(noise_then):
            continue
        used = moves.bytes(live | move.writes) + move.extra_bytes
        old = live & moves.takeable if move.turn == moves.turn else crossed & ~move.writes
        done_then, live_then = done + int(move.turn >= 0), live | move.writes
        ways: list[tuple[State, int]] = [((done_then, live_then, old, noise_then), used)]
        if move.takes_over & live & ~crossed:
            over = (done_then, live_then & ~move.takes_over, old, noise_then)
            ways.append((over, used - move.taken_bytes))
        for then, bytes_then in ways:
            if budget is None:
                yield then, move.op, max(length, bytes_then)
            elif bytes_then <= budget:
                yield then, move.op, length + move.cost_ns


def _walk(came: dict[State, tuple[State, OpId]], state: State) -> Schedule:
    ops = []
    while state in came:
        state, op = came[state]
        if op >= 0:
            ops.append(op)
    return tuple(reversed(ops))
