"""Put sliced ops into a step's graph in place of whole ones, where tensors are large."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx

from graphplan.graph import tensors_of
from graphplan.interface import Interface
from graphplan.passes import aliased_input, view_readers
from graphplan.step import slices

aten = torch.ops.aten
LEAST_BYTES = 1 << 22  # smaller operands are not worth a second call
_TURNS = {aten.view.default: 0, aten._unsafe_view.default: 0, aten.t.default: 1}


def slice_forward(graph: fx.Graph, backward: set[fx.Node], only_look: bool) -> bool:
    """Let large convolutions of the forward work image by image, for less scratch; return whether there are any.

    Slower where kernels have no scratch to speak of, so that it is not done where the step's first form is asked for.
    """
    found = False
    for node in graph.find_nodes(op="call_function", target=aten.convolution.default):
        x, weight, bias, *options = node.args
        value = node.meta["val"]
        assert isinstance(x, fx.Node)
        large = _large(value) or _large(x.meta["val"])
        if node in backward or not large or not value.is_contiguous() or not x.meta["val"].is_contiguous():
            continue
        found = True
        if not only_look:
            node.target = slices.convolution
            node.args = (x, weight, bias, list(options), list(value.shape))
            node.meta["graphplan_pure"] = True
    return found


def slice_backward(graph: fx.Graph, interface: Interface, backward: set[fx.Node], exact: bool) -> bool:
    """Rewrite the large BatchNorm and convolution backward ops of `graph`; return whether `exact` kept some whole.

    With `exact`, only in ways that keep every bit: a convolution's weight gradient then stays one sum.
    """
    whole = False
    for node in [n for n in graph.nodes if n in backward]:
        if node.target is aten.native_batch_norm_backward.default:
            _slice_batch_norm(graph, backward, node)
        elif node.target is aten.convolution_backward.default:
            whole = _split_convolution(graph, interface, backward, node, exact) or whole
    return whole and exact


def _slice_batch_norm(graph: fx.Graph, backward: set[fx.Node], node: fx.Node) -> None:
    """Channel by channel, for less scratch; the input's gradient is written over the output's where that dies here."""
    grad, x, weight, _, _, mean, invstd, train, eps, mask = node.args
    if train is not True or list(mask) != [True, True, True] or not isinstance(weight, fx.Node):  # type: ignore[arg-type]
        return
    assert isinstance(grad, fx.Node)
    assert isinstance(x, fx.Node)
    g, v = grad.meta["val"], x.meta["val"]
    dense = _plain(g) and v.is_contiguous() and g.dtype is v.dtype
    if not (dense and _large(v)):
        return
    over = _dies_at(graph, backward, grad, node)
    target = slices.batch_norm_backward_ if over else slices.batch_norm_backward
    with graph.inserting_before(node):
        new = graph.call_function(target, (grad, x, weight, mean, invstd, eps))
    val = node.meta["val"]
    if over:
        saved = ("writing normalisation gradients over their operand", v.numel() * v.element_size())
        new.meta.update(val=(g, *val[1:]), graphplan_in_place=True, graphplan_saves=saved)
    else:
        new.meta.update(val=val, graphplan_pure=True)
    for item in list(node.users):
        item.args = (new, item.args[1])
        if over and item.args[1] == 0:
            item.meta["val"] = g
    _replaced(graph, backward, node, new)


def _split_convolution(
    graph: fx.Graph, interface: Interface, backward: set[fx.Node], node: fx.Node, exact: bool
) -> bool:
    """First the weight's gradient, so that the input can die, then the input's gradient, image by image.

    Return whether there is a weight's gradient.
    """
    grad, x, *_, mask = node.args
    assert isinstance(grad, fx.Node)
    assert isinstance(x, fx.Node)
    assert isinstance(mask, list | tuple)
    items: dict[Any, fx.Node] = {i.args[1]: i for i in node.users}
    g, v = grad.meta["val"], x.meta["val"]
    if not (_large(v) or _large(g)) or not v.is_contiguous() or not set(items) <= {0, 1, 2}:
        return False
    made = []
    has_weight = 1 in items or 2 in items
    if exact and v.device.type != "cpu":  # another batch, perhaps another kernel
        return True
    with graph.inserting_before(node):
        if has_weight:
            made.append(_weight_gradient(graph, node, items, exact))
        if 0 in items:
            made.append(_input_gradient(graph, interface, backward, node, items[0]))
    _replaced(graph, backward, node, *made)
    return has_weight


def _input_gradient(
    graph: fx.Graph, interface: Interface, backward: set[fx.Node], node: fx.Node, item: fx.Node
) -> fx.Node:
    """Image by image; where only parts along the channels are read, as of a concatenation, each has its own memory."""
    grad, x, weight, *options, _ = node.args
    assert isinstance(x, fx.Node)
    args = (grad, list(x.meta["val"].shape), weight, list(options))
    parts = [] if item in interface.gradients else _parts_of(item)
    if parts:
        widths = [p.meta["val"].shape[1] for p in parts]
        new = graph.call_function(slices.convolution_input_gradients, (*args, widths))
        new.meta["val"] = tuple(torch.empty_like(p.meta["val"], memory_format=torch.contiguous_format) for p in parts)
        for i, part in enumerate(parts):
            part.target, part.args, part.meta["val"] = operator.getitem, (new, i), new.meta["val"][i]
    else:
        new = graph.call_function(slices.convolution_input_gradient, args)
        new.meta["val"] = item.meta["val"]
        item.replace_all_uses_with(new)
        interface.replace(item, new)
    new.meta["graphplan_pure"] = True
    graph.erase_node(item)
    backward.discard(item)
    return new


def _parts_of(whole: fx.Node) -> list[fx.Node]:
    """Return slices that together are all channels of `whole` (N, C, ...), if nothing else reads it; none otherwise.

    Each is read only by ops that give the same bits for dense operands.
    """
    first: dict[Any, fx.Node] = {n.args[2]: n for n in whole.users if n.target is aten.slice.Tensor}
    if len(first) < len(whole.users):
        return []
    parts, place = [], 0
    for start in sorted(first):
        part = first[start]
        if part.args[1:3] != (1, place) or part.args[4:] not in ((), (1,)) or not all(map(_any_strides, part.users)):
            return []
        place += part.meta["val"].shape[1]
        parts.append(part)
    return parts if len(parts) > 1 and place == whole.meta["val"].shape[1] else []


def _any_strides(node: fx.Node) -> bool:
    """Whether an op computes the same, in the same layout, for contiguous operands as for slices of such."""
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return bool(node.meta["val"].is_contiguous()) and aliased_input(node) is None
    return node.target is aten.convolution_backward.default or node.target in slices.SLICED


def _weight_gradient(graph: fx.Graph, node: fx.Node, items: dict[Any, fx.Node], exact: bool) -> fx.Node:
    grad, x, weight, *options, _ = node.args
    wanted = [1 in items, 2 in items]
    if exact:
        new = graph.call_function(aten.convolution_backward.default, (*node.args[:-1], [False, *wanted]))
        first = 1
        new.meta["val"] = (None, *(t if w else None for t, w in zip(node.meta["val"][1:], wanted, strict=True)))
    else:
        args = (grad, x, weight, list(options), wanted)
        new = graph.call_function(slices.convolution_weight_gradient, args)
        first = 0
        new.meta["val"] = tuple(t if w else None for t, w in zip(node.meta["val"][1:], wanted, strict=True))
        new.meta["graphplan_pure"] = True
    for index in (1, 2):
        if index in items:
            items[index].args = (new, index - 1 + first)
    return new


def product_of(grad: fx.Node, param: fx.Node, backward: set[fx.Node]) -> tuple[fx.Node, fx.Node, bool] | None:
    """Return (a, b, turned) where a large gradient is `a @ b` (turned: its transpose), is read only as it, and costs.

    A parameter that the backward reads, for the input's gradient, is updated behind that op: a product keeps the saved
    activation until then, where the gradient itself could be computed first and let it go.
    """
    value = param.meta["val"]
    node, turns = grad, 0
    while node.target in _TURNS and len(node.users) <= 1:
        turns += _TURNS[node.target]
        node = node.all_input_nodes[0]
    turned = turns % 2 == 1
    if node.target is not aten.mm.default or len(node.users) > 1 or not _large(value) or value.dim() != 2:
        return None
    a, b = node.args
    shape = node.meta["val"].shape
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or value.shape != (shape[::-1] if turned else shape):
        return None
    saved = sum(_nbytes(n.meta["val"]) for n in (a, b) if n not in backward)
    if _nbytes(value) <= saved and any(u in backward and aliased_input(u) is None for u in view_readers(param)):
        return None
    return a, b, turned


def _replaced(graph: fx.Graph, backward: set[fx.Node], node: fx.Node, *new: fx.Node) -> None:
    backward.discard(node)
    backward.update(new)
    graph.erase_node(node)


def _large(value: Tensor) -> bool:
    return _nbytes(value) >= LEAST_BYTES


def _nbytes(value: Tensor) -> int:
    return math.prod(value.shape) * value.element_size()


def _plain(value: Tensor) -> bool:
    """Whether a tensor fills its storage in the order of its dimensions."""
    nbytes = value.numel() * value.element_size()
    return value.is_contiguous() and value.storage_offset() == 0 and value.untyped_storage().nbytes() == nbytes


def _dies_at(graph: fx.Graph, backward: set[fx.Node], grad: fx.Node, reader: fx.Node) -> bool:
    """Whether nothing reads the memory of `grad` after `reader`, and it was written in the backward."""
    holders = defaultdict(list)
    order = {}
    for t, node in enumerate(graph.nodes):
        order[node] = t
        for value in tensors_of(node):
            holders[value.untyped_storage()._cdata].append(node)
    own = holders[grad.meta["val"].untyped_storage()._cdata]
    if any(n not in backward and n.target is not operator.getitem for n in own):
        return False
    return all(order[user] <= order[reader] for n in own for user in n.users)
