"""Normalise a joint fx graph in place: ties, mutated inputs, batch norm's oddities, forward before backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

from graphplan import functions
from graphplan.graph import StorageKind, tensors_of
from graphplan.interface import Interface, resolve
from graphplan.passes.scatters import shrink_scatters
from graphplan.passes.strides import mend_strides
from graphplan.passes.sums import merge_sums
from graphplan.passes.views import merge_copies, merge_views, view_readers

aten = torch.ops.aten
_HELD_LIKE_OPERANDS = (
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.binary_cross_entropy.default,
    aten.soft_margin_loss.default,
    aten.col2im.default,
)
_DECIDES: dict[Any, tuple[Any, tuple[float, ...]]] = {  # backwards, with their forward and its arguments' defaults
    aten.hardtanh_backward.default: (aten.hardtanh.default, (-1, 1)),
    aten.leaky_relu_backward.default: (aten.leaky_relu.default, (0.01,)),
}
Extend = Callable[[fx.Graph, Interface, set[fx.Node]], None]


def normalise(
    module: fx.GraphModule, interface: Interface, model: nn.Module, extend: Extend | None = None
) -> set[fx.Node]:
    """Rewrite the graph of `module` into the form that `build_graph` names, and return its backward nodes.

    `extend(graph, interface, backward)` may add to the graph, and to the interface and the backward nodes with it.
    """
    graph = module.graph
    _drop_batch_norm_statistics(graph)
    _mend_mixed_batch_norm(graph)
    merge_sums(graph, interface)
    shrink_scatters(graph, interface)
    mend_strides(graph)
    _mend_whole_dropout(graph)
    _mend_dropout_backward(graph)
    merge_copies(graph, (*interface.forward_results(), *interface.gradients))
    _merge_tied(graph, interface, model)
    merge_views(graph, (*interface.forward_results(), *interface.gradients))
    _decide_by_results(graph, interface)
    _copy_small_results(graph, interface)
    backward = _split(graph, interface)
    _clone_mutated(graph, interface, backward)
    interface.rename()
    if extend is not None:
        extend(graph, interface, backward)
    _write_results(graph, interface)
    graph.eliminate_dead_code(is_impure_node=_is_effect)
    module.recompile()
    return backward


def _drop_batch_norm_statistics(graph: fx.Graph) -> None:
    """Keep BatchNorm's backward from reading running statistics that the forward mutates.

    In training mode it ignores their values, but takes the parameters' dtype from them: the saved batch
    statistics, which it reads anyway, stand in.
    """
    for node in graph.find_nodes(op="call_function", target=aten.native_batch_norm_backward.default):
        if node.args[7] is True:
            node.args = (*node.args[:3], *node.args[5:7], *node.args[5:])


def _mend_mixed_batch_norm(graph: fx.Graph) -> None:
    """Give BatchNorm's saved statistics the parameters' dtype: torch's fake kernel says the input's (bfloat16)."""
    for node in graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_functional.default):
        weight = node.args[1]
        if not isinstance(weight, fx.Node) or not node.meta["val"][0].is_cpu:
            continue
        dtype = weight.meta["val"].dtype
        node.meta["val"] = tuple(v.to(dtype) if i in (1, 2) else v for i, v in enumerate(node.meta["val"]))
        for item in node.users:
            item.meta["val"] = node.meta["val"][item.args[1]]


def _mend_whole_dropout(graph: fx.Graph) -> None:
    """Draw nothing where dropout drops everything, as outside a trace: native_dropout draws all the same."""
    for node in graph.find_nodes(op="call_function", target=aten.native_dropout.default):
        x, share, train = node.args
        if share != 1 or train is not True:
            continue
        for item in list(node.users):  # which the interface may name
            if item.args[1] == 0:
                item.target, item.args = aten.mul.Tensor, (x, 0.0)
            else:
                item.target, item.args, item.kwargs = aten.zeros_like.default, (x,), {"dtype": torch.bool}
        graph.erase_node(node)


def _mend_dropout_backward(graph: fx.Graph) -> None:
    """Multiply gradients by dropout's mask as eager mode does, and with no wide copy of the mask beside them."""
    for node in graph.find_nodes(op="call_function", target=aten.native_dropout_backward.default):
        (grad, mask), made = (n.meta["val"] for n in node.all_input_nodes), node.meta["val"]
        like = (grad.dtype, torch.empty_like(grad).stride()) == (made.dtype, made.stride())
        if made.device.type == "cpu" and mask.dtype is torch.bool and like:
            node.target = functions.dropout_backward


def _decide_by_results(graph: fx.Graph, interface: Interface) -> None:
    """Let backwards ask the result, which the next layer reads anyway, on which side of a bound the input was.

    The input then dies in the forward and can be written over. A leaky ReLU's result has its input's sign. A hardtanh's
    is at a bound where its input was there or beyond; but its forward rounds bounds to narrow dtypes, its backward not.
    What the model returns is not asked: the caller may write to it.
    """
    returned = {s for n in interface.forward_results() for s in _memory(n)}
    for node in list(graph.nodes):
        if node.target not in _DECIDES:
            continue
        forward, defaults = _DECIDES[node.target]
        x, *bounds = node.args[1 : 2 + len(defaults)]
        dtype = x.meta["val"].dtype
        if forward is aten.leaky_relu.default:
            exact = bounds[0] >= 0
        else:
            exact = dtype.itemsize >= 4 or all(torch.tensor(b, dtype=dtype).item() == b for b in bounds)
        results = [n for n in x.users if n.target is forward and [*n.args[1:], *defaults[len(n.args) - 1 :]] == bounds]
        if exact and results and returned.isdisjoint(_memory(results[0])):
            node.replace_input_with(x, results[0])
            if x.op == "call_function":  # others are there anyway
                node.meta["graphplan_asked"] = x.name  # by autograd


def _copy_small_results(graph: fx.Graph, interface: Interface) -> None:
    """Copy results that CPU kernels return in memory as large as their operand: means and sums of losses, folds."""
    for node in list(graph.nodes):
        if node.target not in _HELD_LIKE_OPERANDS or not node.meta["val"].is_cpu:
            continue
        value, operand = node.meta["val"], node.args[0].meta["val"]
        if value.numel() >= operand.numel():
            continue
        node.meta["val"] = operand.new_empty((operand.numel(),)).as_strided(value.shape, value.stride())
        with graph.inserting_after(node):
            copy = graph.call_function(aten.clone.default, (node,))
        copy.meta["val"] = value
        node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
        interface.replace(node, copy)


def _merge_tied(graph: fx.Graph, interface: Interface, model: nn.Module) -> None:
    """Let one placeholder stand for each parameter, however many names it has.

    Its gradients are added in place, as autograd's own accumulation does: the sum needs no third copy.
    """
    first: dict[int, int] = {}
    stands_for: list[int] = []
    for i, (primal, node) in enumerate(interface.primals):
        tensor = resolve(model, primal.path) if primal.kind is StorageKind.PARAMETER else None
        j = first.setdefault(id(tensor), i) if tensor is not None else i
        stands_for.append(j)
        if i == j:
            continue
        node.replace_all_uses_with(interface.primals[j][1])
        graph.erase_node(node)
        mine, other = interface.gradients[i], interface.gradients[j]
        if mine is not None and other is not None:
            interface.gradients[j] = _add(graph, interface, other, mine)
        elif mine is not None:
            interface.gradients[j] = mine
    interface.keep_primals(stands_for)


def _add(graph: fx.Graph, interface: Interface, a: fx.Node, b: fx.Node) -> fx.Node:
    """Add two gradients of one parameter, over the first where nothing else reads that."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    last = max(a, b, key=lambda n: order[n])
    own = _memory(a)
    holders = [n for n in graph.nodes if n.op != "output" and not own.isdisjoint(_memory(n))]
    results = (*interface.forward_results(), *(g for g in interface.gradients if g is not None))
    alone = sum(n in holders for n in results) == 1 and not any(
        n.op == "placeholder" or any(order[u] > order[last] for u in n.users if u.op != "output") for n in holders
    )
    with graph.inserting_after(last):
        total = graph.call_function(aten.add_.Tensor if alone else aten.add.Tensor, (a, b))
    value = a.meta["val"]
    total.meta.update({"val": value, "graphplan_in_place": True} if alone else {"val": torch.empty_like(value)})
    return total


def _memory(node: fx.Node) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors_of(node)}


def _split(graph: fx.Graph, interface: Interface) -> set[fx.Node]:
    """Return the backward nodes, after moving every forward node in front of them.

    Backward is what depends on a tangent, and what was traced after it without being needed by a forward result.
    """
    tainted = {t for t in interface.tangents if t is not None}
    needed = _ancestors(graph, interface.forward_results())
    backward: set[fx.Node] = set()
    started = False
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if any(a in tainted for a in node.all_input_nodes):
            tainted.add(node)
            started = True
        if started and node not in needed:
            backward.add(node)
    anchor: fx.Node | None = None
    for node in list(graph.nodes):
        if node in backward and anchor is None:
            anchor = node
        elif anchor is not None and node.op in ("call_function", "get_attr") and node not in backward:
            anchor.prepend(node)
    return backward


def _ancestors(graph: fx.Graph, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return `nodes` and everything that they are computed from."""
    dag = nx.DiGraph((a, n) for n in graph.nodes for a in n.all_input_nodes)
    sink = object()
    dag.add_edges_from((n, sink) for n in nodes)
    return set(nx.ancestors(dag, sink))


def _clone_mutated(graph: fx.Graph, interface: Interface, backward: set[fx.Node]) -> None:
    """Where the backward reads the old value of something the forward mutates, keep a copy of the old value."""
    first = next((n for n in graph.nodes if n.op != "placeholder"), None)
    for primal, node in interface.primals:
        readers = [u for u in view_readers(node) if u in backward] if primal.mutated else []
        if not readers or first is None:
            continue
        with graph.inserting_before(first):
            copy = graph.call_function(aten.clone.default, (node,))
        copy.meta["val"] = node.meta["val"].clone()
        for user in [u for u in node.users if u is not copy]:
            user.replace_input_with(node, copy)


def _write_results(graph: fx.Graph, interface: Interface) -> None:
    """Return one flat tuple: forward outputs, new buffer values, gradients."""
    old = graph.output_node()
    with graph.inserting_before(old):
        graph.output((*interface.forward_results(), *interface.gradients))
    graph.erase_node(old)


def is_random(node: fx.Node) -> bool:
    """Return whether running `node` draws from a random stream."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return False
    schema = node.target._schema  # type: ignore[union-attr]
    for i, arg in enumerate(schema.arguments):
        if arg.name == "dropout_p":
            p = node.args[i] if i < len(node.args) else node.kwargs.get(arg.name, arg.default_value)
            return bool(p != 0.0)
    return True


def _is_effect(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or "graphplan_update" in node.meta or is_random(node)
