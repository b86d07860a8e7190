"""What no plan can beat: the working set of each op, and the cost of running every op once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.fates import scratch_bytes
from solvers.problem import OpId, Problem
from solvers.units import Units, build_units

ANY_PLAN = "any plan that follows the program's order and recomputes only after the turn"
ONE_RECOMPUTE = "one recompute a value, as late as possible"


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """No plan of class `ANY_PLAN` peaks below `peak_bytes`, because `op` must run; the parts add up to it.

    `keep_bytes` are outputs and parameter gradients that stand at that moment, `read_bytes` what the op
    reads, `other_bytes` what has to wait for a later op and can be neither recomputed nor encoded.
    """

    peak_bytes: int
    op: OpId
    fixed_bytes: int
    keep_bytes: int
    read_bytes: int
    write_bytes: int
    workspace_bytes: int
    other_bytes: int


def working_set(problem: Problem, units: Units | None = None) -> WorkingSet:
    """Return the largest working set of any op of the program, and what it is made of."""
    units = units or build_units(problem)
    level = units.floor_bytes + _needed(problem, units)
    t = int(np.argmax(level))
    return _parts(problem, t, int(level[t]))


def cost_floor(problem: Problem, units: Units) -> int:
    """Return a bound on the cost of any plan: every op once, the cheaper of each op and its alternatives."""
    saved: dict[tuple[OpId, int], int] = {}  # by each unit: several may save together
    for a, unit in enumerate(units.units):
        for fate in unit.fates:
            for q, alternative in fate.instead:
                gain = problem.ops[q].cost_ns - problem.ops[alternative].cost_ns
                saved[q, a] = max(saved.get((q, a), 0), gain)
    return problem.program_cost_ns() - sum(saved.values())


def _needed(problem: Problem, units: Units) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Bytes of unit values that must be there at each position after the turn, whatever is decided."""
    n = len(problem.program)
    alternatives: dict[OpId, list[OpId]] = {}
    for unit in units.units:
        for fate in unit.fates:
            for q, alternative in fate.instead:
                alternatives.setdefault(q, []).append(alternative)
    for o in units.joint.values():
        own = problem.ops[o].instead_of
        assert own is not None
        alternatives[own].append(o)
    extra = np.zeros(n, np.int64)
    pinned = {v for u in units.units if len(u.fates) == 1 for v in u.values}
    for unit in units.units:
        if len(unit.fates) == 1:
            for h in unit.fates[0].held:
                extra[h.last_forward + 1 : h.last_backward + 1] += h.size_bytes
    for t in range(problem.turn + 1, n):
        options = [problem.program[t], *alternatives.get(problem.program[t], [])]
        own = scratch_bytes(problem, options[0])
        extra[t] += min(_unit_reads(problem, units, o, pinned) + scratch_bytes(problem, o) - own for o in options)
    return extra


def _unit_reads(problem: Problem, units: Units, o: OpId, pinned: set[int]) -> int:
    known = units.unit_of.keys() - pinned
    return sum(problem.value_bytes[v] for v in set(problem.ops[o].reads) if v in known)


def _parts(problem: Problem, t: int, peak: int) -> WorkingSet:
    size = problem.value_bytes
    op = problem.ops[problem.program[t]]
    done = {v for o in problem.program[:t] for v in problem.ops[o].writes}
    parts = [
        problem.fixed_bytes,
        sum(size[v] for v in (problem.keep & done) - set(op.reads)),
        sum(size[v] for v in set(op.writes)),
        sum(size[v] for v in set(op.reads)),
        op.workspace_bytes,
    ]
    # An alternative of the op may read less, or want less scratch, than the op itself.
    over = max(0, sum(parts) - peak)
    parts[3], over = max(0, parts[3] - over), max(0, over - parts[3])
    fixed, keep, writes, reads, workspace = [*parts[:4], parts[4] - over]
    other = peak - fixed - keep - writes - reads - workspace
    return WorkingSet(peak, problem.program[t], fixed, keep, reads, writes, workspace, other)
