"""Views and copies that say nothing new leave the graph.

Each view is a call in every step, and in an LSTM every third node is one. A copy is another tensor besides: tracing
writes one for every dropout that drops nothing, where the eager op returns its input.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from graphplan.graph import tensors_of


def aliased_input(node: fx.Node) -> fx.Node | None:
    """Return the input that the schema says a single-result op is a view of (or writes in place)."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or len(schema.returns) != 1 or schema.returns[0].alias_info is None:
        return None
    wanted = schema.returns[0].alias_info.before_set
    for arg, value in zip(schema.arguments, node.args, strict=False):
        if arg.alias_info is not None and arg.alias_info.before_set & wanted and isinstance(value, fx.Node):
            return value
    return None


def merge_views(graph: fx.Graph, results: Iterable[fx.Node | None]) -> None:
    """Let every reader of a view read the earliest node that is the same view of the same tensor.

    `t(t(x))`, `detach(x)` and a `view` to the present shape are x itself. What the step returns, `results`, stays as it
    is; other views that nobody reads any more go.
    """
    base: dict[fx.Node, fx.Node] = {}
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(graph.nodes):
        source = aliased_input(node)
        if source is None or node.target._schema.is_mutable or not isinstance(node.meta.get("val"), Tensor):
            first.setdefault(_view(node, node), node)
            continue
        base[node] = base.get(source, source)
        same = first.setdefault(_view(base[node], node), node)
        if same is not node:
            node.replace_all_uses_with(same, delete_user_cb=lambda user: user.op != "output")
    stay = set(results)
    for node in reversed(base):
        if not node.users and node not in stay:
            graph.erase_node(node)


def merge_copies(graph: fx.Graph, results: Iterable[fx.Node | None]) -> None:
    """Let every reader of a clone read what it is a clone of, where nobody outside the graph could tell them apart.

    Both fill memory of one size in the same order; the source is computed in the graph, and neither is one of
    `results`, which the caller may change.
    """
    held = {_memory(n) for n in results if n is not None}
    held.update(_memory(n) for n in graph.nodes if n.op != "call_function")
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default):
        source = node.all_input_nodes[0]
        if held.isdisjoint((_memory(source), _memory(node))) and _layout(source) == _layout(node):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _memory(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) and not value.is_sparse else None


def _layout(node: fx.Node) -> tuple[Any, ...]:
    t = node.meta["val"]
    return (t.dtype, tuple(t.shape), t.stride(), t.storage_offset(), t.untyped_storage().nbytes())


def _view(base: fx.Node, node: fx.Node) -> tuple[Any, ...]:
    t = node.meta.get("val")
    if not isinstance(t, Tensor) or t.is_sparse:
        return (base, node)
    return (base, t.dtype, tuple(t.shape), t.stride(), t.storage_offset(), t.is_conj(), t.is_neg())


def view_readers(node: fx.Node) -> set[fx.Node]:
    """Return every node that reads `node`'s storage, through views too."""
    base = {t.untyped_storage()._cdata for t in tensors_of(node)}
    found: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user in found:
            continue
        found.add(user)
        if any(t.untyped_storage()._cdata in base for t in tensors_of(user)):
            stack.extend(user.users)
    return found
