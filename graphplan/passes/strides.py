"""Strides that torch's fake kernels get wrong: results are brought into those that the trace went on with.

Whether a trace takes a view or a copy hangs on the strides that fake kernels say. Some are wrong for operands that are
not contiguous (torch 2.13: BatchNorm, the backwards of MSE, Huber and binary cross-entropy; of dropout where the
gradient's order is not the mask's). So each op with such an operand is run once, on made-up values, and what it returns
in another order is copied into the traced one. An elementwise op is believed where its operands have one order.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from graphplan.passes.views import aliased_input

aten = torch.ops.aten
_DRAWN = 1 << 18  # numbers; branches that hang on them are not foreseen, though they come again and again
_SURE = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.clone.default)
Strides = tuple[tuple[int, ...] | None, ...]  # of each result


def mend_strides(graph: fx.Graph) -> None:
    """Copy results of ops whose real strides are not the traced ones; `graph` has fakes in meta["val"]."""
    known: dict[Hashable, Strides | None] = {}
    doubtful = [node for node in graph.nodes if _doubtful(node)]
    cuda = {v.device for node in doubtful for v in _values(node) if v.is_cuda}
    with torch.random.fork_rng(devices=cuda), torch.no_grad(), torch._C._DisableAutocast():
        for node in doubtful:
            key = _key(node)
            if key not in known:
                known[key] = _run(node)
            for i, real in enumerate(known[key] or ()):
                _bring(graph, node, i, real)


def made_up(like: Any, device: torch.device) -> Any:
    """Return a tensor of `like`'s geometry: floats between a half and 1, integers of zero (a legal index everywhere).

    The floats differ: of equal ones a max-pool is three times as fast as of a model's, as its branches are foreseen.
    Of a dict, a dict of such tensors; other values in it stay.
    """
    if isinstance(like, dict):
        return {k: made_up(v, device) for k, v in like.items()}
    if not isinstance(like, Tensor):
        return like
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    if not like.dtype.is_floating_point:
        return made.zero_()
    extent = made.untyped_storage().nbytes() // made.element_size()
    for piece in torch.split(made.as_strided((extent,), (1,)), _DRAWN):
        piece.copy_(_drawn()[: piece.numel()])
    return made


@cache
def _drawn() -> Tensor:
    """Return _DRAWN numbers between a half and 1, the same in every process: products of many are no denormals."""
    generator = torch.Generator().manual_seed(0)
    return 0.5 + 0.5 * torch.rand(_DRAWN, generator=generator, dtype=torch.float32, device="cpu")


def _doubtful(node: fx.Node) -> bool:
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op in _SURE:
        return False
    if op._schema.is_mutable or aliased_input(node) is not None:
        return False
    values = _values(node)
    largest = max((v.numel() for v in values), default=0)
    if torch.Tag.pointwise in op.tags and len({v.stride() for v in values if v.numel() == largest}) < 2:
        return False  # the operands' own order
    return any(not v.is_contiguous() for v in values)


def _values(node: fx.Node) -> list[Tensor]:
    return [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]


def _key(node: fx.Node) -> Hashable:
    def described(leaf: Any) -> Hashable:
        if not isinstance(leaf, fx.Node):
            return str(leaf)
        value = leaf.meta["val"]
        return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else str(value)

    return (node.target, *map(described, tree_leaves((node.args, node.kwargs))))


def _run(node: fx.Node) -> Strides | None:
    """Return the strides of what the op really returns; None where it refuses made-up values."""

    def value(leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        like = leaf.meta["val"]
        return made_up(like, like.device) if isinstance(like, Tensor) else like

    args, kwargs = tree_map(value, (node.args, dict(node.kwargs)), is_leaf=lambda leaf: isinstance(leaf, fx.Node))
    try:
        found = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, IndexError, ValueError):
        return None
    results = found if isinstance(found, list | tuple) else (found,)
    return tuple(r.stride() if isinstance(r, Tensor) else None for r in results)


def _bring(graph: fx.Graph, node: fx.Node, index: int, real: tuple[int, ...] | None) -> None:
    """Bring result `index` of `node`, which has `real` strides, into the traced ones, under its own name."""
    if real is None:  # no tensor: a check, say
        return
    several = isinstance(node.meta["val"], list | tuple)
    item = next((u for u in node.users if u.args[1] == index), None) if several else node
    if item is None:
        return
    traced = item.meta["val"]
    same = all(a == b for a, b, n in zip(traced.stride(), real, traced.shape, strict=True) if n > 1)
    order = sorted(range(traced.dim()), key=traced.stride, reverse=True)
    if same or traced.numel() == 0 or not traced.permute(order).is_contiguous():
        return
    with graph.inserting_before(item):
        result = graph.call_function(operator.getitem if several else node.target, item.args, item.kwargs)  # type: ignore[arg-type]
        turned = graph.call_function(aten.permute.default, (result, order))
        copied = graph.call_function(aten.clone.default, (turned,), {"memory_format": torch.contiguous_format})
    result.meta.update(item.meta)
    fake = result.meta["val"] = traced.new_empty_strided(traced.shape, real)
    if several:
        node.meta["val"] = tuple(fake if i == index else v for i, v in enumerate(node.meta["val"]))
    turned.meta["val"] = fake.permute(order)
    copied.meta["val"] = turned.meta["val"].clone(memory_format=torch.contiguous_format)
    back = [order.index(d) for d in range(traced.dim())]
    item.target, item.args, item.kwargs = aten.permute.default, (copied, back), {}
    item.meta["val"] = copied.meta["val"].permute(back)
