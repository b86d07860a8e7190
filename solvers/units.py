"""Problem -> decision units: what may be kept, dropped or encoded, and what follows from each choice.

A *unit* is one recomputable forward op with the values it restores, bundled; its *fates* are keep, drop (recompute
once, as late as possible) or one of its codecs. A plan of the class that every solver here searches is one fate a
unit: the times follow (`evaluate`). Bundling and the contraction of helpers keep the optimum of the class: keeping a
larger value that only serves to recompute a smaller one never pays.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from solvers.fates import Draft, Fate, FateMaker, Held, Span, encoders, value_spans
from solvers.joint import Joint, joint_alternatives
from solvers.problem import Kind, OpId, Problem, ValueId
from solvers.tables import Int64, Tables, tabulate

MOST_SIBLINGS = 8
TINY = 20  # values of a bundle that make up less than one part in this many are statistics


@dataclass(frozen=True, slots=True)
class Unit:
    """Values that share a fate; `fates[0]` is always keep."""

    name: str
    values: tuple[ValueId, ...]
    fates: tuple[Fate, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all values of the unit."""
        return sum(h.size_bytes for h in self.fates[0].held)


@dataclass(frozen=True, slots=True)
class Units:
    """The decision form of a Problem; `units` are in an order in which restores read only earlier units.

    `base_bytes[t]` is in use at program position t whatever is decided: fixed bytes, workspace, values outside the
    units, and every unit value from its write to its last forward read. `own_bytes[t]` is the part of it that only
    program[t] brings: its workspace and its writes. In each group of `clashes` at most one (unit, fate) holds. `joint`
    says what runs where several fates each want an alternative of their own for the same op.
    """

    problem: Problem
    units: tuple[Unit, ...]
    unit_of: dict[ValueId, int]
    base_bytes: Int64
    own_bytes: Int64
    clashes: tuple[tuple[tuple[int, int], ...], ...]
    joint: Joint
    soft: dict[ValueId, tuple[int, Held]]  # undecided values that a unit's restore writes again, and which unit
    floor_bytes: Int64  # base_bytes without the soft values after their last forward read
    workspace_bytes: Int64  # of program[t]
    program_cost_ns: int
    siblings: tuple[tuple[int, ...], ...]  # units whose restores read the same one; see `moves`
    tables: Tables


def build_units(problem: Problem) -> Units:
    """Return the decision units of `problem`, helpers contracted, in topological order."""
    spans = value_spans(problem)
    drafts = _contract(problem, _recomputable(problem, spans), spans)
    owned = {v for d in drafts for v in d.values}
    for v in sorted({v for v, _ in encoders(problem)} - owned - problem.keep):
        if v in spans and spans[v].write < problem.turn and spans[v].backward:
            drafts.append(Draft((v,), (), spans[v].write))
    maker = FateMaker(problem, spans, drafts)
    units = [Unit(problem.value_names[d.values[0]], d.values, maker.fates(d)) for d in drafts]
    owned = {v for u in units for v in u.values}
    # What a restore reads must stay until then, though nobody decides about it: units with one fate, keep.
    for v in sorted({p for u in units for f in u.fates for p in f.parents} - owned - problem.keep):
        units.append(Unit(problem.value_names[v], (v,), (maker.keep((v,)),)))
    ordered = _topological(units, spans)
    base, own = _base(problem, ordered, spans)
    unit_of = {v: a for a, u in enumerate(ordered) for v in u.values}
    soft = _soft(problem, ordered, spans, unit_of)
    floor = base.copy()
    for _, h in soft.values():
        floor[h.last_forward + 1 : h.last_backward + 1] -= h.size_bytes
    workspace = np.array([problem.ops[o].workspace_bytes for o in problem.program], np.int64)
    joint = joint_alternatives(problem, [f for u in ordered for f in u.fates])
    clashes = _clashes(ordered, joint)
    slot = {v: i for i, v in enumerate(unit_of)}
    tables = tabulate(problem, [u.fates for u in ordered], slot, clashes, (base, own, workspace))
    return Units(
        problem,
        tuple(ordered),
        unit_of,
        base,
        own,
        clashes,
        joint,
        soft,
        floor,
        workspace,
        tables.program_cost_ns,
        _siblings(problem, ordered, unit_of),
        tables,
    )


def rewrites(problem: Problem, fate: Fate) -> frozenset[ValueId]:
    """Return the values that a fate leaves but its restore writes again: maybe gone before it."""
    written = {v for o in fate.restore for v in problem.ops[o].writes}
    return frozenset(written - {h.value for h in fate.held if h.dropped})


def _soft(
    problem: Problem, units: list[Unit], spans: dict[ValueId, Span], unit_of: dict[ValueId, int]
) -> dict[ValueId, tuple[int, Held]]:
    found = {}
    for a, unit in enumerate(units):
        for v in sorted({v for f in unit.fates for v in rewrites(problem, f)} - unit_of.keys() - problem.keep):
            if spans[v].backward:
                held = Held(v, problem.value_bytes[v], spans[v].last_forward, spans[v].backward[-1], False)
                found[v] = (a, held)
    return found


def _recomputable(problem: Problem, spans: dict[ValueId, Span]) -> list[Draft]:
    """One draft for each recompute op that restores forward values from forward values."""
    variants: dict[OpId, list[OpId]] = {}
    for o, op in enumerate(problem.ops):
        if op.instead_of is not None and op.kind is Kind.COMPUTE:
            variants.setdefault(op.instead_of, []).append(o)
    forward = {v for v, s in spans.items() if s.write < problem.turn}
    drafts = []
    for t, p in enumerate(problem.program[: problem.turn]):
        options = [p] if problem.ops[p].repeatable else variants.get(p, [])
        # Largest first: two variants that restore the same value would compete for one unit.
        options.sort(
            key=lambda o: (
                -sum(problem.value_bytes[v] for v in problem.ops[o].writes),
                problem.ops[o].cost_ns,
            )
        )
        taken: set[ValueId] = set()
        for o in options:
            op = problem.ops[o]
            values = _worth_dropping(problem, spans, op.writes)
            if values and not taken & set(op.writes) and forward.issuperset(op.reads):
                taken.update(op.writes)
                drafts.append(Draft(values, (o,), t))
    return drafts


def _worth_dropping(problem: Problem, spans: dict[ValueId, Span], writes: tuple[ValueId, ...]) -> tuple[ValueId, ...]:
    """What of an op's writes a unit decides about: not what must be kept, and no statistics beside a helper.

    A normalisation's output is a helper, its mean and rstd are read in the backward but tiny. They stay;
    otherwise they would tie the output to themselves, and it could not be contracted into its reader.
    """
    values = tuple(v for v in writes if v not in problem.keep)
    helpers = tuple(v for v in values if not spans[v].backward)
    read = _bytes(problem, values) - _bytes(problem, helpers)
    return helpers if helpers and read * TINY <= _bytes(problem, values) else values


def _contract(problem: Problem, drafts: list[Draft], spans: dict[ValueId, Span]) -> list[Draft]:
    """Merge each helper (no backward read) into its only reader if that is no larger."""
    readers, parents = _links(problem, drafts)
    alive = dict(enumerate(drafts))
    helper = {i for i, d in alive.items() if not any(spans[v].backward for v in d.values)}
    # Backwards first: a helper that only unread helpers read is unread itself.
    for i in reversed(range(len(drafts))):
        if not readers[i] and i in helper:
            _remove(alive, readers, parents, i)
    merged = True
    while merged:
        merged = False
        for i in sorted(helper & alive.keys()):
            if len(readers[i]) != 1:
                continue
            (j,) = readers[i]
            if _bytes(problem, drafts[i].values) >= _bytes(problem, drafts[j].values):
                drafts[j].restore = drafts[i].restore + drafts[j].restore
                _remove(alive, readers, parents, i)
                for p in parents[i]:
                    readers[p].add(j)
                parents[j] |= parents[i]
                merged = True
    return list(alive.values())


def _links(problem: Problem, drafts: list[Draft]) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """Return which drafts read what each one restores, and which ones each reads."""
    owner = {v: i for i, d in enumerate(drafts) for v in d.values}
    readers: dict[int, set[int]] = {i: set() for i in range(len(drafts))}
    parents: dict[int, set[int]] = {i: set() for i in range(len(drafts))}
    for i, d in enumerate(drafts):
        for v in problem.ops[d.restore[0]].reads:
            if v in owner and owner[v] != i:
                readers[owner[v]].add(i)
                parents[i].add(owner[v])
    return readers, parents


def _remove(alive: dict[int, Draft], readers: dict[int, set[int]], parents: dict[int, set[int]], i: int) -> None:
    """Remove draft i, which reads its parents no longer."""
    del alive[i]
    for p in parents[i]:
        readers[p].discard(i)


def _topological(units: list[Unit], spans: dict[ValueId, Span]) -> list[Unit]:
    """Order units so that restores read only earlier ones; ties by program position."""
    owner = {v: i for i, u in enumerate(units) for v in u.values}
    before = [{owner[p] for f in u.fates for p in f.parents if p in owner} - {i} for i, u in enumerate(units)]
    after: list[list[int]] = [[] for _ in units]
    for i, parents in enumerate(before):
        for p in parents:
            after[p].append(i)
    missing = [len(b) for b in before]
    ready = [(spans[u.values[0]].write, i) for i, u in enumerate(units) if not missing[i]]
    heapq.heapify(ready)
    ordered = []
    while ready:
        _, i = heapq.heappop(ready)
        ordered.append(units[i])
        for j in after[i]:
            missing[j] -= 1
            if not missing[j]:
                heapq.heappush(ready, (spans[units[j].values[0]].write, j))
    return ordered


def _base(problem: Problem, units: list[Unit], spans: dict[ValueId, Span]) -> tuple[Int64, Int64]:
    n = len(problem.program)
    owned = {v for u in units for v in u.values}
    delta = np.zeros(n + 1, np.int64)
    for v, span in spans.items():
        last = span.last_forward
        if v in problem.keep:
            last = n - 1
        elif v not in owned:
            last = span.last
        delta[span.write] += problem.value_bytes[v]
        delta[last + 1] -= problem.value_bytes[v]
    ops = [problem.ops[o] for o in problem.program]
    workspace = np.array([op.workspace_bytes for op in ops], np.int64)
    taken = [0 if op.takes_over is None else problem.value_bytes[op.takes_over] for op in ops]
    writes = np.array([_bytes(problem, op.writes) for op in ops], np.int64) - np.array(taken, np.int64)
    return problem.fixed_bytes + np.cumsum(delta[:n]) + workspace, workspace + writes


def _siblings(problem: Problem, units: list[Unit], unit_of: dict[ValueId, int]) -> tuple[tuple[int, ...], ...]:
    """Group the units that the backward reads and that can be dropped by the unit that their restores read."""
    children: dict[int, set[int]] = {}
    for a, unit in enumerate(units):
        drop = unit.fates[1] if len(unit.fates) > 1 and unit.fates[1].name == "drop" else None
        if drop is not None and drop.first_read < len(problem.program):
            for p in {unit_of[v] for v in drop.parents if v in unit_of} - {a}:
                children.setdefault(p, set()).add(a)
    groups = (tuple(sorted(group)) for group in children.values() if 1 < len(group) <= MOST_SIBLINGS)
    return tuple(dict.fromkeys(groups))


def _clashes(units: list[Unit], joint: Joint) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Group the fates of several units of which one may hold: all that want an alternative for one op, or each two."""
    wanted: dict[OpId, list[tuple[int, int, OpId]]] = {}
    for a, unit in enumerate(units):
        for m, fate in enumerate(unit.fates):
            for q, o in fate.instead:
                wanted.setdefault(q, []).append((a, m, o))
    groups: list[tuple[tuple[int, int], ...]] = []
    for several in wanted.values():
        pairs = [(x, y) for x, y in combinations(several, 2) if x[0] != y[0]]
        apart = [((a, m), (b, n)) for (a, m, o), (b, n, p) in pairs if frozenset((o, p)) not in joint]
        if len(apart) < len(pairs):
            groups.extend(apart)
        elif pairs:
            groups.append(tuple((a, m) for a, m, _ in several))
    return tuple(dict.fromkeys(groups))


def _bytes(problem: Problem, values: tuple[ValueId, ...]) -> int:
    return sum(problem.value_bytes[v] for v in values)
