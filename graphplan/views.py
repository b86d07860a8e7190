"""Views that say nothing new leave the graph: each is a call in every step, and in an LSTM every third node is one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx


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


def merge_views(graph: fx.Graph) -> None:
    """Let every reader of a view read the earliest node that is the same view of the same tensor.

    `t(t(x))`, `detach(x)` and a `view` to the present shape are x itself. What the step returns stays as it is.
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


def _view(base: fx.Node, node: fx.Node) -> tuple[Any, ...]:
    t = node.meta.get("val")
    if not isinstance(t, Tensor) or t.is_sparse:
        return (base, node)
    return (base, t.dtype, tuple(t.shape), t.stride(), t.storage_offset(), t.is_conj(), t.is_neg())
