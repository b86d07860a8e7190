"""ReLU outputs as one bit an element, where the backward only asks which elements were positive: 32 times smaller.

`threshold_backward` reads the bits directly. Other backward readers of the same output still need it whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphplan import functions
from graphplan.codecs.find import backward_readers, base_of, saved_nodes
from graphplan.graph import Graph, GraphOp
from graphplan.instructions import Emitter, Encoded, Instruction

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class ReluMask:
    """Packs which elements are above ReLU's threshold, and runs threshold_backward from the bits."""

    name: str = "relu_mask"
    exact: bool = True

    def find(self, graph: Graph, first_id: int) -> tuple[list[Encoded], list[Instruction]]:
        """Return an encoding for every dense activation that a threshold_backward reads."""
        encoded: list[Encoded] = []
        made: list[Instruction] = []
        by_node = {op.node: op for op in graph.ops}
        for node, storage in saved_nodes(graph):
            readers = [by_node[r] for r in backward_readers(graph, storage) if _reads_mask_of(graph, r, node)]
            if not readers or not functions.is_dense(node.meta["val"]):
                continue
            nbytes = functions.packed_bytes(node.meta["val"].numel())
            like = torch.empty(nbytes, dtype=torch.uint8, device="meta")
            new = Encoded(first_id + len(encoded), f"{node.name}__mask", nbytes, storage, self.name, like)
            encoded.append(new)
            made.append(_encode(node, storage, new, readers[0].node.args[2]))
            made.extend(_reader(graph, op, node, storage, new) for op in readers)
        return encoded, made


def _reads_mask_of(graph: Graph, reader: fx.Node, node: fx.Node) -> bool:
    """Return whether `reader` is a threshold_backward whose mask is `node`, element for element."""
    if reader.target is not aten.threshold_backward.default or reader.args[2] != 0:
        return False
    grad, mask = reader.args[0], reader.args[1]
    if not isinstance(mask, fx.Node) or not isinstance(grad, fx.Node) or base_of(graph, mask) is not node:
        return False
    a, b = mask.meta["val"], node.meta["val"]
    same = a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()
    return bool(same) and not set(graph.storages_of[grad.name]) & set(graph.storages_of[node.name])


def _encode(node: fx.Node, storage: int, new: Encoded, threshold: object) -> Instruction:
    def encode(out: Emitter) -> None:
        out.store_encoded(new.id, out.call(functions.pack_above, (out.load(node), threshold), new.name))

    return Instruction(new.name, "encode", None, (storage,), (new.id,), True, encode)


def _reader(graph: Graph, op: GraphOp, node: fx.Node, storage: int, new: Encoded) -> Instruction:
    grad = op.node.args[0]
    assert isinstance(grad, fx.Node)
    val = node.meta["val"]

    def emit(out: Emitter) -> None:
        args = (out.load(grad), out.load_encoded(new.id), tuple(val.shape), tuple(val.stride()))
        out.store(op.node, out.call(functions.threshold_backward_packed, args, op.name))

    reads = (*(s for s in op.reads if s != storage and not graph.storages[s].kind.fixed), new.id)
    return Instruction(f"{op.name}__from_mask", "variant", op.id, reads, op.writes, True, emit)


RELU_MASK = ReluMask()
