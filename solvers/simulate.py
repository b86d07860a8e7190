"""`simulate`: the one definition of "fits". Slow, obvious, and the only judge of a schedule."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from solvers.problem import OpId, Problem, Schedule, ValueId


class InvalidSchedule(ValueError):
    """A schedule that cannot be executed; the message names the step, the op and the value."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a schedule costs: `bytes_at[t]` are in use while step t runs, `peak_bytes` is their maximum.

    `noise_ppb` is the noise of its encodes, each counted once.
    """

    cost_ns: int
    peak_bytes: int
    peak_step: int
    bytes_at: tuple[int, ...]
    noise_ppb: int = 0


class Accesses(Protocol):
    """What `take_overs` needs to know of an op: a Problem's `Op` has it, and so has an instruction of a graph."""

    @property
    def reads(self) -> tuple[ValueId, ...]:
        """Values read."""

    @property
    def writes(self) -> tuple[ValueId, ...]:
        """Values written."""

    @property
    def takes_over(self) -> ValueId | None:
        """The value whose memory the write may use."""


def simulate(problem: Problem, schedule: Schedule) -> Usage:
    """Execute `schedule` on paper and return its Usage.

    While step t runs, in use are: `fixed_bytes`, the workspace of its op, and every live value. A value is live from
    the step that writes it to its last read before the next write (at least during the write itself); a value to keep
    is live from its last write to the end. A value that is taken over (`take_overs`) is live until the step before:
    its memory then is that of the value written.

    Raises:
        InvalidSchedule: a read of a value that is not live, an op that must run exactly once does not (or runs out of
            the program's order), a value to keep is missing at the end, or its encodes add more noise than the
            problem allows.
    """
    _check_once(problem, schedule)
    noise = sum(problem.ops[o].noise_ppb for o in set(schedule))
    if noise > problem.noise_limit_ppb:
        raise InvalidSchedule(f"its encodes add {noise} ppb of noise; the limit is {problem.noise_limit_ppb}")
    spans = _lifespans(problem, schedule)
    delta = [0] * (len(schedule) + 1)
    for value, start, last in spans:
        delta[start] += problem.value_bytes[value]
        delta[last + 1] -= problem.value_bytes[value]
    bytes_at, level, cost = [], problem.fixed_bytes, 0
    for t, o in enumerate(schedule):
        level += delta[t]
        bytes_at.append(level + problem.ops[o].workspace_bytes)
        cost += problem.ops[o].cost_ns
    peak = max(bytes_at, default=problem.fixed_bytes)
    return Usage(cost, peak, bytes_at.index(peak) if bytes_at else 0, tuple(bytes_at), noise)


def take_overs(ops: Sequence[Accesses], schedule: Schedule, turn: OpId, keep: Set[ValueId]) -> dict[int, ValueId]:
    """Return {step: the value taken over there}: read for the last time, written on the same side of `turn`.

    What is saved across the turn is never written over: a backward pass may be run again.
    """
    late, after = dict[ValueId, bool](), False
    candidates = []
    for t, o in enumerate(schedule):
        v = ops[o].takes_over
        if v is not None and late.get(v) is after:
            candidates.append(t)
        after = after or o == turn
        late.update(dict.fromkeys(ops[o].writes, after))
    if not candidates:
        return {}
    wanted, needed, found = set(candidates), set(keep), dict[int, ValueId]()
    for t in reversed(range(len(schedule))):
        op = ops[schedule[t]]
        if t in wanted and op.takes_over is not None and op.takes_over not in needed:
            found[t] = op.takes_over
        needed.difference_update(op.writes)
        needed.update(op.reads)
    return found


def live_at(problem: Problem, schedule: Schedule, step: int) -> tuple[ValueId, ...]:
    """Return the values that are live while `step` runs, largest first."""
    live = [v for v, start, last in _lifespans(problem, schedule) if start <= step <= last]
    return tuple(sorted(live, key=lambda v: (-problem.value_bytes[v], v)))


def fits(problem: Problem, schedule: Schedule | None) -> bool:
    """Return whether `schedule` exists, is valid and stays within the budget."""
    if schedule is None:
        return False
    try:
        return simulate(problem, schedule).peak_bytes <= problem.budget_bytes
    except InvalidSchedule:
        return False


def _lifespans(problem: Problem, schedule: Schedule) -> list[tuple[ValueId, int, int]]:
    """Return (value, first step, last step) of every version of every value, both steps included."""
    spans: list[tuple[ValueId, int, int]] = []
    current: dict[ValueId, tuple[int, int]] = {}
    taken = take_overs(problem.ops, schedule, problem.program[problem.turn], problem.keep)
    for t, o in enumerate(schedule):
        op = problem.ops[o]
        for v in op.reads:
            if v not in current:
                raise InvalidSchedule(f"step {t}: op {o} {op.name!r} reads value {v} before it is written")
            current[v] = (current[v][0], t - 1 if taken.get(t) == v else t)
        for v in op.writes:
            if v in current:
                spans.append((v, *current[v]))
            current[v] = (t, t)
    for v in sorted(problem.keep):
        if v not in current:
            raise InvalidSchedule(f"value {v} {problem.value_names[v]!r} must be live at the end, but is never written")
        current[v] = (current[v][0], len(schedule) - 1)
    spans.extend((v, start, last) for v, (start, last) in current.items())
    return spans


def _check_once(problem: Problem, schedule: Schedule) -> None:
    for t, o in enumerate(schedule):
        if not 0 <= o < len(problem.ops):
            raise InvalidSchedule(f"step {t}: no op {o}")
    once = [o for o in problem.program if not problem.ops[o].repeatable]
    ran = [o for o in schedule if not problem.ops[o].repeatable]
    if ran == once:
        return
    for i, o in enumerate(ran):
        if i >= len(once) or once[i] != o:
            expected = f"expected op {once[i]} {problem.ops[once[i]].name!r}" if i < len(once) else "expected no more"
            raise InvalidSchedule(
                f"op {o} {problem.ops[o].name!r} must run exactly once and in the program's order; {expected}"
            )
    missing = once[len(ran)]
    raise InvalidSchedule(f"op {missing} {problem.ops[missing].name!r} must run exactly once, but never does")
