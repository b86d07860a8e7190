"""Indices in as few bits as their bound allows: max-pool's by their place in the window, others in narrow integers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphplan import functions
from graphplan.codecs.find import Call, decode, encode, packed, saved_nodes
from graphplan.graph import Graph
from graphplan.instructions import Encoded, Instruction

aten = torch.ops.aten
_WIDTHS = (torch.uint8, torch.int16, torch.int32)


def _plane(dims: int) -> Callable[[fx.Node], int]:
    """Bound positions in one flattened input plane."""
    return lambda node: math.prod(node.args[0].meta["val"].shape[-dims:])  # type: ignore[union-attr]


def _along(argument: int, default: int = -1) -> Callable[[fx.Node], int]:
    """Bound positions along the dimension that an argument names."""

    def bound(node: fx.Node) -> int:
        dim = node.args[argument] if len(node.args) > argument else node.kwargs.get("dim", default)
        return int(node.args[0].meta["val"].shape[dim])  # type: ignore[union-attr]

    return bound


# op -> (which result holds integers, a proof that they are non-negative and below a bound)
BOUNDS: dict[Any, tuple[int, Callable[[fx.Node], int]]] = {
    aten.max_pool2d_with_indices.default: (1, _plane(2)),
    aten.max_pool3d_with_indices.default: (1, _plane(3)),
    aten.adaptive_max_pool2d.default: (1, _plane(2)),
    aten.adaptive_max_pool3d.default: (1, _plane(3)),
    aten.max.dim: (1, _along(1)),
    aten.min.dim: (1, _along(1)),
    aten.median.dim: (1, _along(1)),
    aten.cummax.default: (1, _along(1)),
    aten.cummin.default: (1, _along(1)),
    aten.kthvalue.default: (1, _along(2)),
    aten.topk.default: (1, _along(2)),
    aten.sort.default: (1, _along(1)),
    aten.sort.stable: (1, _along(2)),
}
_POOLS: dict[Any, int] = {aten.max_pool2d_with_indices.default: 2, aten.max_pool3d_with_indices.default: 3}


@dataclass(frozen=True, slots=True)
class Narrow:
    """Stores int64 indices in 2, 4, 8, 16 or 32 bits: the op that made them proves that they fit."""

    name: str = "narrow"
    exact: bool = True

    def find(self, graph: Graph, first_id: int) -> tuple[list[Encoded], list[Instruction]]:
        """Return an encoding for the indices of every op in BOUNDS."""
        encoded: list[Encoded] = []
        made: list[Instruction] = []
        for node, storage in saved_nodes(graph):
            if not _bounded(node):
                continue
            id_, name = first_id + len(encoded), f"{node.name}__narrow"
            found = _in_window(node, id_, name, storage) or _in_integers(node, id_, name, storage)
            if found is None:
                continue
            new, narrow, widen = found
            encoded.append(new)
            made.append(encode(node, storage, new, *narrow))
            made.append(decode(node, storage, new, "widen", *widen))
        return encoded, made


def _bounded(node: fx.Node) -> bool:
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return False
    item, _ = BOUNDS.get(node.args[0].target, (None, None))
    val = node.meta["val"]
    return item == node.args[1] and val.dtype is torch.int64 and functions.is_dense(val)


def _in_window(node: fx.Node, id_: int, name: str, storage: int) -> tuple[Encoded, Call, Call] | None:
    """Return the encoding of max-pool indices as places in their windows, if it is smaller than integers."""
    pooling = _pooling(node.args[0])  # type: ignore[arg-type]
    if pooling is None or functions.pool_code_bits(pooling) is None:
        return None
    geometry = (tuple(node.meta["val"].shape), tuple(node.meta["val"].stride()))
    new = packed(id_, name, functions.pool_code_bytes(*geometry, pooling), storage, NARROW.name)
    return new, (functions.pack_pool_indices, pooling), (functions.unpack_pool_indices, (*geometry, *pooling))


def _in_integers(node: fx.Node, id_: int, name: str, storage: int) -> tuple[Encoded, Call, Call] | None:
    bound = BOUNDS[node.args[0].target][1](node.args[0])  # type: ignore[union-attr, arg-type]
    dtype = next((d for d in _WIDTHS if bound - 1 <= torch.iinfo(d).max), None)
    if dtype is None:
        return None
    val = node.meta["val"]
    like = torch.empty_strided(val.shape, val.stride(), dtype=dtype, device="meta")
    new = Encoded(id_, name, val.numel() * dtype.itemsize, storage, NARROW.name, like)
    return new, (functions.narrow_integers, (dtype,)), (functions.widen_integers, (val.dtype,))


def _pooling(pool: fx.Node) -> functions.Pooling | None:
    """Return a max-pool's geometry, one number a dimension."""
    dims = _POOLS.get(pool.target)
    if dims is None:
        return None
    given: dict[str, Any] = dict(zip(("x", "kernel", "stride", "padding", "dilation"), pool.args, strict=False))

    def numbers(name: str, default: Any) -> tuple[int, ...]:
        value = list(given.get(name) or default)
        return tuple(value * dims if len(value) == 1 else value)

    kernel = numbers("kernel", ())
    plane = tuple(pool.args[0].meta["val"].shape[-dims:])  # type: ignore[union-attr]
    return plane, kernel, numbers("stride", kernel), numbers("padding", [0]), numbers("dilation", [1])


NARROW = Narrow()
