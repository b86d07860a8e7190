"""DTR: tensors evicted online when the next op does not fit, and computed again when somebody reads them.

Kirisame et al. 2021 (Dynamic Tensor Rematerialization, ICLR). The program runs op by op under the budget; while the
next op does not fit, the live value with the least h = (its cost + the cost of its evicted neighbourhood) / (bytes *
staleness) goes. Values that the program reads no more are freed eagerly; what cannot be computed again stays as long as
something that may come back reads it. The trace is the schedule, and may recompute a value many times.
Cannot model: the future, codecs, what an op takes over.
"""

from __future__ import annotations

from solvers.bounds import ANY_PLAN, cost_floor
from solvers.problem import Limits, OpId, Problem, Solution, ValueId
from solvers.restorers import restorers
from solvers.search import Search
from solvers.units import build_units

MOST_RUNS = 20  # times the program's length, then the trace is thrashing


class _DoesNotFit(Exception):
    """Everything evictable is gone and the op still does not fit."""


def solve_dtr(problem: Problem, limits: Limits) -> Solution:
    """Return the trace of a run under the budget, if the run ends; proves nothing."""
    search = Search(problem, limits, "dtr")
    # What fits as it stands is never evicted; the run itself does not see what the ops take over.
    search.offer(problem.program)
    if search.schedule is not None:
        return search.answer(cost_floor(problem, build_units(problem)), ANY_PLAN)
    run = _Run(problem, search)
    try:
        for t, o in enumerate(problem.program):
            run.step(t, o)
        search.offer(tuple(run.trace))
    except (_DoesNotFit, RecursionError):
        pass
    return search.answer(cost_floor(problem, build_units(problem)), ANY_PLAN)


class _Run:
    """The allocator's state: live values, when each was last touched, what may be evicted."""

    def __init__(self, problem: Problem, search: Search) -> None:
        self.problem, self.search = problem, search
        self.again = restorers(problem)
        self.children: dict[ValueId, list[ValueId]] = {}
        for v, o in self.again.items():
            for p in problem.ops[o].reads:
                self.children.setdefault(p, []).append(v)
        self.last = _needed_until(problem, self.again, self.children)
        self.touched: dict[ValueId, int] = {}  # live values
        self.gone: set[ValueId] = set()  # evicted, and maybe wanted again
        self.used, self.clock = problem.fixed_bytes, 0
        self.trace: list[OpId] = []

    def step(self, t: int, o: OpId) -> None:
        """Run the program's op at position t, then free what is dead."""
        self.run(o, set(self.problem.ops[o].reads))
        for v in [v for v in self.touched if self.last[v] <= t]:
            self._drop(v)
            self.gone.discard(v)

    def run(self, o: OpId, pinned: set[ValueId]) -> None:
        """Make the op's reads live, make room, run it. `pinned` values stay."""
        op = self.problem.ops[o]
        for v in op.reads:
            if v not in self.touched:
                if v not in self.again:
                    raise _DoesNotFit
                self.run(self.again[v], pinned | set(op.reads) | set(self.problem.ops[self.again[v]].reads))
        new = [v for v in op.writes if v not in self.touched]
        self._make_room(sum(self.problem.value_bytes[v] for v in new) + op.workspace_bytes, pinned | set(op.reads))
        if len(self.trace) > MOST_RUNS * len(self.problem.program) or self.search.left() <= 0:
            raise _DoesNotFit
        self.clock += max(1, op.cost_ns)
        self.trace.append(o)
        self.used += sum(self.problem.value_bytes[v] for v in new)
        self.touched.update(dict.fromkeys((*op.reads, *op.writes), self.clock))
        self.gone.difference_update(op.writes)

    def _make_room(self, needed: int, pinned: set[ValueId]) -> None:
        while self.used + needed > self.problem.budget_bytes:
            free = [v for v in self.touched if v not in pinned and v in self.again and v not in self.problem.keep]
            free = [v for v in free if self.problem.value_bytes[v]]
            if not free:
                raise _DoesNotFit
            self._drop(min(free, key=self._score))

    def _drop(self, v: ValueId) -> None:
        del self.touched[v]
        self.used -= self.problem.value_bytes[v]
        self.gone.add(v)

    def _score(self, v: ValueId) -> float:
        cost = self.problem.ops[self.again[v]].cost_ns + self._neighbourhood(v)
        return cost / (self.problem.value_bytes[v] * (self.clock - self.touched[v] + 1))

    def _neighbourhood(self, v: ValueId) -> int:
        """Cost of the evicted values connected to v: ancestors by what they read, descendants by who reads them."""
        seen, total = {v}, 0
        for next_of in (lambda u: self.problem.ops[self.again[u]].reads, lambda u: self.children.get(u, ())):
            todo = list(next_of(v))
            while todo:
                u = todo.pop()
                if u in seen or u not in self.gone or u not in self.again:
                    continue
                seen.add(u)
                total += self.problem.ops[self.again[u]].cost_ns
                todo.extend(next_of(u))
        return total


def _needed_until(
    problem: Problem, again: dict[ValueId, OpId], children: dict[ValueId, list[ValueId]]
) -> dict[ValueId, int]:
    """Return the position after which a value is dead: its last read, or that of what is computed from it again.

    A value that can come back is dead at its own last read: if it is wanted after all, it comes back.
    """
    end = len(problem.program)
    last: dict[ValueId, int] = {}
    for t, o in enumerate(problem.program):
        last.update(dict.fromkeys((*problem.ops[o].reads, *problem.ops[o].writes), t))
    last.update(dict.fromkeys(problem.keep, end))
    until = dict(last)
    for o in reversed(problem.program):
        for v in problem.ops[o].writes:
            until[v] = max([last[v], *(until[c] for c in children.get(v, ()) if c in until)])
    return {v: last[v] if v in again else until[v] for v in last}
