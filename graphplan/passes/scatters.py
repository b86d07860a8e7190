"""What in-place code is traced as, without the memory that its kernels take.

`x[:, 1] = y` becomes `copy(x[:, 1], y)` and a `select_scatter` into x. Those ops clone the storage of what they are
given: all of it, where that is a view (torch 2.13, `clone_preserve_strides`), a whole data set where a batch is a slice
of one. A copy is written as the clone of what is copied, a scatter as the parts around put together: results of their
own size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphplan.interface import Interface
from graphplan.passes.views import aliased_input

aten = torch.ops.aten
_IN_ONE_PIECE = (aten.select_scatter.default, aten.slice_scatter.default)
_SCATTERS = (*_IN_ONE_PIECE, aten.diagonal_scatter.default)
_DEFAULTS = (0, None, None, 1)  # dimension, start, end, step


def shrink_scatters(graph: fx.Graph, interface: Interface) -> None:
    """Rewrite functional copies and scatters; `graph` has fakes in meta["val"]."""
    for node in list(graph.nodes):
        if node.target is not aten.copy.default and node.target not in _SCATTERS:
            continue
        with graph.inserting_before(node):
            result = _copied(graph, node) if node.target is aten.copy.default else _put_together(graph, node)
            if result is None and node.target in _SCATTERS and _is_of_others(node.args[0]):
                node.args = (_call(graph, node, aten.clone.default, node.args[0]), *node.args[1:])
        if result is not None:
            node.replace_all_uses_with(result)
            interface.replace(node, result)
            graph.erase_node(node)


def _copied(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Return the source of a copy in the dtype, size and order of what it was copied over."""
    operands = _operands(node)
    if operands is None or operands[0].device != operands[1].device:
        return None
    like, source, result = torch.empty_like(operands[0]), operands[1], node.args[1]
    if source.dtype != like.dtype:
        result = _call(graph, node, aten._to_copy.default, result, dtype=like.dtype)
    if source.shape != like.shape:
        result = _call(graph, node, aten.expand.default, result, list(like.shape))
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    if order == list(range(like.dim())):
        return _call(graph, node, aten.clone.default, result, memory_format=torch.contiguous_format)
    turned = _call(graph, node, aten.permute.default, result, order)
    copied = _call(graph, node, aten.clone.default, turned, memory_format=torch.contiguous_format)
    return _call(graph, node, aten.permute.default, copied, [order.index(d) for d in range(like.dim())])


def _put_together(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Return a scatter as what lies before its part, the part, and what lies behind."""
    operands = _operands(node)
    span = None if operands is None or operands[0].dtype != operands[1].dtype else _span(node, operands[0])
    if operands is None or span is None:
        return None
    (whole, part), (x, inside), (dim, first, last) = operands, node.args[:2], span
    pieces: list[Any] = [_call(graph, node, aten.slice.Tensor, x, dim, 0, first)] if first else []
    pieces.append(_call(graph, node, aten.unsqueeze.default, inside, dim) if part.dim() < whole.dim() else inside)
    if last < whole.shape[dim]:
        pieces.append(_call(graph, node, aten.slice.Tensor, x, dim, last, whole.shape[dim]))
    result = _call(graph, node, aten.cat.default, pieces, dim)
    result.meta["val"] = torch.empty_like(whole)  # whatever order the kernel writes in is brought into this one
    return result


def _span(node: fx.Node, whole: Tensor) -> tuple[int, int, int] | None:
    """Return the dimension, first index and end of a scatter's part; None for one that is not in one piece."""
    given: Any = (*node.args[2:], *_DEFAULTS[len(node.args) - 2 :])
    if node.kwargs or node.target not in _IN_ONE_PIECE:
        return None
    dim, first, end, step = given
    size = whole.shape[dim]
    if node.target is aten.select_scatter.default:
        return dim % whole.dim(), first % size, first % size + 1
    first, end = (min(max(e + size if e < 0 else e, 0), size) for e in (first or 0, size if end is None else end))
    return (dim % whole.dim(), first, end) if step == 1 and first < end else None


def _is_of_others(x: Any) -> bool:
    """Return whether x is in memory that is not its alone, or not known to be."""
    root = x
    while (source := aliased_input(root)) is not None:
        root = source
    memory: int = root.meta["val"].untyped_storage().nbytes()
    own: int = x.meta["val"].numel() * x.meta["val"].element_size()
    return root.op == "placeholder" or memory != own


def _operands(node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """Return what is written to, and what is written."""
    whole, part = (n.meta["val"] if isinstance(n, fx.Node) else None for n in node.args[:2])
    if not isinstance(whole, Tensor) or not isinstance(part, Tensor):
        return None
    return None if any(t.is_sparse or t.is_conj() or t.is_neg() for t in (whole, part)) else (whole, part)


def _call(graph: fx.Graph, like: fx.Node, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Append a call in place of `like`, with its fake value."""
    node = graph.call_function(op, args, kwargs)
    node.meta = {**like.meta, "val": op(*fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)}
    return node
