"""The exact solver of the class `ONE_RECOMPUTE`: epoch rows and cuts, added until `simulate` agrees.

Every round solves a relaxation (CP-SAT, integers all over), reads its fates, simulates them, and adds the positions at
which they do not fit as rows, and what happens between positions as cuts. The bound of every round is therefore valid
for the class, and a plan that fits and meets it is proven.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from ortools.sat.python import cp_model

from solvers.any_plan import any_plan_bound, spaced_rows
from solvers.bounds import ANY_PLAN, ONE_RECOMPUTE, cost_floor
from solvers.checkpoints import checkpointed
from solvers.cuts import explain
from solvers.epochs import Cut, EpochModel
from solvers.evaluate import Fates, keep_everything, peaks, profiles, to_schedule
from solvers.greedy import improve, polish, repair
from solvers.problem import Limits, Problem, Solution, Status
from solvers.relax import LINEAR_SIZE, Beside, LinearProgram, round_all
from solvers.search import Search
from solvers.simulate import Usage
from solvers.units import Units, build_units

Pairs = tuple[tuple[int, int], ...]  # (unit, fate)
Shares = tuple[tuple[float, ...], ...]  # of every fate of every unit, in a linear relaxation

ROUNDS = 200
LINEAR_ROUNDS = 3
LINEAR_SHARE = 0.85  # of the time, which linear relaxations after the first leave to the integers
MENDED = 2  # roundings of one linear program that are repaired, the next one where the last was the best so far
WIDE = 0.01  # a gap after it for which other plans are
TIGHTER = (1, 12)  # rows spread over the backward beside peaks, of linear programs that bound a wide gap better
STARTS, STARTS_SHARE = 4, 0.3  # so many, while this part of the time is left
STRETCHES, OVERLAP = (4, 8), 0.3  # of the forward, in turn, and how much longer than its share of the units each is
STRETCH_SHARE, STRETCHES_SHARE = 0.13, 0.1  # of the time for one at most; what they leave
NEW_ROWS = 3
FIRST_ROWS = 2  # peaks of each known plan
ANY_SECONDS, ANY_SHARE = 1.0, 0.05  # at least, and of the time, for the bound on any plan
SETTLED = 0.99  # of a fate in the linear relaxation
SLICE = 0.4  # of the time left, for one round
LOOSE = 1e-3  # relative gap of a round while its plans still break rows that it does not know


def solve_ilp(problem: Problem, limits: Limits) -> Solution:
    """Return the cheapest plan with one recompute a value, proven where time allows, and a bound for the
    class.

    INFEASIBLE is a proof for the class, not for plans that recompute a value twice.
    """
    units = build_units(problem)
    search = Search(problem, limits, "ilp")
    search.offer(problem.program, keep_everything(units))
    improve(search, units, keep_everything(units), tries=0)
    return prove(search, units)[0]


def prove(search: Search, units: Units, before: Rounds | None = None) -> tuple[Solution, Rounds]:
    """Improve the plan that `search` holds and bound it, until both meet or time is up.

    `before` are the rows and cuts that another budget of the same problem needed: they are as valid here.
    """
    rounds = Rounds.after(before, units, search)
    search.share, search.bound_ns = 1.0 - ANY_SHARE, cost_floor(search.problem, units)
    shares, near = relax(search, rounds), False
    if before is None:
        mend_checkpoints(search, units)
        tighter = tighten(search, rounds)
        for count in STRETCHES:
            free_stretches(search, rounds, count)
        if tighter is not None:
            search.bound_ns = max(search.bound_ns, tighter.wait())
    for _ in range(ROUNDS):
        if search.left() <= 0.05 or closed(search):
            break
        fixed = settled(shares, search.fates) if near else ()
        seconds = min(search.left(), max(SLICE * search.left(), 2.0))
        found = rounds.solve(search.limits, seconds, search.fates, fixed)
        if found.infeasible:
            if search.schedule is None:
                return infeasible(search), rounds
            return answer_any(search, units, rounds), rounds
        search.bound_ns = max(search.bound_ns, math.ceil(found.bound - 1e-6))
        if _take(search, rounds, found):
            break
        near = not near and not found.optimal
    return _answer(search, units, rounds), rounds


def _take(search: Search, rounds: Rounds, found: Found) -> bool:
    """Offer what a round found and learn where it does not fit; return whether it is optimal."""
    units, budget = rounds.units, search.problem.budget_bytes
    for fates in found.others:
        search.offer(to_schedule(units, fates), fates)
    if found.fates is None:
        return False
    usage = search.offer(to_schedule(units, found.fates), found.fates)
    search.report()
    if usage.peak_bytes > budget:
        rounds.learn(found.fates, usage, budget)
        mend(search, units, found.fates)
    elif found.optimal and rounds.gap <= search.limits.gap / 2:
        return True
    elif found.optimal:
        rounds.gap = search.limits.gap / 2
    return False


def _answer(search: Search, units: Units, rounds: Rounds) -> Solution:
    bound = search.bound_ns or 0
    if search.fates is None and search.cost_ns is not None and search.cost_ns < bound:
        return answer_any(search, units, rounds)  # a plan outside the class beats all of it
    any_bound = bound_any(search, rounds)
    return replace(search.answer(bound, ONE_RECOMPUTE), any_bound_ns=any_bound)


def answer_any(search: Search, units: Units, rounds: Rounds | None = None) -> Solution:
    """Return the answer for a budget that only plans of more than one recompute a value fit."""
    rounds = rounds or Rounds.after(None, units, search)
    search.bound_ns = bound_any(search, rounds)
    return replace(search.answer(search.bound_ns, ANY_PLAN), any_bound_ns=search.bound_ns)


def bound_any(search: Search, rounds: Rounds) -> int:
    """Return the best bound on any plan over two row sets, if there is time: spaced ones are sometimes better."""
    budget, search.share = search.problem.budget_bytes, 1.0
    sets = [rounds.rows] if search.any_bound_ns else [spaced_rows(search.problem), rounds.rows]
    for rows in sets:
        if search.any_bound_ns and search.left() <= 0:
            break
        found = any_plan_bound(rounds.units, budget, rows, max(ANY_SECONDS, search.left()))
        search.any_bound_ns = max(search.any_bound_ns, found)
    return search.any_bound_ns


def relax(search: Search, rounds: Rounds) -> Shares:
    """Bound the cost by the linear relaxation, add rows where its roundings do not fit, and mend those.

    Returns the share of every fate of every unit in the last optimum; nothing when there was none.
    """
    units, budget = rounds.units, search.problem.budget_bytes
    shares: Shares = ()
    # Rows of its own: those that roundings break only slow the integer search down.
    rounds = replace(rounds, rows=set(rounds.rows))
    for done in range(LINEAR_ROUNDS):
        late = search.left() <= LINEAR_SHARE * search.limits.seconds
        if closed(search) or (late and done):
            break
        model = rounds.model()
        program = LinearProgram(model)
        if len(program) > LINEAR_SIZE:
            break
        values, bound = program.solve(search.left() / 2)
        if values is None:
            break
        search.bound_ns = max(search.bound_ns or 0, math.ceil(bound))
        shares = tuple(tuple(values[x.index] if len(xs) > 1 else 0.0 for x in xs) for xs in model.chosen)
        plans = round_all(model, values)
        found = profiles(units, plans)
        area = found.excess(budget)
        order = np.lexsort((found.cost_ns, area))
        for k in order[:MENDED]:
            if not mend(search, units, plans[k]):
                break
        new = new_rows(found.bytes_at[:, order[0]], budget, rounds.rows)
        if not new:
            break
        rounds.rows.update(new)
    return shares


def tighten(search: Search, rounds: Rounds) -> Beside | None:
    """Where a wide gap is left, begin to bound the cost by linear programs over more peaks of the plans at once.

    Rows that are added a few at a time, where roundings break them, are neighbours: a long graph would need dozens.
    """
    if closed(search, WIDE):
        return None
    sets = (rounds.rows | start_rows(rounds.units, search.fates, spread=spread) for spread in TIGHTER)
    programs = [LinearProgram(replace(rounds, rows=rows).model()) for rows in sets]
    return Beside([p for p in programs if len(p) <= LINEAR_SIZE], search.left)


def mend_checkpoints(search: Search, units: Units) -> None:
    """Where the linear relaxation left a wide gap, mend the cheapest of the `checkpointed` plans that do not fit."""
    if closed(search, WIDE):
        return
    plans = checkpointed(units)  # the first keeps everything, and `improve` has mended it
    found = profiles(units, plans)
    wide = 1 + np.flatnonzero(found.excess(search.problem.budget_bytes)[1:] > 0)
    for k in wide[np.argsort(found.cost_ns[wide], kind="stable")][:STARTS]:
        if closed(search, WIDE) or search.left() <= STARTS_SHARE * search.limits.seconds:
            break
        if not mend(search, units, plans[k]):
            break


def free_stretches(search: Search, rounds: Rounds, count: int) -> None:
    """Where a wide gap is left, decide one of `count` stretches of the forward after the other, all else as it is best.

    Large neighbourhood search (Shaw 1998): what a long graph's whole program does not find in minutes, its quarters
    find in seconds. Proves nothing. Repeated as long as it helps.
    """
    before = None
    while search.cost_ns != before:
        before = search.cost_ns
        for free in stretches(rounds.units, count):
            late = search.left() <= STRETCHES_SHARE * search.limits.seconds
            if search.fates is None or late or closed(search, WIDE):
                return
            _decide(search, rounds, search.fates, free)


def _decide(search: Search, rounds: Rounds, best: Fates, free: set[int]) -> None:
    """Offer the best plan with the units `free` decided again; mended, where that breaks rows which it did not know."""
    # Rows of its own: those that other stretches broke only slow this one down.
    rounds = replace(rounds, rows=start_rows(rounds.units, best), cuts=list(rounds.cuts))
    fixed = tuple((a, int(m)) for a, m in enumerate(best) if a not in free)
    seconds = min(STRETCH_SHARE * search.limits.seconds, search.left())
    _take(search, rounds, rounds.solve(search.limits, seconds, best, fixed))


def stretches(units: Units, count: int) -> list[set[int]]:
    """Return the units by where the forward reads them last, as `count` sets that overlap; the last ones first."""
    last = [min((h.last_forward for h in u.fates[0].held), default=0) for u in units.units]
    order, share = np.argsort(last, kind="stable"), len(last) / count
    ends = [(int(i * share), math.ceil((i + 1 + OVERLAP) * share)) for i in reversed(range(count))]
    return [set(order[first:end].tolist()) for first, end in ends]


def settled(shares: Shares, fates: Fates | None) -> Pairs:
    """Return the (unit, fate) pairs on which the best plan and the linear relaxation agree.

    With these fixed the rest is a small problem, in which a better plan often lies (RINS; Danna et al. 2005).
    """
    if fates is None:
        return ()
    return tuple((a, int(m)) for a, (m, parts) in enumerate(zip(fates, shares, strict=False)) if parts[m] > SETTLED)


def closed(search: Search, gap: float = 0.0) -> bool:
    """Return whether the best plan meets the bound to within a gap, or to within the one asked for."""
    if search.cost_ns is None or search.bound_ns is None:
        return False
    return search.cost_ns - search.bound_ns <= max(gap, search.limits.gap) * search.cost_ns


def infeasible(search: Search) -> Solution:
    """Return the answer for a budget below the least peak of the class."""
    least = None if search.least is None else search.least[0]
    bound = search.bound_ns or 0
    return Solution(Status.INFEASIBLE, None, bound, ONE_RECOMPUTE, search.solver, search.seconds(), least)


def mend(search: Search, units: Units, fates: Fates) -> bool:
    """Offer the nearest plan to `fates` that does fit; return whether it is the best so far."""
    mended, before = repair(search, units, fates), search.cost_ns
    if mended is not None:
        mended = polish(search, units, mended)
        search.offer(to_schedule(units, mended), mended)
    return search.cost_ns != before


def start_rows(units: Units, *plans: Fates | None, spread: int = 0) -> set[int]:
    """Return the positions of the first memory rows: the turn, the peaks of known plans, `spread` evenly spaced.

    Few rows make a small model: measured, three of them and those that its plans break prove several times faster
    than a dozen more, most of which never bind.
    """
    problem = units.problem
    n, turn = len(problem.program), problem.turn
    rows = {turn, *(int(t) for t in np.linspace(turn + 1, n - 1, spread))} if turn + 1 < n else {turn}
    for fates in (keep_everything(units), *plans):
        if fates is not None:
            rows.update(peaks(profiles(units, fates[None, :]).bytes_at[:, 0], 6 if spread else FIRST_ROWS))
    return rows


def new_rows(level: np.ndarray[tuple[int], np.dtype[np.int64]], above: int, known: set[int]) -> list[int]:
    """Return the positions not yet known at which a profile is highest above a limit."""
    level = np.where(level > above, level, -1)
    level[sorted(known)] = -1
    return peaks(level, NEW_ROWS)


@dataclass(frozen=True, slots=True)
class Found:
    """What one round brought: fates (None: nothing), bound on the objective, other plans met."""

    fates: Fates | None
    bound: float
    infeasible: bool = False
    optimal: bool = False  # to within the round's gap
    objective: int = 0
    others: tuple[Fates, ...] = ()
    work: float = 0.0  # deterministic seconds spent


@dataclass(slots=True)
class Rounds:
    """The rows and cuts known so far. `budget_bytes` None: the peak is minimised."""

    units: Units
    budget_bytes: int | None
    rows: set[int]
    cuts: list[Cut] = field(default_factory=list)
    gap: float = LOOSE
    linear: int = 2  # CP-SAT's linearization_level: 2 proves costs, 1 finds small peaks
    work: float | None = None  # CP-SAT's deterministic seconds a round; None: only the clock counts

    @staticmethod
    def after(before: Rounds | None, units: Units, search: Search) -> Rounds:
        """Return the rounds to begin with: rows and cuts of another budget of the same problem are valid here."""
        rows = start_rows(units, search.fates) | (before.rows if before is not None else set())
        cuts = list(before.cuts) if before is not None else []
        return Rounds(units, search.problem.budget_bytes, rows, cuts)

    def model(self) -> EpochModel:
        """Return the model that the known rows and cuts make."""
        turn = self.units.problem.turn
        after, upto = [t for t in self.rows if t > turn], [t for t in self.rows if t <= turn]
        model = EpochModel(self.units, after, upto, self.budget_bytes)
        for cut in self.cuts:
            model.add_cut(cut, self.budget_bytes)
        return model

    def solve(
        self, limits: Limits, seconds: float, hint: Fates | None, fixed: tuple[tuple[int, int], ...] = ()
    ) -> Found:
        """Solve the relaxation that the known rows and cuts make; with (unit, fate) pairs fixed, it proves nothing."""
        model = self.model()
        for a, m in fixed:
            model.model.add(model.chosen[a][m] == 1)
        if hint is not None:
            model.hint(hint)
        solver = cp_model.CpSolver()
        # One worker with every linear relaxation on: deterministic, and it proves in seconds what two default
        # workers (which leave the linear program out) did not in minutes.
        solver.parameters.num_workers = 1
        solver.parameters.linearization_level = self.linear
        solver.parameters.random_seed = limits.seed
        solver.parameters.relative_gap_limit = self.gap
        solver.parameters.max_time_in_seconds = min(1e6, max(0.05, seconds))
        if self.work is not None:
            solver.parameters.max_deterministic_time = self.work
        listener = _Listener(model, limits)
        status = solver.solve(model.model, listener)
        proof = not fixed
        if status == cp_model.INFEASIBLE:
            return Found(None, 0.0, infeasible=proof)
        bound = solver.best_objective_bound if proof else 0.0
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return Found(None, bound, work=_work(solver))
        optimal = proof and status == cp_model.OPTIMAL
        objective, plans = round(solver.objective_value), tuple(listener.plans)
        return Found(model.read(solver), bound, False, optimal, objective, plans, _work(solver))

    def learn(self, fates: Fates, usage: Usage, limit_bytes: int) -> None:
        """Add the rows at which the plan exceeds the limit, and a cut where rows do not suffice."""
        level = np.full(len(self.units.problem.program), -1, np.int64)
        last = -1
        schedule = to_schedule(self.units, fates)
        originals = {o: q for u, m in zip(self.units.units, fates, strict=True) for q, o in u.fates[m].instead}
        program = self.units.problem.program
        inserted = True
        for step, o in enumerate(schedule):
            if last + 1 < len(program) and originals.get(o, o) == program[last + 1]:
                last += 1
                inserted = inserted and step != usage.peak_step
                if usage.bytes_at[step] > limit_bytes and last not in self.rows:
                    level[last] = usage.bytes_at[step]
        new = peaks(level, NEW_ROWS)
        self.rows.update(new)
        if inserted or not new:
            self.cuts.append(explain(self.units, fates, usage, limit_bytes))


def _work(solver: cp_model.CpSolver) -> float:
    return float(solver.response_proto.deterministic_time)


class _Listener(cp_model.CpSolverSolutionCallback):
    """Collects the plans met on the way, and stops the search when the caller cancels."""

    def __init__(self, model: EpochModel, limits: Limits) -> None:
        super().__init__()
        self.model, self.limits = model, limits
        self.plans: list[Fates] = []

    def on_solution_callback(self) -> None:
        """CP-SAT found a better solution."""
        self.plans = [*self.plans[-7:], self.model.read(self)]
        if self.limits.cancelled is not None and self.limits.cancelled():
            self.stop_search()
