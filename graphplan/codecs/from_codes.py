"""Backward ops run from codes of what they read: decoded, and what was saved beside it made anew where it must fit."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import fx

from graphplan.graph import Graph, GraphOp
from graphplan.instructions import Argument, Emitter, Encoded, Instruction, results_of

aten = torch.ops.aten
FINE = 8  # bits
MOST_TOGETHER = 4  # activations of one op whose codes it reads in any combination: an attention's q, k, v and result


@dataclass(frozen=True, slots=True)
class Coded:
    """An activation and its code; `decode(out, name)` emits what makes it again."""

    node: fx.Node
    storage: int
    code: Encoded
    decode: Callable[[Emitter, str], fx.Node]


@dataclass(frozen=True, slots=True)
class Again:
    """A forward op and, by the backward op's arguments, what it reads and which of its results stand where.

    Exp of a decoded score over the sum of the true ones is no probability: it grows with the error, without bound. With
    FINE bits or more it grows little (measured in DECISIONS 72), and what was saved is read.
    """

    forward: torch._ops.OpOverload
    reads: tuple[int, ...]
    options: tuple[int, ...]
    keywords: tuple[str, ...]
    results: tuple[int, ...]  # arguments that are the forward's results, in order
    decisive: tuple[int, ...]  # decoded arguments that make it necessary


AGAIN: dict[object, Again] = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: Again(
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        (1, 2, 3), (6, 7), ("attn_mask", "scale"), (4, 5), (1, 2),
    ),
}  # fmt: skip


def sums_scores(target: object) -> bool:
    """Return whether a backward op reads the sum of exponentials that its forward saved."""
    return isinstance(target, torch._ops.OpOverload) and any(a.name == "logsumexp" for a in target._schema.arguments)


def subsets(coded: list[Coded]) -> Iterator[tuple[Coded, ...]]:
    """Yield each alone, and where there are not too many all that may be encoded together."""
    most = len(coded) if len(coded) <= MOST_TOGETHER else 1
    for count in range(1, most + 1):
        yield from combinations(coded, count)


def from_codes(graph: Graph, op: GraphOp, some: tuple[Coded, ...], suffix: str, bits: int) -> Instruction:
    """Return the instruction that decodes codes of `bits` an element, runs the backward `op` and lets go."""
    again = None if bits >= FINE else _again(graph, op, some)
    gone, codes = {c.storage for c in some}, tuple(c.code.id for c in some)
    reads = (*(s for s in op.reads if s not in gone and not graph.storages[s].kind.fixed), *codes)

    def emit(out: Emitter) -> None:
        load = _Loads(graph, some, suffix, out)
        value = load.run(op.node, op.name, {} if again is None else load.results(op.node, again))
        for result in results_of(graph, op.node, op.writes):
            item = value if result is op.node else out.call(operator.getitem, (value, result.args[1]), result.name)
            out.store(result, item)
        # A plan's values live through the whole instruction: read once more, or the peak is below the prediction.
        for c in some:
            out.call(aten.detach.default, (out.load_encoded(c.code.id),), f"{c.code.name}__held")
        for a in () if again is None else (op.node.args[i] for i in again.results):
            if isinstance(a, fx.Node) and gone.isdisjoint(graph.storages_of[a.name]):
                out.call(aten.detach.default, (out.load(a),), f"{a.name}__held")

    def beyond(out: Emitter) -> None:
        load = _Loads(graph, some, suffix, out)
        if again is not None:
            load.results(op.node, again)
        for c in some:
            out.store(c.node, load(c.node))

    return Instruction(f"{op.name}__{suffix}", "variant", op.id, reads, op.writes, True, emit, beyond=beyond)


def _again(graph: Graph, op: GraphOp, some: tuple[Coded, ...]) -> Again | None:
    again = AGAIN.get(op.node.target)
    if again is None:
        return None
    decisive = _storages(graph, (op.node.args[i] for i in again.decisive))
    return again if any(c.storage in decisive for c in some) else None


def _storages(graph: Graph, arguments: Iterable[Argument]) -> set[int]:
    return {s for a in arguments if isinstance(a, fx.Node) for s in graph.storages_of[a.name]}


class _Loads:
    """Loads the present copies of nodes: decoded ones, and views of them taken again, where a code stands for them."""

    def __init__(self, graph: Graph, some: tuple[Coded, ...], suffix: str, out: Emitter) -> None:
        self.graph, self.suffix, self.out = graph, suffix, out
        self.of = {c.node: c for c in some}
        self.storages = {c.storage for c in some}
        self.copies: dict[fx.Node, fx.Node] = {}

    def __call__(self, a: fx.Node) -> fx.Node:
        if self.storages.isdisjoint(self.graph.storages_of[a.name]):
            return self.out.load(a)
        if a not in self.copies:
            name, code = f"{a.name}__{self.suffix}", self.of.get(a)
            self.copies[a] = self.run(a, name, {}) if code is None else code.decode(self.out, name)
        return self.copies[a]

    def run(self, node: fx.Node, name: str, made: Mapping[int, fx.Node]) -> fx.Node:
        """Run a captured node on present copies, and on what was `made` for some of its arguments."""
        assert not isinstance(node.target, str)
        args = tuple(made[i] if i in made else fx.map_arg(a, self) for i, a in enumerate(node.args))
        return self.out.call(node.target, args, name, {k: fx.map_arg(a, self) for k, a in node.kwargs.items()})

    def results(self, node: fx.Node, again: Again) -> dict[int, fx.Node]:
        """Run the forward from what was decoded; return its results by the arguments of its backward `node`."""
        given = tuple(fx.map_arg(node.args[i], self) for i in (*again.reads, *again.options))
        words = {k: fx.map_arg(node.kwargs[k], self) for k in again.keywords if k in node.kwargs}
        name = f"{again.forward.overloadpacket.__name__}__{self.suffix}"
        found = self.out.call(again.forward, given, name, words)
        return {a: self.out.call(operator.getitem, (found, i), f"{name}_{i}") for i, a in enumerate(again.results)}
