"""Rotor: the optimal plan of a chain, by dynamic programming over segments and memory.

Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova 2019 (Optimal checkpointing for heterogeneous chains: how to train deep
neural networks with limited memory, arXiv:1911.13214). The forward is cut into a chain of stages where few bytes cross.
`best[i][j]` is the least time of the backward of stages i..j when stage i's input is there, for each amount of
memory: either stage i runs and keeps all that its backward reads, or stages i..k-1 run and keep only stage k's input.
Cannot model: skips over a cut (they are simply live for longer), codecs, workspace inside the program. So its own
memory is only a target: several are tried and `simulate` says which plans fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.bounds import ANY_PLAN, cost_floor
from solvers.fates import value_spans
from solvers.problem import Limits, OpId, Problem, Solution
from solvers.restorers import restorers
from solvers.search import Search
from solvers.units import build_units

SLOTS = 150  # of memory
LONGEST = 48  # stages
TARGETS = 24  # amounts of memory tried

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stage:
    """A piece of the chain: forward ops, the ops that run them again, backward ops; bytes in, and kept in all."""

    forward: tuple[OpId, ...]
    again: tuple[OpId, ...]
    backward: tuple[OpId, ...]
    again_ns: int
    input_bytes: int
    kept_bytes: int


def solve_rotor(problem: Problem, limits: Limits) -> Solution:
    """Return the cheapest of the chain's plans that fits; proves nothing about the problem."""
    search = Search(problem, limits, "rotor")
    search.offer(problem.program)
    stages = chain(problem)
    total = sum(s.kept_bytes for s in stages)
    unit = max(1, -(-total // SLOTS))
    table = _Table(stages, unit, search)
    for target in np.linspace(SLOTS, 1, TARGETS, dtype=int):
        if search.left() <= 0:
            break
        steps = table.plan(int(target))
        if steps is not None:
            search.offer(steps)
    return search.answer(cost_floor(problem, build_units(problem)), ANY_PLAN)


def chain(problem: Problem) -> list[Stage]:
    """Cut the program into stages; the last holds the turn, and a backward op goes to the last stage it reads."""
    spans, turn = value_spans(problem.out_of_place()), problem.turn
    crossing = np.zeros(turn + 1, np.int64)
    for v, s in spans.items():
        if s.write < turn and s.last_forward > s.write:
            crossing[s.write : min(s.last_forward, turn)] += problem.value_bytes[v]
    cuts = _cuts(crossing)
    bounds = [*cuts, turn + 1]
    stage_of = np.searchsorted(np.array(cuts), np.arange(turn + 1), side="right") - 1
    backward: list[list[OpId]] = [[] for _ in cuts]
    at = len(cuts) - 1
    for o in problem.program[turn + 1 :]:
        read = [int(stage_of[spans[v].write]) for v in problem.ops[o].reads if v in spans and spans[v].write < turn]
        at = min(at, max(read, default=at))
        backward[at].append(o)
    again = restorers(problem)
    stages = []
    for i, begin in enumerate(cuts):
        ops = problem.program[begin : bounds[i + 1]]
        back = tuple(dict.fromkeys(again[v] for o in ops for v in problem.ops[o].writes if v in again))
        kept = {v for o in ops for v in problem.ops[o].writes if v in spans and spans[v].backward}
        stages.append(
            Stage(
                ops,
                back,
                tuple(backward[i]),
                sum(problem.ops[o].cost_ns for o in back),
                int(crossing[begin - 1]) if begin else 0,
                sum(problem.value_bytes[v] for v in kept),
            )
        )
    return stages


def _cuts(crossing: Int64) -> list[int]:
    """Return where stages begin: at 0, and after the local minima of what crosses, the smallest first."""
    inner = range(1, len(crossing) - 1)
    low = [t for t in inner if crossing[t] <= crossing[t - 1] and crossing[t] <= crossing[t + 1]]
    low = sorted(low, key=lambda t: (crossing[t], t))[: LONGEST - 1]
    return [0, *sorted(t + 1 for t in low)]


class _Table:
    """`best[i][j][m]`: extra ns to do the backward of stages i..j in m slots, after stage i's input is there."""

    def __init__(self, stages: list[Stage], unit: int, search: Search) -> None:
        self.stages = stages
        n = len(stages)
        self.kept = [-(-s.kept_bytes // unit) for s in stages]
        self.input = [-(-s.input_bytes // unit) for s in stages]
        far = np.int64(1) << 60
        self.best = np.full((n, n + 1, SLOTS + 1), far)  # [i, j] with j = i - 1 at column i - 1 + 1
        self.choice = np.full((n, n, SLOTS + 1), -1, np.int64)  # -1: stage i keeps all; k > i: keep k's input
        sweep = np.concatenate([[0], np.cumsum([s.again_ns for s in stages])])
        for i in range(n):
            self.best[i, i, :] = 0
        for length in range(1, n + 1):
            for i in range(n - length + 1):
                if search.left() <= 0:
                    return
                self._fill(i, i + length - 1, sweep)

    def _fill(self, i: int, j: int, sweep: Int64) -> None:
        """Columns are shifted by one, so that the empty segment [i, i - 1] is column i."""
        rows = self._shifted(i + 1, j, self.kept[i]) if i < j else self._alone(self.kept[i])
        best, choice = rows, np.full(SLOTS + 1, -1, np.int64)
        for k in range(i + 1, j + 1):
            # Stages i..k-1 run once on the way to k, and once more for their own backward.
            cost = int(sweep[k] - sweep[i]) + self._shifted(k, j, self.input[k]) + self.best[i, k, :]
            choice, best = np.where(cost < best, k, choice), np.minimum(cost, best)
        self.best[i, j + 1, :], self.choice[i, j, :] = best, choice

    def _shifted(self, i: int, j: int, slots: int) -> Int64:
        """The row of segment i..j when `slots` of the memory are taken."""
        row = np.full(SLOTS + 1, np.int64(1) << 60)
        if slots <= SLOTS:
            row[slots:] = self.best[i, j + 1, : SLOTS + 1 - slots]
        return row

    def _alone(self, slots: int) -> Int64:
        row = np.full(SLOTS + 1, np.int64(1) << 60)
        row[min(slots, SLOTS + 1) :] = 0
        return row

    def plan(self, slots: int) -> tuple[OpId, ...] | None:
        """Return the schedule for so many slots; None when the chain needs more."""
        n = len(self.stages)
        if self.best[0, n, slots] >= np.int64(1) << 59:
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
