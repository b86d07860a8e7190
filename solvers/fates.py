"""What may happen to a unit: kept, dropped and recomputed, or encoded; and what each fate costs."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import NamedTuple

from solvers.problem import Kind, OpId, Problem, ValueId


class Span(NamedTuple):
    """Where the program writes and reads one value: positions in `program`, not op ids.

    A read that takes the value over ends its life one position earlier: from there on the memory is another's.
    """

    write: int
    last_forward: int  # last position up to the turn with memory of its own; the write when nothing reads it there
    last: int  # the same over the whole program
    backward: tuple[int, ...]  # reads after the turn, ascending


@dataclass(frozen=True, slots=True)
class Held:
    """One value of a unit under one fate: `dropped` ones leave after `last_forward` and may come back."""

    value: ValueId
    size_bytes: int
    last_forward: int
    last_backward: int  # last program read after the turn that still reads this value; -1: none
    dropped: bool


@dataclass(frozen=True, slots=True)
class Fate:
    """One way to treat a unit. Positions are program positions; `first_read` is len(program) for "never"."""

    name: str
    held: tuple[Held, ...]
    cost_ns: int = 0  # paid when chosen: the encode, and what the alternatives cost more than their originals
    restore: tuple[OpId, ...] = ()  # ops that bring the dropped values back, in order
    restore_ns: int = 0
    parents: tuple[ValueId, ...] = ()  # what `restore` reads from outside
    first_read: int = 0  # first program read of a dropped value
    transient_bytes: int = 0  # in use while restoring, above the unit's own values
    encode: OpId | None = None
    encode_at: int = -1  # the encode runs right after this position
    encoded: tuple[ValueId, ...] = ()
    encoded_bytes: int = 0
    encoded_until: int = -1  # last program position whose alternative reads the encoding
    decodes: bool = False  # `restore` reads the encoding, which therefore lives until then
    instead: tuple[tuple[OpId, OpId], ...] = ()  # (backward program op, what runs in its place)
    swaps: tuple[tuple[int, int], ...] = ()  # (position, workspace bytes that its alternative adds)
    noise_ppb: int = 0


@dataclass(slots=True)
class Draft:
    """A unit in the making: values, the ops that restore them (none: not recomputable), program position."""

    values: tuple[ValueId, ...]
    restore: tuple[OpId, ...]
    position: int


def value_spans(problem: Problem) -> dict[ValueId, Span]:
    """Return where the program writes and reads each value that it writes."""
    write: dict[ValueId, int] = {}
    reads: dict[ValueId, list[int]] = {}
    for t, o in enumerate(problem.program):
        for v in problem.ops[o].reads:
            reads[v].append(t)
        for v in problem.ops[o].writes:
            write[v], reads[v] = t, []
    taken, spans = {op.takes_over for op in problem.ops}, {}
    for v, w in write.items():
        own = reads[v]  # ascending: no sorting, no search, as this runs for every unrolled schedule
        if v in taken:
            own = [t - (problem.ops[problem.program[t]].takes_over == v) for t in own]
        before, after = bisect_right(own, problem.turn), bisect_right(reads[v], problem.turn)
        forward = max(w, own[before - 1]) if before else w
        last = max(forward, own[-1]) if own else forward
        spans[v] = Span(w, forward, last, tuple(dict.fromkeys(reads[v][after:])))
    return spans


def encoders(problem: Problem) -> list[tuple[ValueId, OpId]]:
    """Return (value, encode op) of every codec; the value is what its decodes write, else its first read."""
    decoded = {v: set(op.writes) for op in problem.ops if op.kind is Kind.DECODE for v in op.reads}
    found = []
    for o, op in enumerate(problem.ops):
        if op.kind is not Kind.ENCODE or not op.reads:
            continue
        back = set().union(*(decoded.get(e, set()) for e in op.writes))
        found.append((next((v for v in op.reads if v in back), op.reads[0]), o))
    return found


def scratch_bytes(problem: Problem, o: OpId) -> int:
    """Return the workspace of an op, less what it takes over."""
    op = problem.ops[o]
    return op.workspace_bytes - (0 if op.takes_over is None else problem.value_bytes[op.takes_over])


class FateMaker:
    """Prices fates; holds what would otherwise be searched for again for every unit."""

    def __init__(self, problem: Problem, spans: dict[ValueId, Span], drafts: list[Draft]) -> None:
        """Index the problem."""
        self.problem, self.spans = problem, spans
        self.position = {o: t for t, o in enumerate(problem.program)}
        self.forward = {v for v, s in spans.items() if s.write < problem.turn}
        self.wanted = {v for d in drafts for o in d.restore for v in problem.ops[o].reads}
        self.encoders: dict[ValueId, list[OpId]] = {}
        for v, o in encoders(problem):
            if problem.ops[o].noise_ppb > problem.noise_limit_ppb:
                continue
            self.encoders.setdefault(v, []).append(o)
        self.readers: dict[ValueId, list[OpId]] = {}
        for o, op in enumerate(problem.ops):
            for v in op.reads:
                self.readers.setdefault(v, []).append(o)

    def fates(self, draft: Draft) -> tuple[Fate, ...]:
        """Return every fate of a draft, keep first."""
        fates = [self.keep(draft.values)]
        if draft.restore:
            fates.append(self.drop(draft, fates[0], ()))
        for v in draft.values:
            if self.spans[v].backward:
                for o in self.encoders.get(v, ()):
                    fates.extend(self.codecs(draft, v, o))
        return tuple(fates)

    def keep(self, values: tuple[ValueId, ...]) -> Fate:
        """Return the fate that keeps `values` until their last backward read."""
        spans, size = self.spans, self.problem.value_bytes
        last = [max(spans[v].backward, default=-1) for v in values]
        held = tuple(Held(v, size[v], spans[v].last_forward, b, False) for v, b in zip(values, last, strict=True))
        return Fate("keep", held, first_read=len(self.problem.program))

    def drop(self, draft: Draft, keep: Fate, covered: tuple[int, ...]) -> Fate:
        """Return the fate that drops the draft's values; `covered` reads need them no more."""
        ops, spans = self.problem.ops, self.spans
        reads = [t for v in draft.values for t in spans[v].backward if t not in covered]
        inside = {v for o in draft.restore for v in ops[o].writes}
        outside = dict.fromkeys(v for o in draft.restore for v in ops[o].reads if v not in inside)
        return Fate(
            "drop",
            tuple(_without(h, spans[h.value], covered) for h in keep.held),
            restore=draft.restore,
            restore_ns=sum(ops[o].cost_ns for o in draft.restore),
            parents=tuple(outside),
            first_read=min(reads, default=len(self.problem.program)),
            transient_bytes=_transient(self.problem, draft),
        )

    def codecs(self, draft: Draft, v: ValueId, encode: OpId) -> list[Fate]:
        """Return the fates that one encode op opens: decode, or read the encoding in place where possible."""
        ops = self.problem.ops
        made = set(ops[encode].writes)
        users = sorted({o for e in made for o in self.readers.get(e, ())})
        decodes = [
            o
            for o in users
            if ops[o].kind is Kind.DECODE and v in ops[o].writes and self.forward >= set(ops[o].reads) - made
        ]
        decode = decodes[0] if decodes else None
        instead = self._alternatives(made, users)
        fates = [] if decode is None else [self._codec(draft, v, encode, decode, ())]
        if instead:
            covered = {self.position[q] for q, _ in instead}
            if not ops[encode].noise_ppb:  # noise buys nothing while the value is there
                fates.append(self._beside(self._codec(draft, v, encode, None, instead)))
            left = [t for t in self.spans[v].backward if t not in covered]
            if decode is not None or draft.restore or not (left or v in self.wanted):
                fates.append(self._codec(draft, v, encode, decode, instead))
        return fates

    def _alternatives(self, made: set[ValueId], users: list[OpId]) -> tuple[tuple[OpId, OpId], ...]:
        """Pair backward program ops with the cheapest op that reads `made` in their place."""
        ops, best = self.problem.ops, dict[OpId, OpId]()
        for o in users:
            q = ops[o].instead_of
            if q is None or self.position.get(q, -1) <= self.problem.turn or not ops[q].repeatable:
                continue
            if set(ops[o].writes) == set(ops[q].writes) and set(ops[o].reads) - made <= set(ops[q].reads):
                best[q] = min(best.get(q, o), o, key=lambda i: ops[i].cost_ns)
        return tuple(sorted(best.items()))

    def _codec(
        self,
        draft: Draft,
        v: ValueId,
        encode: OpId,
        decode: OpId | None,
        instead: tuple[tuple[OpId, OpId], ...],
    ) -> Fate:
        ops, made = self.problem.ops, self.problem.ops[encode].writes
        covered = tuple(self.position[q] for q, _ in instead)
        kept = self.keep(draft.values)
        drop = self.drop(Draft((v,), draft.restore, draft.position), self.keep((v,)), covered)
        restore = draft.restore if decode is None else (decode,)
        parents = drop.parents if decode is None else tuple(w for w in ops[decode].reads if w not in made)
        return Fate(
            ops[encode].name + (" (read in place)" if instead else ""),
            tuple(_without(h, self.spans[v], covered) if h.value == v else h for h in kept.held),
            cost_ns=ops[encode].cost_ns + sum(ops[alt].cost_ns - ops[q].cost_ns for q, alt in instead),
            restore=restore,
            restore_ns=sum(ops[o].cost_ns for o in restore),
            parents=parents,
            first_read=drop.first_read,
            transient_bytes=drop.transient_bytes if decode is None else ops[decode].workspace_bytes,
            encode=encode,
            encode_at=self._encode_at(encode),
            encoded=made,
            encoded_bytes=sum(self.problem.value_bytes[e] for e in made),
            encoded_until=max(covered, default=-1),
            decodes=decode is not None,
            instead=instead,
            swaps=tuple(
                (self.position[q], scratch_bytes(self.problem, o) - scratch_bytes(self.problem, q)) for q, o in instead
            ),
            noise_ppb=ops[encode].noise_ppb,
        )

    def _beside(self, fate: Fate) -> Fate:
        """Keep the value for its other readers, beside the encoding: some alternatives are faster, too."""
        held = tuple(replace(h, dropped=False) for h in fate.held)
        never = len(self.problem.program)
        kept = replace(fate, name=fate.name + " (and kept)", held=held, first_read=never)
        return replace(kept, restore=(), restore_ns=0, parents=(), transient_bytes=0)

    def _encode_at(self, encode: OpId) -> int:
        """Right after the last read before the turn (the turn itself is the user's code), before a take-over."""
        reads, turn = self.problem.ops[encode].reads, self.problem.turn
        read = [
            self.position.get(o, -1) - (self.problem.ops[o].takes_over == v) for v in reads for o in self.readers[v]
        ]
        return max([*(self.spans[v].write for v in reads), *(t for t in read if t < turn)])


def _without(held: Held, span: Span, covered: tuple[int, ...]) -> Held:
    last = max((t for t in span.backward if t not in covered), default=-1)
    return Held(held.value, held.size_bytes, held.last_forward, last, True)


def _transient(problem: Problem, draft: Draft) -> int:
    """Bytes in use at the worst moment of the restore ops, above the draft's own values."""
    size = problem.value_bytes
    last = {v: i for i, o in enumerate(draft.restore) for v in problem.ops[o].reads}
    live: set[ValueId] = set()
    worst = 0
    for i, o in enumerate(draft.restore):
        live |= set(problem.ops[o].writes)
        after = {v for v in live if v in draft.values or last.get(v, -1) > i}
        taken = problem.ops[o].takes_over
        held = live - ({taken} - after if taken is not None else set())
        worst = max(worst, sum(size[v] for v in held) + problem.ops[o].workspace_bytes)
        live = after
    return max(0, worst - sum(size[v] for v in draft.values))
