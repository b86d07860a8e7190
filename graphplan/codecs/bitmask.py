"""Bool activations (dropout masks, comparison results) as one bit an element: 8 times smaller, exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphplan import functions
from graphplan.codecs.find import saved_nodes
from graphplan.graph import Graph
from graphplan.instructions import Emitter, Encoded, Instruction


@dataclass(frozen=True, slots=True)
class Bitmask:
    """Packs a bool storage after its last forward read, unpacks it before its first backward read."""

    name: str = "bitmask"
    exact: bool = True

    def find(self, graph: Graph, first_id: int) -> tuple[list[Encoded], list[Instruction]]:
        """Return an encoding for every dense bool activation."""
        encoded: list[Encoded] = []
        made: list[Instruction] = []
        for node, storage in saved_nodes(graph):
            val = node.meta["val"]
            if val.dtype is not torch.bool or not functions.is_dense(val) or val.numel() < 8:
                continue
            nbytes = functions.packed_bytes(val.numel())
            like = torch.empty(nbytes, dtype=torch.uint8, device="meta")
            new = Encoded(first_id + len(encoded), f"{node.name}__mask", nbytes, storage, self.name, like)
            encoded.append(new)
            made.extend(_pair(node, storage, new))
        return encoded, made


def _pair(node: fx.Node, storage: int, new: Encoded) -> tuple[Instruction, Instruction]:
    val = node.meta["val"]

    def encode(out: Emitter) -> None:
        out.store_encoded(new.id, out.call(functions.pack_bits, (out.load(node),), new.name))

    def decode(out: Emitter) -> None:
        args = (out.load_encoded(new.id), tuple(val.shape), tuple(val.stride()))
        out.store(node, out.call(functions.unpack_bits, args, f"{node.name}__unpack"))

    return (
        Instruction(new.name, "encode", None, (storage,), (new.id,), True, encode),
        Instruction(f"{node.name}__unpack", "decode", None, (new.id,), (storage,), True, decode),
    )


BITMASK = Bitmask()
