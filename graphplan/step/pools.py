"""Large max-pools whose int64 indices never exist: packed where they are found, read so by the backward, to the bit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphplan import functions
from graphplan.codecs.narrow import pooling_of, window_of
from graphplan.interface import Interface

aten = torch.ops.aten


def pack_pools(graph: fx.Graph, interface: Interface, backward: set[fx.Node], least_bytes: int) -> None:
    """Rewrite every max-pool of at least `least_bytes` whose indices only its own backward reads."""
    for node in graph.find_nodes(op="call_function", target=aten.max_pool2d_with_indices.default):
        items = {item.args[1]: item for item in node.users}
        indices, x = items.get(1), node.args[0].meta["val"]
        if indices is None or node in backward or indices in interface.forward_results():
            continue
        pooling = pooling_of(node)
        large = x.numel() * x.itemsize >= least_bytes and x.is_contiguous()
        if not large or pooling is None or functions.pool_code_bits(pooling) is None:
            continue
        if all(_reads_codes(user, indices) and _same(user, node) for user in indices.users):
            _pack(node, indices, pooling)


def _reads_codes(node: fx.Node, indices: fx.Node) -> bool:
    """Return whether `node` is a max-pool's backward that can read `indices` packed, some planes at a time."""
    if node.target is not aten.max_pool2d_with_indices_backward.default or node.args[7] is not indices:
        return False
    operands: tuple[Any, ...] = (*node.args[:2], node, indices)
    grad, x, result, places = (n.meta["val"] for n in operands)
    whole = math.prod(grad.shape[-2:]) <= functions.POOL_BLOCK and grad.shape == places.shape
    plain = x.is_contiguous() and result.is_contiguous() and places.is_contiguous() and result.shape == x.shape
    return bool(whole and plain and result.is_cpu) and indices not in node.args[:2]


def _same(back: fx.Node, pool: fx.Node) -> bool:
    """Return whether `back` is of the geometry that `pool` has."""
    ceil_mode = len(pool.args) > 5 and pool.args[5]
    return window_of(back.args[1:6], 2) == pooling_of(pool) and back.args[6] == ceil_mode


def _pack(node: fx.Node, indices: fx.Node, pooling: functions.Pooling) -> None:
    ceil_mode = len(node.args) > 5 and node.args[5]
    geometry = [list(numbers) for numbers in pooling]
    x, (out, places) = node.args[0], node.meta["val"]
    for back in list(indices.users):
        size = list(back.meta["val"].shape)
        back.target, back.args = (
            functions.max_pool2d_backward_from_codes,
            (back.args[0], indices, size, *geometry, ceil_mode),
        )
    codes = functions.pool_code_bytes(places.shape, places.stride(), pooling)
    indices.meta["val"] = places.new_empty(codes, dtype=torch.uint8)
    node.target, node.args = functions.max_pool2d_to_codes, (x, *geometry, ceil_mode)
    node.meta["val"] = (out, indices.meta["val"])
    node.meta["graphplan_saves"] = ("packing pooling's indices where they are found", places.numel() * 8 - codes)
