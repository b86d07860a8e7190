"""What kernels believe of their caller and a document could break: each rule is asked before a program is built.

Found by trying: hostile indices make max pooling's backward write out of bounds, short statistics make BatchNorm's
read there. Every op of the list that reads more than its own checks cover has a rule here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphplan import functions
from graphplan.program.document import need
from graphplan.program.ops import base_of

aten = torch.ops.aten
Named = dict[str, Any]  # a call's arguments by their names in the schema


def named_arguments(target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Named:
    """Return a call's arguments by name, its defaults among them."""
    found = {a.name: a.default_value for a in target._schema.arguments}
    found.update(zip((a.name for a in target._schema.arguments), args, strict=False))
    return {**found, **kwargs}


def _like(named: Named, *names: str) -> bool:
    """Whether these tensors have one shape."""
    return len({tuple(named[n].shape) for n in names if isinstance(named.get(n), Tensor)}) <= 1


def _long(named: Named, length: int, *names: str) -> bool:
    """Whether these tensors are absent or vectors of `length`."""
    return all(tuple(named[n].shape) == (length,) for n in names if isinstance(named.get(n), Tensor))


def _input_shape(named: Named) -> tuple[int, ...]:
    return tuple(named["self"].shape) if "self" in named else tuple(named["like_size"])


def _batch_norm_backward(named: Named) -> bool:
    x = named["input"]
    statistics = ("weight", "running_mean", "running_var", "save_mean", "save_invstd")
    return x.dim() > 1 and _like(named, "grad_out", "input") and _long(named, x.shape[1], *statistics)


def _layer_norm_backward(named: Named) -> bool:
    x, size = named["input"], tuple(named["normalized_shape"])
    rows = x.numel() // max(1, torch.Size(size).numel())
    good = tuple(x.shape[x.dim() - len(size) :]) == size and _like(named, "grad_out", "input")
    good = good and all(tuple(named[n].shape) == size for n in ("weight", "bias") if isinstance(named[n], Tensor))
    return good and named["mean"].numel() == named["rstd"].numel() == rows


def _attention_backward(named: Named) -> bool:
    q, k, v = named["query"], named["key"], named["value"]
    if not q.dim() == k.dim() == v.dim() == 4 or not _like(named, "key", "value"):
        return False
    rows = {tuple(q.shape[:3]), (q.shape[0], q.shape[2], q.shape[1])}
    same = _like(named, "query", "out", "grad_out") and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    return same and tuple(named["logsumexp"].shape) in rows


def _embedding_backward(named: Named) -> bool:
    return tuple(named["grad_output"].shape[:-1]) == tuple(named["indices"].shape)


def _nll_backward(named: Named) -> bool:
    x, target, grad = named["self"], named["target"], named["grad_output"]
    rows = (x.shape[0], *x.shape[2:]) if x.dim() > 1 else ()
    good = tuple(target.shape) == rows and named["total_weight"].numel() == 1
    good = good and (grad.numel() == 1 if named["reduction"] else tuple(grad.shape) == rows)
    return good and _long(named, x.shape[1] if x.dim() > 1 else x.shape[0], "weight")


RULES: dict[torch._ops.OpOverload, Callable[[Named], bool]] = {
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.nll_loss_backward.default: _nll_backward,
    aten.nll_loss2d_backward.default: _nll_backward,
    aten._softmax_backward_data.default: lambda n: _like(n, "grad_output", "output"),
    aten._log_softmax_backward_data.default: lambda n: _like(n, "grad_output", "output"),
    aten.native_dropout_backward.default: lambda n: _like(n, "grad_output", "mask"),
}


def check_call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> None:
    """Check one call on fake tensors, before it is made.

    Raises:
        ProgramError: a rule of the op is broken.
    """
    if node.target is functions.max_pool2d_backward_from_codes:
        _check_pool_codes(node, where)
    base = base_of(node.target)  # type: ignore[arg-type]
    if base is None or not isinstance(node.target, torch._ops.OpOverload):
        return
    if base is aten.max_pool2d_with_indices_backward.default:
        nodes = named_arguments(node.target, node.args, dict(node.kwargs))
        _check_pool(nodes, named_arguments(node.target, args, kwargs), where)
    rule = next((r for op, r in RULES.items() if op.overloadpacket is base.overloadpacket), None)
    if rule is not None and base is node.target:
        need(rule(named_arguments(base, args, kwargs)), f"{where}: arguments that do not belong together")
    elif rule is not None:
        # A form of the op: of the argument that it reads an encoding of, only the shape is known, and asked for.
        named = named_arguments(node.target, args, kwargs)
        encoded = {a.name for a in base._schema.arguments} - named.keys()
        if "like_size" in named:
            named.update(dict.fromkeys(encoded, torch.empty(tuple(named["like_size"]))))
        need(named.keys() >= encoded and rule(named), f"{where}: arguments that do not belong together")


def _check_pool(nodes: Named, named: Named, where: str) -> None:
    """Max pooling's backward writes where its indices say: they must be those of the same pooling's forward."""
    need(named["indices"].shape == named["grad_output"].shape, f"{where}: indices of another shape than the gradient")
    forward = _pooling_of(nodes["indices"], where)
    said = named_arguments(aten.max_pool2d_with_indices.default, forward.args, dict(forward.kwargs))
    geometry = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    same = all(_plain(said[n]) == _plain(nodes[n]) for n in geometry)
    size = tuple(said["self"].meta["val"].shape)
    need(same and size == _input_shape(named), f"{where}: indices of another pooling")


def _check_pool_codes(node: fx.Node, where: str) -> None:
    """The same, from packed indices: they must be those of a pooling of such an input, packed in the same way."""
    arguments: list[Any] = [_plain(a) for a in node.args]
    grad, codes, size, *pooling, _ = arguments
    taken = isinstance(codes, fx.Node) and codes.target is operator.getitem and codes.args[1] == 1
    forward: Any = codes.args[0] if taken else None
    made = isinstance(forward, fx.Node) and forward.target is functions.max_pool2d_to_codes
    need(made and not node.kwargs, f"{where}: its indices are not those of a pooling")
    said = forward.args[1:-1]
    x, out = forward.args[0].meta["val"], forward.meta["val"][0]
    same = pooling == [_plain(a) for a in said] and list(pooling[0]) == list(size[-2:])
    shapes = list(x.shape) == size and grad.meta["val"].shape == out.shape
    need(same and shapes and x.is_contiguous() and out.is_contiguous(), f"{where}: indices of another pooling")


def _pooling_of(node: Any, where: str) -> fx.Node:
    """Return the max pooling whose indices `node` is, through the codecs that keep them exactly."""
    steps: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function" and len(steps) < 8:
        if node.target is operator.getitem and node.args[1] == 1:
            made = node.args[0]
            if isinstance(made, fx.Node) and made.target is aten.max_pool2d_with_indices.default:
                _check_codes(steps, made, where)
                return made
        if node.target is operator.getitem or not node.args:
            break
        steps.append(node)
        node = node.args[0]
    need(False, f"{where}: its indices are not those of a pooling")
    raise AssertionError


def _check_codes(steps: list[fx.Node], made: fx.Node, where: str) -> None:
    """Check that the calls between a pooling and a reader of its indices, last first, give back what they were."""
    size = made.args[0].meta["val"].shape[-2:].numel()  # type: ignore[union-attr]
    allowed = {
        (): True,
        (functions.widen_integers, functions.narrow_integers): True,
        (functions.unpack_pool_indices, functions.pack_pool_indices): True,
    }
    need(tuple(s.target for s in steps) in allowed, f"{where}: its indices are changed on the way")
    if not steps:
        return
    back, there = steps
    if back.target is functions.widen_integers:
        dtype = there.args[1]
        assert isinstance(dtype, torch.dtype)
        need(not dtype.is_floating_point and torch.iinfo(dtype).max >= size - 1, f"{where}: indices cut off")
        return
    indices = made.meta["val"][1]
    same = [_plain(a) for a in back.args[3:]] == [_plain(a) for a in there.args[1:]]
    need(same and _plain(back.args[1]) == list(indices.shape), f"{where}: indices unpacked in another way")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
