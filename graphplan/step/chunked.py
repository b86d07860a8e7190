"""A linear layer and its cross-entropy in chunks of rows: the logits never exist whole.

`chunk_loss` finds the pattern in a step's graph; `linear_cross_entropy` computes loss and gradients together, which a
step can do because the loss is its last forward op and its gradient is known.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphplan.interface import Interface

aten = torch.ops.aten
CHUNKS = 16
_SAME_BYTES = (aten.view.default, aten._unsafe_view.default, aten.detach.default, aten.t.default)
Parts = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def linear_cross_entropy(
    hidden: Tensor,
    weight_t: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reduction: int,
    ignore_index: int,
    wanted: Sequence[bool],
) -> Parts:
    """Return the loss and, where `wanted`, its gradients for `hidden`, the weight and the bias.

    hidden (N, D), weight_t (D, V), bias (V,), target (N,); gradients (N, D), (V, D), (1, V). `reduction` is torch's: 1
    mean, 2 sum. The terms are those of the whole computation; only sums over chunks round differently.

    Raises:
        ValueError: targets of another batch, or another reduction.
    """
    if target.shape != hidden.shape[:1] or reduction not in (1, 2):
        raise ValueError(f"targets of shape {tuple(target.shape)} for {hidden.shape[0]} rows, reduction {reduction}")
    count, vocabulary = hidden.shape[0], weight_t.shape[1]
    total = (target != ignore_index).sum().to(hidden.dtype)
    one = hidden.new_ones(())
    loss = hidden.new_zeros(())
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = hidden.new_empty((vocabulary, hidden.shape[1])) if wanted[1] else None
    grad_bias = hidden.new_zeros((1, vocabulary)) if wanted[2] else None
    rows = -(-count // CHUNKS)
    for start in range(0, count, rows):
        s = slice(start, start + rows)
        part = hidden[s]
        logits = part @ weight_t if bias is None else torch.addmm(bias, part, weight_t)
        scores = aten._log_softmax.default(logits, 1, False)
        del logits
        loss += aten.nll_loss_forward.default(scores, target[s], None, 2, ignore_index)[0]
        grad = aten.nll_loss_backward.default(one, scores, target[s], None, reduction, ignore_index, total)
        grad = aten._log_softmax_backward_data.default(grad, scores, 1, hidden.dtype)
        del scores
        if grad_hidden is not None:
            torch.mm(grad, weight_t.t(), out=grad_hidden[s])
        if grad_weight is not None:
            torch.addmm(grad_weight, grad.t(), part, beta=0 if start == 0 else 1, out=grad_weight)
        if grad_bias is not None:
            grad_bias += grad.sum(0, keepdim=True)
        del grad
    return loss / total if reduction == 1 else loss, grad_hidden, grad_weight, grad_bias


@dataclass(frozen=True, slots=True)
class _Found:
    """One linear layer with its cross-entropy, as nodes of a joint graph."""

    hidden: fx.Node
    weight_t: fx.Node
    bias: fx.Node | None
    forward: fx.Node  # nll_loss_forward
    loss: fx.Node  # its item
    scale: fx.Node  # the loss's own gradient
    gradients: tuple[fx.Node | None, fx.Node | None, fx.Node | None]  # of hidden, weight, bias


def chunk_loss(graph: fx.Graph, interface: Interface, backward: set[fx.Node], *, only_look: bool = False) -> bool:
    """Replace every linear layer under a cross-entropy by its chunked form; return whether there is one."""
    found = [f for n in graph.nodes if n.target is aten.nll_loss_forward.default and (f := _match(n))]
    for match in () if only_look else found:
        _replace(graph, interface, backward, match)
    return bool(found)


def _match(node: fx.Node) -> _Found | None:
    """Return the pattern around one nll_loss_forward, None where the logits have another use."""
    scores, _target, weight, reduction, _ = node.args
    items: dict[Any, fx.Node] = {u.args[1]: u for u in node.users}
    if weight is not None or reduction not in (1, 2) or 0 not in items:
        return None
    if not isinstance(scores, fx.Node) or scores.target is not aten._log_softmax.default or scores.args[1] != 1:
        return None
    logits = _base(scores.args[0])
    if logits.target is aten.mm.default:
        bias, (hidden, weight_t) = None, logits.args
    elif logits.target is aten.addmm.default and not logits.kwargs:
        bias, hidden, weight_t = logits.args
    else:
        return None
    back = [n for n in _uses(scores) if n is not node]
    grads = [n for n in back if n.target is aten.nll_loss_backward.default]
    if len(grads) != 1 or _uses(logits) != [scores] or items.keys() - {0, 1}:
        return None
    (final,) = _uses(grads[0])[:1] or (None,)
    if final is None or final.target is not aten._log_softmax_backward_data.default or set(back) != {grads[0], final}:
        return None
    gradients = _readers(final, hidden, weight_t)
    if gradients is None:
        return None
    return _Found(hidden, weight_t, bias, node, items[0], grads[0].args[0], gradients)  # type: ignore[arg-type]


def _readers(
    final: fx.Node, hidden: Any, weight_t: Any
) -> tuple[fx.Node | None, fx.Node | None, fx.Node | None] | None:
    """Return the gradients of hidden, weight and bias that are computed from the logits' gradient, and nothing else."""
    found: list[fx.Node | None] = [None, None, None]
    for user in _uses(final):
        first = user.args[0]
        turned = _base(first) is final and _turned(first)
        if user.target is aten.mm.default and _base(first) is final:
            place, other = (1, _base(user.args[1]) is _base(hidden)) if turned else (0, _is_turned(user, weight_t))
        elif user.target is aten.sum.dim_IntList and user.args[1] == [0] and user.args[2:] == (True,):
            place, other = 2, not turned
        else:
            return None
        if found[place] is not None or not other:
            return None
        found[place] = user
    return found[0], found[1], found[2]


def _replace(graph: fx.Graph, interface: Interface, backward: set[fx.Node], match: _Found) -> None:
    _, target, _, reduction, ignore = match.forward.args
    wanted = [g is not None for g in match.gradients]
    with graph.inserting_before(match.forward):
        args = (match.hidden, match.weight_t, match.bias, target, reduction, ignore, wanted)
        new = graph.call_function(linear_cross_entropy, args)
        vals = [None if n is None else torch.empty_like(n.meta["val"]) for n in (match.loss, *match.gradients)]
        new.meta["val"] = tuple(vals)
        logits = match.forward.args[0].meta["val"]  # type: ignore[union-attr]
        # Whole, two tensors of the logits' size are alive at once; in chunks, two of a chunk's.
        saved = 2 * logits.numel() * logits.element_size() * (CHUNKS - 1) // CHUNKS
        new.meta["graphplan_saves"] = ("computing the loss in chunks of rows", saved)
        items = [new if v is None else graph.call_function(operator.getitem, (new, i)) for i, v in enumerate(vals)]
    for item, val in zip(items, vals, strict=True):
        item.meta.setdefault("val", val)
    for old, item in zip((match.loss, *match.gradients), items, strict=True):
        if old is not None:
            value = item if old is match.loss else _scaled(graph, backward, item, match.scale, old)
            old.replace_all_uses_with(value)
            interface.replace(old, value)
            _erase_unused(graph, backward, old)


def _erase_unused(graph: fx.Graph, backward: set[fx.Node], node: fx.Node) -> None:
    """Erase a node without users, and what only it had used."""
    if node.users or node.op != "call_function" or node._erased:
        return
    operands = node.all_input_nodes
    backward.discard(node)
    graph.erase_node(node)
    for operand in operands:
        _erase_unused(graph, backward, operand)


def _scaled(graph: fx.Graph, backward: set[fx.Node], item: fx.Node, scale: fx.Node, place: fx.Node) -> fx.Node:
    """Multiply by the gradient that reaches the loss, where that is not one."""
    if scale.target is aten.ones_like.default:
        return item
    with graph.inserting_before(place):
        node = graph.call_function(aten.mul.Tensor, (item, scale))
    node.meta["val"] = torch.empty_like(item.meta["val"])
    backward.add(node)
    return node


def _base(node: Any) -> fx.Node:
    while node.target in _SAME_BYTES:
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def _turned(node: Any) -> bool:
    """Whether `node` is its base transposed."""
    turns = 0
    while node.target in _SAME_BYTES:
        turns += node.target is aten.t.default
        node = node.args[0]
    return turns % 2 == 1


def _is_turned(user: fx.Node, weight_t: Any) -> bool:
    """Whether the second operand of `user` is `weight_t`, transposed."""
    other = user.args[1]
    return _base(other) is _base(weight_t) and _turned(other) is not _turned(weight_t)


def _uses(node: fx.Node) -> list[fx.Node]:
    """Return what reads a node, through views."""
    found: dict[fx.Node, None] = {}
    for user in node.users:
        found.update(dict.fromkeys(_uses(user) if user.target in _SAME_BYTES else [user]))
    return list(found)
