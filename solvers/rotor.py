"""Rotor: the optimal plan of a chain, by dynamic programming over segments and memory.

Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova 2019 (Optimal checkpointing for heterogeneous chains: how to train deep
neural networks with limited memory, arXiv:1911.13214). The forward is cut into a chain of stages where few bytes cross.
`best[i, j, m]` is the least time that the backward of stages i..j adds when stage i's input is there and m is left:

    all:  best[i+1, j, m - kept[i]]           if max(all[i] + around(i, j), kept[i] + backward[i]) <= m
    k:    sweep(i..k-1) + best[k, j, m - input[k]] + best[i, k-1, m]    if max_r(run[r]) + around(i, j) <= m

either stage i runs and keeps all that its backward reads, or stages i..k-1 run and keep only stage k's input; `around`
is what the backward of stage j+1 left behind, `run`, `all` and `backward` are the worst moments of a stage.
Cannot model: skips over a cut (they are simply live for longer), codecs, take-overs in a recompute. So the memory is a
target: amounts around the budget are tried, and `simulate` says which plans fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.bounds import ANY_PLAN, cost_floor
from solvers.fates import value_spans
from solvers.problem import Limits, OpId, Problem, Solution, ValueId
from solvers.restorers import restorers
from solvers.search import Search
from solvers.units import build_units

SLOTS = 200  # of memory
BUDGET_SLOTS = 150  # what of them the budget makes up
LONGEST = 48  # stages
NEVER = np.int64(1) << 60

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stage:
    """A piece of the chain: forward ops, the ops that run them again, backward ops; time, and bytes.

    `run_bytes` and `all_bytes` are in use at the worst moment of the forward, its input not counted, when it keeps
    only its output, and all. `backward_bytes` is that of the backward, what the forward kept not counted.
    `before_bytes` and `after_bytes` are in use around a first run and around one that the backward asks for.
    """

    forward: tuple[OpId, ...]
    again: tuple[OpId, ...]
    backward: tuple[OpId, ...]
    again_ns: int
    input_bytes: int
    kept_bytes: int
    run_bytes: int
    all_bytes: int
    backward_bytes: int
    before_bytes: int
    after_bytes: int


def solve_rotor(problem: Problem, limits: Limits) -> Solution:
    """Return the cheapest of the chain's plans that fits; proves nothing about the problem."""
    search = Search(problem, limits, "rotor")
    search.offer(problem.program)
    if search.schedule is None:
        room = max(1, problem.budget_bytes - problem.fixed_bytes)
        table = _Table(chain(problem), max(1, -(-room // BUDGET_SLOTS)), search)
        last: tuple[OpId, ...] | None = None
        for slots in range(SLOTS, 0, -1):
            steps = None if search.left() <= 0 else table.plan(slots)
            if steps is None:
                break
            if steps != last:
                search.offer(steps)
            last = steps
    return search.answer(cost_floor(problem, build_units(problem)), ANY_PLAN)


def chain(problem: Problem) -> list[Stage]:
    """Cut the program into stages; the last holds the turn, and a backward op goes to the last stage it reads."""
    levels = _Levels(problem)
    bounds = [*levels.cuts, problem.turn + 1]
    again = restorers(problem)
    position, stages = problem.turn + 1, []
    for i in reversed(range(len(levels.cuts))):
        begin, end = bounds[i], bounds[i + 1]
        back = range(position, position + levels.backward_ops[i])
        ops = problem.program[begin:end]
        repeated = tuple(dict.fromkeys(again[v] for o in ops for v in problem.ops[o].writes if v in again))
        stages.append(
            Stage(
                ops,
                repeated,
                tuple(problem.program[t] for t in back),
                sum(problem.ops[o].cost_ns for o in repeated),
                int(levels.crossing[begin - 1]) if begin else 0,
                int(levels.kept[begin:end].sum()),
                int(levels.run[begin:end].max()),
                int(levels.all[begin:end].max()),
                int(max((levels.other[t] for t in back), default=0)),
                int(levels.pinned[begin:end].max()),
                int(levels.carried[position]),
            )
        )
        position += len(back)
    return stages[::-1]


class _Levels:
    """Bytes at each program position, and where the forward is cut."""

    def __init__(self, problem: Problem) -> None:
        spans, turn, n = value_spans(problem.out_of_place()), problem.turn, len(problem.program)
        size, again = problem.value_bytes, restorers(problem)
        work = np.array([problem.ops[o].workspace_bytes for o in problem.program], np.int64)
        self.crossing = np.zeros(turn + 1, np.int64)  # read in the forward after a position, and written up to it
        for v, s in spans.items():
            if s.write < turn:
                self.crossing[s.write : min(s.last_forward, turn)] += size[v]
        self.cuts = _cuts(self.crossing)
        self.stage_of = np.searchsorted(np.array(self.cuts), np.arange(turn + 1), side="right") - 1
        ends = np.array([*self.cuts[1:], turn + 1])[self.stage_of]  # where the stage of a position ends
        self.kept = np.zeros(turn + 1, np.int64)  # by the position that writes it
        self.run, self.all = work[: turn + 1].copy(), work[: turn + 1].copy()
        self.pinned = np.zeros(turn + 1, np.int64)  # cannot come back, so it stays from its write on
        self.other = work.copy()  # everything but what a stage may keep
        self.carried = np.zeros(n + 1, np.int64)  # the same, from before a position to after it
        for v, s in spans.items():
            last = n - 1 if v in problem.keep else s.last
            if s.write >= turn or (s.backward and v not in again):
                self.pinned[s.write :] += size[v]
                self.other[s.write : last + 1] += size[v]
                self.carried[s.write + 1 : last + 1] += size[v]
                continue
            end = int(ends[s.write])
            leaves = s.last_forward >= end
            self.run[s.write : min(s.last_forward + 1, end)] += size[v]
            self.all[s.write : end if s.backward else min(s.last_forward + 1, end)] += size[v]
            self.kept[s.write] += size[v] if s.backward or leaves else 0
        self.backward_ops = self._owners(problem, {v: s.write for v, s in spans.items()})

    def _owners(self, problem: Problem, write: dict[ValueId, int]) -> list[int]:
        """Return how many backward ops each stage has; in the program's order, from the last stage down."""
        count, at = [0] * len(self.cuts), len(self.cuts) - 1
        for o in problem.program[problem.turn + 1 :]:
            read = [int(self.stage_of[write[v]]) for v in problem.ops[o].reads if write[v] < problem.turn]
            at = min(at, max(read, default=at))
            count[at] += 1
        return count


def _cuts(crossing: Int64) -> list[int]:
    """Return where stages begin: at 0, and after local minima of what crosses, at most one in each share of them."""
    inner = range(1, len(crossing) - 1)
    low = [t for t in inner if crossing[t] <= crossing[t - 1] and crossing[t] <= crossing[t + 1]]
    least: dict[int, int] = {}
    for i, t in enumerate(low):
        share = i * (LONGEST - 1) // max(LONGEST - 1, len(low))
        least[share] = min(least.get(share, t), t, key=lambda t: (crossing[t], t))
    return [0, *sorted(t + 1 for t in least.values())]


class _Table:
    """`best[i, j + 1, m]` of the docstring; column i is the empty segment i..i-1."""

    def __init__(self, stages: list[Stage], unit: int, search: Search) -> None:
        """Fill the table; `unit` bytes make a slot."""
        self.stages, self.unit = stages, unit
        n = len(stages)
        self.kept = [self._slots(s.kept_bytes) for s in stages]
        self.input = [self._slots(s.input_bytes) for s in stages]
        self.sweep = np.concatenate([[0], np.cumsum([s.again_ns for s in stages])])
        self.best = np.full((n, n + 1, SLOTS + 1), NEVER)
        self.choice = np.full((n, n, SLOTS + 1), -1, np.int64)  # -1: stage i keeps all; k > i: keep k's input
        for i in range(n):
            self.best[i, i, :] = 0
        for length in range(1, n + 1):
            for i in range(n - length + 1):
                if search.left() <= 0:
                    return
                self._fill(i, i + length - 1)

    def _slots(self, size_bytes: int) -> int:
        return -(-size_bytes // self.unit)

    def _fill(self, i: int, j: int) -> None:
        stage, last = self.stages[i], j == len(self.stages) - 1
        around = stage.before_bytes if last else self.stages[j].after_bytes
        needed = max(stage.all_bytes + around, stage.kept_bytes + stage.backward_bytes)
        rest = self._left(i + 1, j, self.kept[i]) if i < j else np.zeros(SLOTS + 1, np.int64)
        best, choice = self._from(rest, needed), np.full(SLOTS + 1, -1, np.int64)
        needed = 0
        for k in range(i + 1, j + 1):
            ran = self.stages[k - 1]
            needed = max(needed, ran.run_bytes + (ran.input_bytes if k - 1 > i else 0) + around)
            # Stages i..k-1 run once on the way to k, and once more for their own backward.
            cost = int(self.sweep[k] - self.sweep[i]) + self._left(k, j, self.input[k]) + self.best[i, k, :]
            cost = self._from(cost, needed)
            choice, best = np.where(cost < best, k, choice), np.minimum(cost, best)
        self.best[i, j + 1, :], self.choice[i, j, :] = best, choice

    def _from(self, row: Int64, needed_bytes: int) -> Int64:
        """The row where there is memory enough, NEVER below."""
        return np.where(np.arange(SLOTS + 1) >= self._slots(needed_bytes), np.minimum(row, NEVER), NEVER)

    def _left(self, i: int, j: int, slots: int) -> Int64:
        """The row of segment i..j when `slots` of the memory are taken."""
        row = np.full(SLOTS + 1, NEVER)
        if slots <= SLOTS:
            row[slots:] = self.best[i, j + 1, : SLOTS + 1 - slots]
        return row

    def plan(self, slots: int) -> tuple[OpId, ...] | None:
        """Return the schedule for so many slots; None when the chain needs more."""
        n = len(self.stages)
        if self.best[0, n, slots] >= NEVER:
            return None
        steps: list[OpId] = []
        ran = [False] * n
        todo: list[tuple[str, int, int, int]] = [("segment", 0, n - 1, slots)]
        while todo:
            kind, i, j, m = todo.pop()
            if kind == "backward":
                steps.extend(self.stages[i].backward)
                continue
            if j < i:
                continue
            k = int(self.choice[i, j, m])
            until = i + 1 if k < 0 else k
            for s in range(i, until):
                steps.extend(self.stages[s].again if ran[s] else self.stages[s].forward)
                ran[s] = True
            if k < 0:
                todo += [("backward", i, i, 0), ("segment", i + 1, j, m - self.kept[i])]
            else:
                todo += [("segment", i, k - 1, m), ("segment", k, j, m - self.input[k])]
        return tuple(steps)
