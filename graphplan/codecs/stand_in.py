"""Activations that backward ops ask little of: one bit an element, or nothing at all, stands in for them.

What each op reads is in `readers.READERS`; the ops themselves run, on values of the same sides or of the same shape
(`functions.stand_in`). Readers that need values still read the activation. A bool, all of whose value is its side,
can be unpacked for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphplan import functions
from graphplan.codecs.find import (
    Call,
    backward_readers,
    base_of,
    decode,
    encode,
    instead,
    packed,
    saved_nodes,
    target_of,
)
from graphplan.codecs.readers import Reads, reads_of
from graphplan.graph import Graph, GraphOp
from graphplan.in_place import operands_of
from graphplan.instructions import Emitter, Encoded, Instruction

Side = tuple[str, tuple[float, ...]]  # a key of functions.SIDES and its constants
Asked = tuple[GraphOp, Reads, Side | None]
WHOLE: Side = ("true", ())  # all that a bool holds


@dataclass(frozen=True, slots=True)
class StandIn:
    """Encodes what all the undemanding backward readers of an activation need, and runs them from that."""

    name: str
    of: Callable[[torch.dtype], bool]
    exact: bool = True

    def find(self, graph: Graph, first_id: int) -> tuple[list[Encoded], list[Instruction]]:
        """Return an encoding for every activation of the codec's dtypes with such a reader, and for every bool."""
        encoded: list[Encoded] = []
        made: list[Instruction] = []
        readers, operands = backward_readers(graph), operands_of(graph)
        for node, storage in saved_nodes(graph):
            val = node.meta["val"]
            if not self.of(val.dtype) or val.numel() < 8:
                continue
            asked = undemanding(graph, node, storage, readers[storage])
            sides = sides_of(asked)
            whole = val.dtype is torch.bool and functions.is_dense(val)
            if whole:
                sides.setdefault(WHOLE)
            if not asked and not whole:
                continue
            nbytes = len(sides) * functions.packed_bytes(val.numel())
            name = f"{node.name}__{'mask' if sides else 'shape'}"
            new = packed(first_id + len(encoded), name, nbytes, storage, self.name)
            encoded.append(new)
            made.append(encode(node, storage, new, functions.pack_sides, packing(sides)))
            if whole:
                geometry = (tuple(val.shape), tuple(val.stride()))
                made.append(decode(node, storage, new, "unpack", functions.unpack_bits, geometry))
            made.extend(run_from(graph, storage, asked, new, operands, "from"))
        return encoded, made


def undemanding(graph: Graph, node: fx.Node, storage: int, readers: Iterable[GraphOp]) -> list[Asked]:
    """Return the backward readers of the activation `node` that need no values of it, and what they need."""
    found = [(op, _need(graph, op, node, storage)) for op in readers]
    return [(op, *need) for op, need in found if need is not None]


def sides_of(asked: Iterable[Asked]) -> dict[Side, None]:
    """Return the sides that readers ask for, each once, in the order of their bits."""
    return dict.fromkeys(side for _, _, side in asked if side is not None)


def packing(sides: Iterable[Side]) -> tuple[list[str], list[float]]:
    """Return what `functions.pack_sides` takes beside the activation."""
    return [side for side, _ in sides], [c for _, own in sides for c in own]


def run_from(
    graph: Graph, storage: int, asked: list[Asked], new: Encoded, operands: dict[int, int], prefix: str
) -> list[Instruction]:
    """Return the instructions that run undemanding readers from `new`, the bits of the sides that they ask for."""
    made, sides = [], list(sides_of(asked))
    for op, reads, side in asked:
        if side is None:
            made.append(_from_shape(graph, op, storage, reads, new, f"{prefix}_shape"))
        else:
            at = sides.index(side), side
            made.append(_from_mask(graph, op, storage, reads, new, at, operands.get(op.id), f"{prefix}_mask"))
    return made


def _need(graph: Graph, op: GraphOp, node: fx.Node, storage: int) -> tuple[Reads, Side | None] | None:
    """Return what `op` reads of the activation `node` and on which side of what; None if it reads values."""
    at = [i for i, a in enumerate(op.node.args) if isinstance(a, fx.Node) and storage in graph.storages_of[a.name]]
    others = [a for i, a in enumerate(op.node.args) if i not in at]
    nested = [n for n in op.node.all_input_nodes if n not in op.node.args and storage in graph.storages_of[n.name]]
    if len(at) != 1 or nested or op.node.kwargs or not op.repeatable:
        return None
    reads = reads_of(op.node, at[0])
    if reads is None or reads.side is None:
        return None if reads is None else (reads, None)
    if not _elementwise_in(graph, op, op.node.args[at[0]], node, others):
        return None
    consts = tuple(op.node.args[i] for i in reads.consts)
    return reads, (reads.side, tuple(float(c) for c in consts))  # type: ignore[arg-type]


def _elementwise_in(graph: Graph, op: GraphOp, arg: Any, node: fx.Node, others: list[Any]) -> bool:
    """Return whether `arg` is `node`, element for element, and nothing in `op` is broadcast but single numbers."""
    a, b, result = arg.meta["val"], node.meta["val"], op.node.meta["val"]
    if base_of(graph, arg) is not node or not functions.is_dense(b) or not isinstance(result, torch.Tensor):
        return False
    same = a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()
    shapes = [o.meta["val"].shape for o in others if isinstance(o, fx.Node)]
    return same and result.shape == b.shape and all(s in (b.shape, ()) for s in shapes)


def _from_shape(graph: Graph, op: GraphOp, storage: int, reads: Reads, new: Encoded, suffix: str) -> Instruction:
    like = _like(op.node.args[reads.argument])
    fill = isinstance(op.node.meta["val"], torch.Tensor) and _like(op.node) == like

    def call(out: Emitter) -> Call:
        form = functions.from_shape(target_of(op.node), reads.argument)
        return form, (out.load_encoded(new.id), *like, fill, *_others(op, reads, out))

    return instead(graph, op, storage, new, suffix, call)


def _from_mask(
    graph: Graph,
    op: GraphOp,
    storage: int,
    reads: Reads,
    new: Encoded,
    at: tuple[int, Side],
    operand: int | None,
    suffix: str,
) -> Instruction:
    part, side = at
    over = [i for i, a in enumerate(op.node.args) if isinstance(a, fx.Node) and operand in graph.storages_of[a.name]]
    values = list(functions.SIDES[side[0]].values(*side[1]))
    dtype, _, stride = _like(op.node)
    like = _like(op.node.args[reads.argument])

    def call(out: Emitter) -> Call:
        form = functions.from_sides(target_of(op.node), reads.argument, over[0] if out.takes_over else None)
        return form, (out.load_encoded(new.id), part, values, *like, dtype, stride, *_others(op, reads, out))

    return instead(graph, op, storage, new, suffix, call, operand if over else None)


def _like(node: Any) -> functions.Like:
    val = node.meta["val"]
    return val.dtype, tuple(val.shape), tuple(val.stride())


def _others(op: GraphOp, reads: Reads, out: Emitter) -> Any:
    """Return the op's arguments without the activation."""
    args = (*op.node.args[: reads.argument], *op.node.args[reads.argument + 1 :])
    return fx.map_arg(args, out.load)


BITMASK = StandIn("bitmask", lambda dtype: dtype is torch.bool)
STAND_IN = StandIn("stand_in", lambda dtype: dtype.is_floating_point)
