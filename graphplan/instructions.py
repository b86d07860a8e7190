"""The instructions that a plan may name: a graph's ops, their repeatable variants, and the codecs' halves.

They follow from the graph alone, so that a plan made elsewhere means the same here.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from graphplan import functions
from graphplan.graph import Graph, GraphOp, StorageKind
from graphplan.in_place import batch_norm_, operands_of

aten = torch.ops.aten
BUFFERS = "copy_buffers"
TURN = "turn"
END = "end"
Argument = Any


class Emitter(Protocol):
    """Where an instruction writes its fx nodes: the rewritten graph, or a small one that is timed."""

    @property
    def takes_over(self) -> bool:
        """Whether the instruction is to write over its `takes_over`."""

    def load(self, node: fx.Node) -> fx.Node:
        """Return the present copy of the captured `node`'s value."""

    def load_encoded(self, storage: int) -> fx.Node:
        """Return the node that holds encoded storage `storage`."""

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Argument, ...],
        name: str,
        kwargs: dict[str, Argument] | None = None,
    ) -> fx.Node:
        """Add a call."""

    def key(self) -> Argument:
        """Return what differs from one step to the next: an integer, the key of lossy encodes."""

    def copy(self, node: fx.Node, name: str) -> fx.Node:
        """Add a copy of the captured `node` that reads the present copies of its inputs."""

    def store(self, node: fx.Node, value: fx.Node) -> None:
        """Make `value` the present copy of the captured `node`."""

    def store_encoded(self, storage: int, value: fx.Node) -> None:
        """Make `value` the holder of encoded storage `storage`."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One thing that a plan can do at a step. `reads` and `writes` are storage ids.

    `takes_over` is a storage that it reads and can write over, where that is the storage's last read.
    """

    name: str
    kind: str  # "op" | "variant" | "encode" | "decode" | "buffers" | "turn" | "end"
    op: int | None  # the graph op that it runs or stands in for
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    repeatable: bool
    emit: Callable[[Emitter], None] = field(repr=False, compare=False)
    takes_over: int | None = None
    # What it does beyond its op: it costs as much as both. Timed as a whole, the op's own scatter would hide it.
    beyond: Callable[[Emitter], None] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Loss:
    """What is decoded differs: `mean_square_error` of an activation, which grows and shrinks with its noise.

    Noise is replayed for the code of the name `reference`, and scaled to the others that name it.
    """

    reference: str
    mean_square_error: Callable[[Tensor], float]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A storage that only a codec makes. `like` is a meta tensor of its shape and dtype."""

    id: int
    name: str
    nbytes: int
    of: int  # the storage that it encodes
    codec: str
    like: Tensor = field(repr=False, compare=False)
    loss: Loss | None = field(default=None, repr=False, compare=False)

    @property
    def lossy(self) -> bool:
        """Whether what is decoded from it differs."""
        return self.loss is not None


@dataclass(frozen=True, slots=True)
class Instructions:
    """All instructions for one graph. The first `len(program)` run the program once, in order.

    `released` are the tangents that are freed at their last use.
    """

    items: tuple[Instruction, ...]
    encoded: tuple[Encoded, ...]
    program: tuple[int, ...]
    turn: int
    released: frozenset[str] = frozenset()

    def place(self, op: int) -> int:
        """Return the position in the program of a graph's op: between forward and backward ops stand others."""
        forward = self.turn - (self.turn > 0 and self.items[self.turn - 1].kind == "buffers")
        return op if op < forward else op + 1 + self.turn - forward

    def by_name(self) -> dict[str, int]:
        """Return the id of each instruction by its name."""
        found = {item.name: i for i, item in enumerate(self.items)}
        assert len(found) == len(self.items), "two instructions of one name"
        return found

    def joint(self) -> dict[int, tuple[int, ...]]:
        """Return for each instruction that runs an op from several codes those that run it from one of them each."""
        codes, several = {e.id for e in self.encoded}, dict[int, list[int]]()
        alone: dict[tuple[int | None, int], int] = {}
        for i, item in enumerate(self.items):
            own = [s for s in item.reads if s in codes]
            if item.kind == "variant" and len(own) == 1:
                alone[item.op, own[0]] = i
            elif item.kind == "variant" and own:
                several[i] = own
        return {i: tuple(alone[self.items[i].op, s] for s in own) for i, own in several.items()}


class Codec(Protocol):
    """Finds what it can encode in a graph. One file and one line in CODECS add one."""

    @property
    def name(self) -> str:
        """The key in CODECS."""

    @property
    def exact(self) -> bool:
        """Whether decoding gives back every bit."""

    def find(self, graph: Graph, first_id: int) -> tuple[list[Encoded], list[Instruction]]:
        """Return encoded storages (ids from `first_id` on) and the instructions that make and read them."""


def instructions_of(graph: Graph, codecs: Sequence[Codec], released: frozenset[str] = frozenset()) -> Instructions:
    """Return every instruction that `graph` offers with `codecs`; `released` tangents need not be held to the end."""
    operands = operands_of(graph)
    items = [_op_instruction(graph, op, operands.get(op.id)) for op in graph.ops if not op.backward]
    if graph.mutations:
        items.append(_buffers(graph))
    turn = len(items)
    items.append(_turn(graph))
    items.extend(_op_instruction(graph, op, operands.get(op.id)) for op in graph.ops if op.backward)
    items.append(_end(graph, released))
    program = tuple(range(len(items)))
    for op in graph.ops:
        variant = _variant(graph, op, operands.get(op.id))
        if variant is not None:
            items.append(variant)
    encoded: list[Encoded] = []
    for codec in codecs:
        new, made = codec.find(graph, len(graph.storages) + len(encoded))
        encoded.extend(new)
        items.extend(made)
    return Instructions(tuple(_told_apart(graph, items, encoded)), tuple(encoded), program, turn, released)


def _told_apart(graph: Graph, items: list[Instruction], encoded: list[Encoded]) -> Iterator[Instruction]:
    """Say in the names of an op's instructions which code each runs from, where there are several: plans name them."""
    often, of = Counter(item.name for item in items), {e.id: graph.storages[e.of].name for e in encoded}
    for item in items:
        codes = [of[s] for s in item.reads if s in of]
        yield replace(item, name=f"{item.name}_of_{'_and_'.join(codes)}") if often[item.name] > 1 and codes else item


def results_of(graph: Graph, node: fx.Node, writes: Iterable[int]) -> list[fx.Node]:
    """Return the captured nodes (getitems of a multi-output op, else the node) that hold `writes`."""
    wanted = set(writes)
    items = [u for u in node.users if u.target is operator.getitem]
    if not items:
        return [node]
    if "graphplan_in_place" in node.meta:
        return items  # the ones that share an operand's memory have new values, too
    return [u for u in items if wanted.intersection(graph.storages_of[u.name])]


def _op_instruction(graph: Graph, op: GraphOp, operand: int | None) -> Instruction:
    def emit(out: Emitter) -> None:
        value = out.copy(op.node, op.name)
        for result in results_of(graph, op.node, op.writes):
            if result is op.node:
                out.store(result, value)
            else:
                out.store(result, out.call(operator.getitem, (value, result.args[1]), result.name))

    repeatable = op.repeatable and not _held_by_caller(graph, op)
    return Instruction(op.name, "op", op.id, _planned(graph, op.reads), op.writes, repeatable, emit, operand)


def _held_by_caller(graph: Graph, op: GraphOp) -> bool:
    """Whether a result is an output: to run the op again would let go of nothing, and make a second one."""
    return any(graph.storages[s].kind is StorageKind.OUTPUT for s in op.writes)


def _planned(graph: Graph, storages: Iterable[int]) -> tuple[int, ...]:
    return tuple(s for s in storages if not graph.storages[s].kind.fixed)


def _buffers(graph: Graph) -> Instruction:
    """After the forward: buffers take their new values, which are let go of before the loss runs."""
    reads = dict.fromkeys(s for _, n in graph.mutations for s in graph.storages_of[n])
    nodes = graph.nodes

    def emit(out: Emitter) -> None:
        for i, name in graph.mutations:
            placeholder = nodes[graph.primals[i].node]
            out.call(
                aten.copy_.default,
                (out.load(placeholder), out.load(nodes[name])),
                f"{placeholder.name}__update",
            )

    return Instruction(BUFFERS, "buffers", None, _planned(graph, reads), (), False, emit)


def _turn(graph: Graph) -> Instruction:
    """Between forward and backward: outputs go to the caller, the loss runs."""
    reads = dict.fromkeys(s for n in graph.forward_outputs for s in graph.storages_of[n])
    writes = tuple(s.id for s in graph.storages if s.kind is StorageKind.TANGENT)
    return Instruction(TURN, "turn", None, _planned(graph, reads), writes, False, lambda out: None)


def _end(graph: Graph, released: frozenset[str]) -> Instruction:
    """After the backward: every gradient, and every tangent that autograd still holds, is there."""
    held = (n for n in graph.tangents if n is not None and n not in released)
    reads = dict.fromkeys(s for n in (*graph.gradients, *held) if n is not None for s in graph.storages_of[n])
    return Instruction(END, "end", None, _planned(graph, reads), (), False, lambda out: None)


def _variant(graph: Graph, op: GraphOp, operand: int | None) -> Instruction | None:
    """Return the pure part of an op that must itself run only once."""
    if op.backward or _held_by_caller(graph, op):
        return None
    if op.node.target is aten._native_batch_norm_legit_functional.default and op.node.args[5] is True:
        return _batch_norm_again(graph, op, operand)
    if op.node.target is aten.native_dropout.default and op.node.args[2] is True:
        return _dropout_again(graph, op)
    return None


def _batch_norm_again(graph: Graph, op: GraphOp, operand: int | None) -> Instruction:
    """Batch norm by its own op without running statistics: bit-equal, and it updates nothing."""
    x, weight, bias, _mean, _var, training, momentum, eps = op.node.args
    results = [r for r in results_of(graph, op.node, op.writes) if r.args[1] < 3]  # type: ignore[operator]
    writes = tuple(s for r in results for s in graph.storages_of[r.name])
    args = (x, weight, bias, training, momentum, eps)
    reads = dict.fromkeys(s for a in args if isinstance(a, fx.Node) for s in graph.storages_of[a.name])

    def emit(out: Emitter) -> None:
        loaded = tuple(out.load(a) if isinstance(a, fx.Node) else a for a in args)
        if out.takes_over:
            value = out.call(batch_norm_, (*loaded[:3], None, None, *loaded[3:]), op.name)
        else:
            value = out.call(aten._native_batch_norm_legit.no_stats, loaded, op.name)
        for r in results:
            out.store(r, out.call(operator.getitem, (value, r.args[1]), r.name))

    return Instruction(f"{op.name}__pure", "variant", op.id, _planned(graph, reads), writes, True, emit, operand)


def _dropout_again(graph: Graph, op: GraphOp) -> Instruction | None:
    """Dropout from the mask that was drawn: no second draw, the same products."""
    results = {r.args[1]: r for r in results_of(graph, op.node, op.writes)}
    x, p = op.node.args[0], op.node.args[1]
    if set(results) != {0, 1} or not isinstance(x, fx.Node):
        return None
    val = results[0].meta["val"]
    if val.device.type != "cpu" and val.dtype is not torch.float32:
        return None  # CUDA's fused kernel rounds once where the two products round twice
    reads = dict.fromkeys((*graph.storages_of[x.name], *graph.storages_of[results[1].name]))

    def emit(out: Emitter) -> None:
        out.store(
            results[0],
            out.call(functions.dropout_from_mask, (out.load(x), out.load(results[1]), p), results[0].name),
        )

    writes = graph.storages_of[results[0].name]
    return Instruction(f"{op.name}__apply", "variant", op.id, _planned(graph, reads), writes, True, emit)
