"""Max-pool indices in the narrowest integers that hold them: int64 positions inside one input plane."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import fx

from graphplan import functions
from graphplan.codecs.find import saved_nodes
from graphplan.graph import Graph
from graphplan.instructions import Emitter, Encoded, Instruction

aten = torch.ops.aten
_POOLS = {  # op -> number of spatial dimensions; an index is a position in one flattened input plane
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
}
_WIDTHS = (torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True, slots=True)
class Narrow:
    """Casts pool indices to uint8, int16 or int32: the plane's size proves that they fit."""

    name: str = "narrow"
    exact: bool = True

    def find(self, graph: Graph, first_id: int) -> tuple[list[Encoded], list[Instruction]]:
        """Return an encoding for the indices of every max-pool."""
        encoded: list[Encoded] = []
        made: list[Instruction] = []
        for node, storage in saved_nodes(graph):
            dtype = _narrowest(node)
            val = node.meta["val"]
            if dtype is None or not functions.is_dense(val):
                continue
            like = torch.empty_strided(val.shape, val.stride(), dtype=dtype, device="meta")
            nbytes = val.numel() * dtype.itemsize
            new = Encoded(first_id + len(encoded), f"{node.name}__narrow", nbytes, storage, self.name, like)
            encoded.append(new)
            made.extend(_pair(node, storage, new, dtype))
        return encoded, made


def _narrowest(node: fx.Node) -> torch.dtype | None:
    if node.target is not operator.getitem or node.args[1] != 1:
        return None
    pool = node.args[0]
    assert isinstance(pool, fx.Node)
    dims = next((d for op, d in _POOLS.items() if op is pool.target), None)
    if dims is None or node.meta["val"].dtype is not torch.int64:
        return None
    plane = math.prod(pool.args[0].meta["val"].shape[-dims:])  # type: ignore[union-attr]
    return next((d for d in _WIDTHS if plane - 1 <= torch.iinfo(d).max), None)


def _pair(node: fx.Node, storage: int, new: Encoded, dtype: torch.dtype) -> tuple[Instruction, Instruction]:
    wide = node.meta["val"].dtype

    def encode(out: Emitter) -> None:
        out.store_encoded(new.id, out.call(functions.narrow_integers, (out.load(node), dtype), new.name))

    def decode(out: Emitter) -> None:
        value = out.call(functions.widen_integers, (out.load_encoded(new.id), wide), f"{node.name}__widen")
        out.store(node, value)

    return (
        Instruction(new.name, "encode", None, (storage,), (new.id,), True, encode),
        Instruction(f"{node.name}__widen", "decode", None, (new.id,), (storage,), True, decode),
    )


NARROW = Narrow()
