"""More than one recompute a value: a schedule is unrolled into a program of its own, and planned once more.

The *unrolled* problem has the steps of a schedule as its program, each write a value of its own, and its turn at any
step after the original one. A value that is there at the new turn, whether from the forward or from a restore, may
then leave and come back: recomputed for the second time, or the third. Units, fates, flips and profiles are as for the
first time. Folded back, the versions of a value become one again, which never takes more memory, and `simulate`
judges. Only what the forward wrote is written again: the plans are of class `ANY_PLAN`.

One recompute at a time, iterated; Bartan et al. 2023 (Moccasin) allow a fixed number of intervals a value at once.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from random import Random

import numpy as np

from solvers.any_plan import COEFFICIENT, LARGEST, relax_any, spaced_rows
from solvers.checkpoints import encoded
from solvers.evaluate import keep_everything, peaks, profiles, to_schedule
from solvers.greedy import descend, polish
from solvers.ladder import Low
from solvers.problem import Kind, Op, OpId, Problem, Schedule, ValueId
from solvers.roundings import round_any
from solvers.search import Search
from solvers.simulate import Usage, simulate, take_overs
from solvers.spare import repeats, spare
from solvers.units import Units, build_units

TURNS = 6  # steps at which a schedule is turned, the highest peaks first, before it counts as as low as can be
STEP = 2.5e-5  # of the work (see `Search.spend`) of unrolling a schedule, for each of its steps
LESS = 0.999  # of the area above the target must be left at most, for a turn to count
SHARES = (1.0, 1.1, 1.3)  # of the least single peak: budgets of the plans that are brought down further
HALVINGS = 4  # of the range of budgets from whose best plans of one recompute others are made
THRESHOLDS = (0.1, 0.5, 0.9)  # of roundings
TARGETS = (0.25, 0.5)  # of the way from the floor to the least peak so far: budgets of linear programs
LINEAR_ROUNDS, NEW_ROWS = 3, 6  # linear programs for a budget; rows that each adds for every rounding
LOWER_ROUNDS = 2  # linear programs for each of TARGETS: measured, no third one lowered a peak
SEVERAL = (3, 6, 12, 24, 48)  # neighbouring repeats that are left out at once
LEFT_OUT = 0.5  # of them, every other time
ORDERS = 2  # random ones in which repeats are left out
WIDE, SLACK = 0.1, 1.003  # a gap at which a larger budget is searched first, and how much larger
PATIENCE, PATIENT = 0.5, 30.0  # tries without gain, of the repeats, for each so many seconds of the limit begun
ENOUGH = 400  # stop where bound and peak differ by less than one part in this many


@dataclass(frozen=True, slots=True)
class Unrolled:
    """A schedule as a problem: `origin[o]` is the original op that op o of `problem` runs."""

    problem: Problem
    origin: tuple[OpId, ...]

    def fold(self, schedule: Schedule) -> Schedule:
        """Return a schedule of the unrolled problem as one of the original."""
        return tuple(self.origin[o] for o in schedule)


@dataclass(slots=True)
class _Unroller:
    problem: Problem
    turn: int  # the step at which the unrolled problem turns
    ops: list[Op] = field(default_factory=list)
    origin: list[OpId] = field(default_factory=list)
    variants: list[tuple[Op, OpId]] = field(default_factory=list)
    values: list[ValueId] = field(default_factory=list)  # new value -> original
    written: list[int] = field(default_factory=list)  # new value -> step
    version: dict[ValueId, ValueId] = field(default_factory=dict)  # original value -> newest version
    alternatives: dict[OpId, list[OpId]] = field(default_factory=dict)  # what may run in the place of an op

    def __post_init__(self) -> None:
        """Find the alternatives of each op."""
        for i, op in enumerate(self.problem.ops):
            if op.instead_of is not None and op.kind is Kind.COMPUTE:
                self.alternatives.setdefault(op.instead_of, []).append(i)

    def step(self, o: OpId, taken: ValueId | None, repeatable: bool) -> None:
        """Add one step of the schedule; `taken` is the value that it takes over there."""
        op, t = self.problem.ops[o], len(self.ops)
        alternatives = self.alternatives.get(o, []) if not op.repeatable else []
        before = dict(self.version) if alternatives else self.version
        reads = tuple(self.version[v] for v in op.reads)
        over = None if taken is None else self.version[taken]
        # A value that crosses the new turn, or is read there, keeps its memory.
        if over is not None and (t == self.turn or (self.written[over] >= self.turn) != (t > self.turn)):
            over = None
        for v in op.writes:
            self.version[v] = len(self.values)
            self.values.append(v)
            self.written.append(t)
        writes = tuple(self.version[v] for v in op.writes)
        self.ops.append(Op(op.name, reads, writes, op.cost_ns, op.workspace_bytes, repeatable, takes_over=over))
        self.origin.append(o)
        for i in alternatives:
            op = self.problem.ops[i]
            if before.keys() >= set(op.reads):
                reads, writes = tuple(before[v] for v in op.reads), tuple(self.version[v] for v in op.writes)
                self.variants.append((replace(op, reads=reads, writes=writes, instead_of=t, takes_over=None), i))

    def finish(self) -> Unrolled:
        """Return the problem that the steps make."""
        sizes, names = self.problem.value_bytes, self.problem.value_names
        made = replace(
            self.problem,
            ops=(*self.ops, *(op for op, _ in self.variants)),
            program=tuple(range(len(self.ops))),
            turn=self.turn,
            value_bytes=tuple(sizes[v] for v in self.values),
            value_names=tuple(names[v] for v in self.values),
            keep=frozenset(self.version[v] for v in self.problem.keep),
        )
        return Unrolled(made, (*self.origin, *(i for _, i in self.variants)))


def unroll(problem: Problem, schedule: Schedule, turn: int) -> Unrolled:
    """Return `schedule` as a problem that turns at step `turn`, which is not before the original turn."""
    taken = take_overs(problem.ops, schedule, problem.program[problem.turn], problem.keep)
    forward = set(problem.program[: problem.turn])
    made = _Unroller(problem, turn)
    for t, o in enumerate(schedule):
        op = problem.ops[o]
        again = op.kind is Kind.COMPUTE and (o in forward or op.instead_of in forward)
        made.step(o, taken.get(t), op.repeatable and again)
    return made.finish()


def lower_again(search: Search, problem: Problem, schedule: Schedule, floor_bytes: int) -> Schedule:
    """Return a schedule of smaller peak that recomputes more, or the same one, within the work of `search`."""
    peak = simulate(problem, schedule).peak_bytes
    step = (peak - floor_bytes) / 2
    while search.left() > 0 and step > peak / ENOUGH:
        target = max(float(floor_bytes), peak - step)
        found, usage = _fit(search, problem, schedule, target)
        if usage.peak_bytes < peak:
            schedule, peak = found, usage.peak_bytes
        if peak > target:
            step /= 2
        step = min(step, peak - floor_bytes)
    return schedule


def lower_rounded(search: Search, units: Units, schedule: Schedule, floor_bytes: int) -> Schedule:
    """Return a schedule of smaller peak from linear programs at budgets towards the floor, or the same one."""
    problem, peak = search.problem, simulate(search.problem, schedule).peak_bytes
    for share in TARGETS:
        if peak - floor_bytes <= peak / ENOUGH:
            break
        target = floor_bytes + share * (peak - floor_bytes)
        for start in roundings(search, units, int(target), LOWER_ROUNDS):
            if search.left() <= 0 or peak - floor_bytes <= peak / ENOUGH:
                return schedule
            found, usage = _fit(search, problem, start, target)
            if usage.peak_bytes < peak:
                schedule = lower_again(search, problem, found, floor_bytes)
                peak = simulate(problem, schedule).peak_bytes
    return schedule


def roundings(search: Search, units: Units, budget: int, programs: int = LINEAR_ROUNDS) -> Iterator[Schedule]:
    """Return roundings of linear programs at a budget, each with the rows which those of the one before break.

    Their bounds, valid at any smaller budget, too, are remembered in `search`.
    """
    rows, seen = spaced_rows(search.problem), set[Schedule]()
    for _ in range(programs):
        largest = min(LARGEST, int(search.left() / 2 / COEFFICIENT))
        relaxation = relax_any(units, budget, rows, search.clock() / 2, largest)
        if relaxation is None:
            return
        search.spend(COEFFICIENT * relaxation.size)
        search.any_bound_ns = max(search.any_bound_ns, relaxation.bound_ns)
        for threshold in THRESHOLDS:
            start = round_any(units, relaxation, threshold)
            if start not in seen:
                seen.add(start)
                rows.update(_above(search.problem, start, budget, rows))
                yield start


def fit_again(search: Search, units: Units, low: Low) -> None:
    """Offer plans that recompute more than once, for a budget below the peak of `low`, which do not."""
    random = Random(search.limits.seed)
    if search.schedule is not None:
        _offer_spared(search, search.schedule, random)
    budget, seen = search.problem.budget_bytes, set[Schedule]()
    for start in chain(_encoded(search, units), roundings(search, units, budget), _polished(search, units, low)):
        if start in seen:
            continue
        found, usage = _fit(search, search.problem, start, budget)
        if found not in seen and usage.peak_bytes <= budget:
            _offer_spared(search, found, random)
        seen.update((start, found))
        if _close(search):
            return
    if not _close(search, WIDE):
        _from_above(search, random)
    _renew(search, random)


def _encoded(search: Search, units: Units) -> Iterator[Schedule]:
    """Return what flips make of plans that encode, with the least area above the budget, by one recompute a value."""
    for fates in encoded(units):
        if search.left() <= 0:
            return
        yield to_schedule(units, descend(search, units, fates, search.problem.budget_bytes, by_area=True))


def _offer_spared(search: Search, schedule: Schedule, random: Random) -> None:
    search.offer(spare(search, schedule))
    for _ in range(ORDERS):
        search.offer(spare(search, schedule, random))


def _from_above(search: Search, random: Random) -> None:
    """Offer what neighbourhoods find at a slightly larger budget, brought down to this one.

    Right at the least peak, plans lie far apart (strategic oscillation, Glover 1977).
    """
    problem, limits = search.problem, replace(search.limits, seconds=max(0.0, search.left() / 2), progress=None)
    above = Search(problem.with_budget(int(SLACK * problem.budget_bytes)), limits, search.solver)
    for schedule in (*limits.known, *(() if search.schedule is None else (search.schedule,))):
        if above.offer(schedule).peak_bytes <= above.problem.budget_bytes:
            _offer_spared(above, schedule, random)
    _renew(above, random)
    if above.schedule is not None:
        found, usage = _fit(search, problem, above.schedule, problem.budget_bytes)
        if usage.peak_bytes <= problem.budget_bytes:
            _offer_spared(search, found, random)


def _close(search: Search, gap: float = 0.0) -> bool:
    cost = search.cost_ns
    return cost is not None and cost - search.any_bound_ns <= max(gap, search.limits.gap) * cost


def _renew(search: Search, random: Random) -> None:
    """Leave out some neighbouring repeats of the best plan and bring what is left down to the budget again.

    Large neighbourhood search (Shaw 1998), until half as many tries in a row as there are repeats gained nothing; a
    longer limit allows more.
    """
    problem, misses = search.problem, 0
    patience = PATIENCE * math.ceil(search.limits.seconds / PATIENT)
    best = search.schedule
    repeated = [] if best is None else repeats(problem, best)
    while best is not None and misses < patience * len(repeated) and search.left() > 0 and not _close(search):
        rest = _without_some(best, repeated, random)
        found, usage = _fit(search, problem, rest, problem.budget_bytes)
        if usage.peak_bytes <= problem.budget_bytes:
            search.offer(spare(search, found))
        misses += 1
        if search.schedule is not None and search.schedule != best:
            best, misses = search.schedule, 0
            repeated = repeats(problem, best)


def _without_some(schedule: Schedule, repeated: list[int], random: Random) -> Schedule:
    several = random.choice(SEVERAL)
    first = random.randrange(max(1, len(repeated) - several + 1))
    share = random.choice((LEFT_OUT, 1.0))
    gone = {t for t in repeated[first : first + several] if random.random() < share}
    return tuple(o for t, o in enumerate(schedule) if t not in gone)


def _polished(search: Search, units: Units, low: Low) -> Iterator[Schedule]:
    """Return the best plans of one recompute for budgets between their least peak and that of everything kept.

    Which of them is best to bring down further cannot be told from them: ever more of them, each between two before.
    """
    top = int(profiles(units, keep_everything(units)[None, :]).peak_bytes()[0])
    parts = [0.0, 1.0, *(i / 2**k for k in range(1, HALVINGS + 1) for i in range(1, 2**k, 2))]
    for part in parts:
        if search.left() <= 0:
            return
        yield to_schedule(units, polish(search, units, low.vector, low.peak_bytes ** (1 - part) * top**part))


def _above(problem: Problem, schedule: Schedule, budget: int, known: Container[int]) -> list[int]:
    """Return the positions after the turn, not yet known, at which a schedule is highest above a budget."""
    level, position = np.full(len(problem.program), -1, np.int64), -1
    for o, b in zip(schedule, simulate(problem, schedule).bytes_at, strict=True):
        if position + 1 < len(problem.program) and problem.program[position + 1] in (o, problem.ops[o].instead_of):
            position += 1
            if position > problem.turn and position not in known and b > budget:
                level[position] = b
    return peaks(level, NEW_ROWS)


def _fit(search: Search, problem: Problem, schedule: Schedule, target: float) -> tuple[Schedule, Usage]:
    """Bring a schedule down towards `target`, one turn after the other; return that of least peak on the way."""
    usage = simulate(problem, schedule)
    best = schedule, usage
    while best[1].peak_bytes > target and search.left() > 0:
        found = _down(search, problem, schedule, usage, target)
        if found is None:
            break
        schedule, usage = found
        if usage.peak_bytes < best[1].peak_bytes:
            best = found
    return best


def _down(
    search: Search, problem: Problem, schedule: Schedule, usage: Usage, target: float
) -> tuple[Schedule, Usage] | None:
    """Turn at one of the highest peaks and flip: return what has less area above the target; None: no turn helps."""
    for turn in _turns(problem, schedule, usage.bytes_at, target):
        if search.left() <= 0:
            return None
        unrolled = unroll(problem, schedule, turn)
        units = build_units(unrolled.problem)
        search.spend(STEP * len(schedule))
        fates = descend(search, units, keep_everything(units), target, by_area=True)
        if profiles(units, fates[None, :]).excess(target)[0] <= 0:
            fates = polish(search, units, fates, target)
        found = unrolled.fold(to_schedule(units, fates))
        reached = simulate(problem, found)
        if _area(reached, target) < LESS * _area(usage, target):
            return found, reached
    return None


def _area(usage: Usage, target: float) -> float:
    return sum(max(0.0, b - target) for b in usage.bytes_at)


def _turns(problem: Problem, schedule: Schedule, bytes_at: tuple[int, ...], target: float) -> list[int]:
    """Return the highest steps after the turn that are above the target, none close to another."""
    level = np.array(bytes_at, np.int64)
    level[: schedule.index(problem.program[problem.turn]) + 1] = -1
    level[level <= target] = -1
    return peaks(level, TURNS)
