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
from graphplan.codecs.find import Call, base_of, decode, encode, packed, saved_nodes
from graphplan.graph import Graph
from graphplan.instructions import Encoded, Instruction

aten = torch.ops.aten
_WIDTHS = (torch.uint8, torch.int16, torch.int32)


def _plane(dims: int) -> Callable[[fx.Node], int]:
    """Bound positions in the input's last `dims` dimensions, flattened."""
    return lambda node: math.prod(node.args[0].meta["val"].shape[-dims:])  # type: ignore[union-attr]


def _along(argument: int, default: int | None = -1) -> Callable[[fx.Node], int]:
    """Bound positions along the dimension that an argument names; in the whole tensor where that is None."""

    def bound(node: fx.Node) -> int:
        dim = node.args[argument] if len(node.args) > argument else node.kwargs.get("dim", default)
        shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
        return math.prod(shape) if dim is None else int(shape[dim]) if shape else 1

    return bound


def _buckets(argument: int) -> Callable[[fx.Node], int]:
    """Bound the places where a value can be put in among the sorted ones that an argument holds."""
    return lambda node: int(node.args[argument].meta["val"].shape[-1]) + 1  # type: ignore[union-attr]


# op -> (which result holds integers, None of one, a proof that they are non-negative and below a bound)
BOUNDS: dict[Any, tuple[int | None, Callable[[fx.Node], int]]] = {
    aten.max_pool2d_with_indices.default: (1, _plane(2)),
    aten.max_pool3d_with_indices.default: (1, _plane(3)),
    aten.adaptive_max_pool2d.default: (1, _plane(2)),
    aten.adaptive_max_pool3d.default: (1, _plane(3)),
    aten.fractional_max_pool2d.default: (1, _plane(2)),
    aten.fractional_max_pool3d.default: (1, _plane(3)),
    aten.max.dim: (1, _along(1)),
    aten.min.dim: (1, _along(1)),
    aten.median.dim: (1, _along(1)),
    aten.nanmedian.dim: (1, _along(1)),
    aten.mode.default: (1, _along(1)),
    aten.cummax.default: (1, _along(1)),
    aten.cummin.default: (1, _along(1)),
    aten.kthvalue.default: (1, _along(2)),
    aten.topk.default: (1, _along(2)),
    aten.sort.default: (1, _along(1)),
    aten.sort.stable: (1, _along(1)),  # by name
    aten.argmax.default: (None, _along(1, None)),
    aten.argmin.default: (None, _along(1, None)),
    aten.multinomial.default: (None, _plane(1)),
    aten.bucketize.Tensor: (None, _buckets(1)),
    aten.searchsorted.Tensor: (None, _buckets(0)),
}
# op -> (the argument that holds integers, their bound): it raises on any other value, and has run before the encoding
CHECKS: dict[Any, tuple[int, Callable[[fx.Node], int]]] = {
    aten.embedding.default: (1, lambda node: int(node.args[0].meta["val"].shape[0])),  # type: ignore[union-attr]
    aten.index_select.default: (2, _along(1)),
    aten.gather.default: (2, _along(1)),
}
_POOLS: dict[Any, int] = {aten.max_pool2d_with_indices.default: 2, aten.max_pool3d_with_indices.default: 3}


@dataclass(frozen=True, slots=True)
class Narrow:
    """Stores int64 indices in 2, 4, 8, 16 or 32 bits: the op that made them proves that they fit."""

    name: str = "narrow"
    exact: bool = True

    def find(self, graph: Graph, first_id: int) -> tuple[list[Encoded], list[Instruction]]:
        """Return an encoding for every dense tensor of integers that an op in BOUNDS made or one in CHECKS has read."""
        encoded: list[Encoded] = []
        made: list[Instruction] = []
        for node, storage in saved_nodes(graph):
            bound = _bound(graph, node, storage)
            if bound is None:
                continue
            id_, name = first_id + len(encoded), f"{node.name}__narrow"
            found = _in_window(node, id_, name, storage) or _in_integers(node, id_, name, storage, bound)
            if found is None:
                continue
            new, narrow, widen = found
            encoded.append(new)
            made.append(encode(node, storage, new, *narrow))
            made.append(decode(node, storage, new, "widen", *widen))
        return encoded, made


def _bound(graph: Graph, node: fx.Node, storage: int) -> int | None:
    """Return a number that is proven to be above all of `node`'s integers, none of which is negative."""
    val = node.meta["val"]
    if val.dtype not in (torch.int64, torch.int32) or not functions.is_dense(val):
        return None
    call, item = (node.args[0], node.args[1]) if node.target is operator.getitem else (node, None)
    assert isinstance(call, fx.Node)
    made, proof = BOUNDS.get(call.target, (-1, None))
    bounds = [proof(call)] if proof is not None and made == item else []
    for op in graph.ops:
        if storage in op.reads and not op.backward and op.node.target in CHECKS:
            at, proof = CHECKS[op.node.target]
            read = op.node.args[at]
            # Every element must have been checked: not a slice, and nothing that an op made of them.
            if isinstance(read, fx.Node) and base_of(graph, read) is node and _same_elements(read.meta["val"], val):
                bounds.append(proof(op.node))
    return min(bounds, default=None)


def _same_elements(view: torch.Tensor, val: torch.Tensor) -> bool:
    return functions.is_dense(view) and view.numel() == val.numel()


def _in_window(node: fx.Node, id_: int, name: str, storage: int) -> tuple[Encoded, Call, Call] | None:
    """Return the encoding of max-pool indices as places in their windows, if it is smaller than integers."""
    pooling = pooling_of(node.args[0]) if node.target is operator.getitem else None  # type: ignore[arg-type]
    if pooling is None or functions.pool_code_bits(pooling) is None:
        return None
    geometry = (tuple(node.meta["val"].shape), tuple(node.meta["val"].stride()))
    new = packed(id_, name, functions.pool_code_bytes(*geometry, pooling), storage, NARROW.name)
    return new, (functions.pack_pool_indices, pooling), (functions.unpack_pool_indices, (*geometry, *pooling))


def _in_integers(node: fx.Node, id_: int, name: str, storage: int, bound: int) -> tuple[Encoded, Call, Call] | None:
    val = node.meta["val"]
    dtype = next((d for d in _WIDTHS if bound - 1 <= torch.iinfo(d).max and d.itemsize < val.dtype.itemsize), None)
    if dtype is None:
        return None
    like = torch.empty_strided(val.shape, val.stride(), dtype=dtype, device="meta")
    new = Encoded(id_, name, val.numel() * dtype.itemsize, storage, NARROW.name, like)
    return new, (functions.narrow_integers, (dtype,)), (functions.widen_integers, (val.dtype,))


def pooling_of(pool: fx.Node) -> functions.Pooling | None:
    """Return a max-pool's geometry, one number a dimension."""
    dims = _POOLS.get(pool.target)
    return None if dims is None else window_of(pool.args, dims)


def window_of(arguments: tuple[Any, ...], dims: int) -> functions.Pooling:
    """Return the geometry that a max-pool's input, kernel, stride, padding and dilation describe."""
    given: dict[str, Any] = dict(zip(("x", "kernel", "stride", "padding", "dilation"), arguments, strict=False))

    def numbers(name: str, default: Any) -> tuple[int, ...]:
        value = list(given.get(name) or default)
        return tuple(value * dims if len(value) == 1 else value)

    kernel = numbers("kernel", ())
    plane = tuple(arguments[0].meta["val"].shape[-dims:])
    return plane, kernel, numbers("stride", kernel), numbers("padding", [0]), numbers("dilation", [1])


NARROW = Narrow()
