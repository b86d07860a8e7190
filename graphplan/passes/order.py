"""order: the ops of each half of a Graph in an order that needs less memory at once.

Two neighbours change places where that lowers the higher of their two moments. No other moment changes, and the same
sums are taken in the same order, so that every bit stays. The traced order is the start; a weight's gradient comes in
front of the input's where the activation that it reads is the larger, and an update stands where its gradient is final.

Then an op that writes more than its inputs hold goes behind the highest moment, if that lowers it: a wide layer's
gradient is returned at the end, whenever it is made, and what it is made of is small.

At a moment are counted: what the half wrote and still reads, what the op writes, and the saved activations that it
reads. Others are left out, because a plan may drop them and recompute them later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

from torch import fx

from graphplan.graph import Graph, GraphOp, StorageKind
from graphplan.in_place import operands_of

TRIFLE = 64  # gains below this part of the half's highest moment are not worth another order than the traced one
FAR_TRIFLE = 1024  # the same, of far moves: small, so that a smaller batch, which gains less by them, makes them, too
_THERE = frozenset({StorageKind.OUTPUT, StorageKind.TANGENT})  # whatever the order of the backward


def reorder(graph: Graph) -> bool:
    """Move the nodes of `graph.module` in place; return whether any op has another place.

    What follows from the order (`ops`) is then to be read off the module again.
    """
    late = _late_readers(graph)
    taken = operands_of(graph)
    order: list[GraphOp] = []
    for backward in (False, True):
        half = [op for op in graph.ops if op.backward is backward]
        order += _Half(graph, half, taken, late).rearranged()
    if [op.id for op in order] == list(range(len(order))):
        return False
    _move(graph, order)
    return True


def _late_readers(graph: Graph) -> dict[int, int]:
    """Return, for each fixed storage, the backward ops that read it or what is recomputed from it, as bits.

    An update of it must stay behind all of these (DECISIONS 23).
    """
    readers: dict[int, list[GraphOp]] = {}
    for op in graph.ops:
        for s in op.reads:
            readers.setdefault(s, []).append(op)
    bits: dict[int, int] = {}

    def of(storage: int) -> int:
        return _union(1 << op.id if op.backward else bits[op.id] for op in readers.get(storage, ()))

    for op in reversed(graph.ops):
        if not op.backward:
            bits[op.id] = _union(of(s) for s in op.writes)
    return {s.id: of(s.id) for s in graph.storages if s.kind.fixed}


def _union(masks: Iterable[int]) -> int:
    total = 0
    for mask in masks:
        total |= mask
    return total


def _overwritten(graph: Graph, op: GraphOp) -> set[int]:
    """Return the storages that the op changes: of its first operand, and of an update's parameter and its state."""
    if "graphplan_in_place" not in op.node.meta:
        return set()
    first = set(graph.storages_of[op.node.all_input_nodes[0].name])
    if "graphplan_update" not in op.node.meta:
        return first
    return first | {s for s in op.reads if graph.storages[s].kind is StorageKind.STATE}


@dataclass(slots=True)
class _Half:
    """One half's ops; `of[i]` are figures of op i, `last[s]` is the last op of the half that reads storage s."""

    graph: Graph
    ops: Sequence[GraphOp]
    taken: dict[int, int]
    late: dict[int, int]
    reads: dict[int, set[int]] = field(default_factory=dict)  # of what the half wrote
    saved: dict[int, int] = field(default_factory=dict)  # bytes read of what the half did not write
    added: dict[int, int] = field(default_factory=dict)
    unread: dict[int, int] = field(default_factory=dict)  # bytes written that nobody reads
    changed: dict[int, set[int]] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    trifle: int = 0

    def __post_init__(self) -> None:
        storages, kept = self.graph.storages, self.graph.returned
        own = {s for op in self.ops for s in op.writes}
        read = {s for op in self.ops for s in op.reads}
        for op in self.ops:
            self.reads[op.id] = own.intersection(op.reads) - kept
            others = (storages[s] for s in op.reads if s not in own)
            self.saved[op.id] = sum(s.nbytes for s in others if not s.kind.fixed and s.kind not in _THERE)
            self.added[op.id] = self._bytes(op.writes)
            self.unread[op.id] = self._bytes(s for s in op.writes if s not in read and s not in kept)
            self.changed[op.id] = _overwritten(self.graph, op)
        self.last = self._last(self.ops)
        self.trifle = self._highest(self.ops)[0] // TRIFLE

    def rearranged(self) -> list[GraphOp]:
        """Return the ops after every exchange and every far move that helps."""
        order = self._exchanged()
        while (lower := self._postponed(order)) is not None:
            order = lower
        return order

    def _last(self, order: Sequence[GraphOp]) -> dict[int, int]:
        return {s: op.id for op in order for s in self.reads[op.id]}

    def _exchanged(self) -> list[GraphOp]:
        """Return the ops after every exchange that helps."""
        order = list(self.ops)
        wait = deque(range(1, len(order)))
        waiting = set(wait)
        while wait:
            t = wait.popleft()
            waiting.discard(t)
            a, b = order[t - 1], order[t]
            if self._bound(a, b) or not self._helps(a.id, b.id):
                continue
            order[t - 1], order[t] = b, a
            self.last.update((s, a.id) for s in self.reads[a.id] & self.reads[b.id] if self.last[s] == b.id)
            new = [u for u in (t - 1, t + 1) if 0 < u < len(order) and u not in waiting]
            wait.extend(new)
            waiting.update(new)
        return order

    def _bound(self, a: GraphOp, b: GraphOp) -> bool:
        """Whether `a` must come before `b`."""
        changed, by_a = self.changed[b.id], self.changed[a.id]
        if (a.random and b.random) or not {*a.writes, *by_a}.isdisjoint(b.reads) or not changed.isdisjoint(a.reads):
            return True
        return any(self.late.get(s, 0) >> a.id & 1 for s in changed)

    def _helps(self, a: int, b: int) -> bool:
        """Whether the higher moment is lower with `b` in front of `a`.

        What both read dies behind the second of them.
        """
        both = self.reads[a] & self.reads[b]
        now = max(self._at(a), self._then(a) + self._at(b))
        instead = max(self._at(b, both), self._then(b, both) + self._at(a))
        return now - instead > self.trifle

    def _postponed(self, order: Sequence[GraphOp]) -> list[GraphOp] | None:
        """Return the ops with one of them moved as far as it can, where the highest moment is lower then.

        None: none of those up to that moment helps.
        """
        top, at = self._highest(order)
        trifle = top // FAR_TRIFLE
        gains = {t: self._gain(order[t]) for t in range(at + 1)}
        for t in sorted((t for t in gains if gains[t] > trifle), key=gains.__getitem__, reverse=True):
            end = next((u for u in range(t + 1, len(order)) if self._bound(order[t], order[u])), len(order))
            moved = [*order[:t], *order[t + 1 : end], order[t], *order[end:]]
            before, self.last = self.last, self._last(moved)
            if end > at and top - self._highest(moved)[0] > trifle:
                return moved
            self.last = before
        return None

    def _gain(self, op: GraphOp) -> int:
        """Return the bytes that the op writes beyond all that it reads, which may have to be held until then."""
        held = (s for s in op.reads if not self.graph.storages[s].kind.fixed)
        return self.added[op.id] - self.unread[op.id] - self._bytes(held)

    def _highest(self, order: Sequence[GraphOp]) -> tuple[int, int]:
        """Return the bytes at the highest moment of an order, and its place there."""
        level = highest = place = 0
        for t, op in enumerate(order):
            now = level + self._at(op.id)
            if now > highest:
                highest, place = now, t
            level += self._then(op.id)
        return highest, place

    def _at(self, i: int, still: Set[int] = frozenset()) -> int:
        """Return the bytes at op i beyond what was there before it, where `still` is read later."""
        s = self.taken.get(i, -1)
        taken = self._bytes([s]) if self.last.get(s) == i and s not in still else 0
        return self.added[i] + self.saved[i] - taken

    def _then(self, i: int, still: Set[int] = frozenset()) -> int:
        """Return the bytes that op i leaves beyond what was there before it, where `still` is read later."""
        dead = (s for s in self.reads[i] if self.last[s] == i and s not in still)
        return self.added[i] - self.unread[i] - self._bytes(dead)

    def _bytes(self, storages: Iterable[int]) -> int:
        return sum(self.graph.storages[s].nbytes for s in storages)


def _move(graph: Graph, order: Sequence[GraphOp]) -> None:
    """Put the ops' nodes in `order`, every view and item in front of its first reader."""
    nodes = [n for n in graph.module.graph.nodes if n.op == "call_function"]
    ops = {op.node for op in graph.ops}
    end = graph.module.graph.output_node()
    placed: set[fx.Node] = set()

    def place(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source.op == "call_function" and source not in ops and source not in placed:
                place(source)  # with what it is a view of
        placed.add(node)
        end.prepend(node)

    for op in order:
        place(op.node)
    for node in nodes:
        if node not in placed:
            place(node)
    graph.module.recompile()
