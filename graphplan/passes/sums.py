"""Gradients of concatenations are added whole, as DenseNet has them: each layer reads all that came before it.

Autograd cuts the gradient of every concatenation into its parts and adds each to its running sum: hundreds of small
ops. Here a concatenation's gradient is added once, to the part of the running sum that covers it: the same additions of
the same numbers in the same order. What anything but a sum reads is copied out, as dense as the sum of parts was.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx

from graphplan.interface import Interface

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Part:
    """Elements `start` to `stop` of `whole` along dimension `dim`: what a slice node holds."""

    whole: fx.Node
    dim: int
    start: int
    stop: int


def merge_sums(graph: fx.Graph, interface: Interface) -> None:
    """Rewrite sums of all parts of one tensor with neighbouring parts of another into one sum and parts of it."""
    returned = {n for n in (*interface.forward_results(), *interface.gradients) if n is not None}
    for whole in list(graph.nodes):
        found = _sums(whole)
        if found is not None and _pays(found[0], returned):
            _merge(graph, interface, returned, whole, *found)


def _sums(whole: fx.Node) -> tuple[list[tuple[fx.Node, _Part]], _Part] | None:
    """Return each sum with its part of `whole`, in order, and what of another tensor all of them add."""
    parts = [(user, _part(user)) for user in whole.users]
    if len(parts) < 2 or any(p is None or p.whole is not whole for _, p in parts):
        return None
    ordered = sorted(((u, p) for u, p in parts if p is not None), key=lambda pair: pair[1].start)
    sums: list[tuple[fx.Node, _Part]] = []
    others: list[_Part] = []
    for node, part in ordered:
        total = next(iter(node.users)) if len(node.users) == 1 else None
        if total is None or not _is_sum(total) or total.kwargs or len(total.all_input_nodes) != 2:
            return None
        other = _part(next(n for n in total.all_input_nodes if n is not node))
        if other is None or other.whole is whole or not _alike(total):
            return None
        sums.append((total, part))
        others.append(other)
    first, last = others[0], others[-1]
    dim = ordered[0][1].dim
    size = whole.meta["val"].shape[dim]
    covers = _follow([p for _, p in sums]) and (sums[0][1].start, sums[-1][1].stop) == (0, size)
    if not covers or not _follow(others) or first.dim != dim or last.stop - first.start != size:
        return None
    return sums, _Part(first.whole, first.dim, first.start, last.stop)


def _pays(sums: list[tuple[fx.Node, _Part]], returned: set[fx.Node]) -> bool:
    """Return whether most of what is summed goes into further sums: the rest is copied out."""
    inside = [
        part.stop - part.start for total, part in sums if total not in returned and all(map(_is_sum, total.users))
    ]
    return 2 * sum(inside) >= sums[-1][1].stop


def _is_sum(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor


def _merge(
    graph: fx.Graph,
    interface: Interface,
    returned: set[fx.Node],
    whole: fx.Node,
    sums: list[tuple[fx.Node, _Part]],
    other: _Part,
) -> None:
    order = {n: t for t, n in enumerate(graph.nodes)}
    first = min((total for total, _ in sums), key=order.__getitem__)
    if order[other.whole] > order[first] or order[whole] > order[first]:
        return
    with graph.inserting_before(first):
        beside = _slice(graph, other, first)
        merged = graph.call_function(aten.add.Tensor, (beside, whole))
        merged.meta = {**first.meta, "val": aten.add.Tensor(beside.meta["val"], whole.meta["val"])}
    for total, part in sums:
        with graph.inserting_before(total):
            piece = _slice(graph, _Part(merged, part.dim, part.start, part.stop), total)
        total.replace_all_uses_with(piece, delete_user_cb=_is_sum)
        if total.users or total in returned:
            with graph.inserting_before(total):
                copy = graph.call_function(aten.clone.default, (piece,))
            copy.meta = {**total.meta}
            total.replace_all_uses_with(copy)
            interface.replace(total, copy)
        graph.erase_node(total)


def _part(node: fx.Node) -> _Part | None:
    """Return what a slice of step one holds."""
    if node.target is not aten.slice.Tensor or node.kwargs or not 4 <= len(node.args) <= 5:
        return None
    whole, dim, start, stop = node.args[:4]
    if not isinstance(whole, fx.Node) or node.args[4:] not in ((), (1,)):
        return None
    if not (isinstance(dim, int) and isinstance(start, int) and isinstance(stop, int)):
        return None
    size, value = whole.meta["val"].shape[dim], whole.meta["val"]
    first, last = (min(a + size if a < 0 else a, size) for a in (start, stop))
    return _Part(whole, dim % value.dim(), first, last)


def _follow(parts: list[_Part]) -> bool:
    """Return whether parts of one tensor follow one another without a gap."""
    return all((a.whole, a.dim, a.stop) == (b.whole, b.dim, b.start) for a, b in pairwise(parts))


def _alike(total: fx.Node) -> bool:
    return len({(n.meta["val"].dtype, n.meta["val"].shape) for n in (total, *total.all_input_nodes)}) == 1


def _slice(graph: fx.Graph, part: _Part, like: fx.Node) -> fx.Node:
    node = graph.call_function(aten.slice.Tensor, (part.whole, part.dim, part.start, part.stop))
    value: Tensor = part.whole.meta["val"]
    node.meta = {**like.meta, "val": aten.slice.Tensor(value, part.dim, part.start, part.stop)}
    return node
