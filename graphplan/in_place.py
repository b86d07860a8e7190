"""Where an op may write its result over an operand that nobody reads afterwards: an elementwise one, a BatchNorm, or a
product over what it is added to.

`operands_of` says which operand of each op that could be. Whether it dies there is a matter of the schedule:
`solvers.take_overs` says so, to `simulate` and to the rewrite alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from graphplan.graph import Graph, GraphOp

aten = torch.ops.aten
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def operands_of(graph: Graph) -> dict[int, int]:
    """Return {op id: storage that the op may take over}.

    The op has an in-place form of the same arithmetic; the operand fills its whole storage, has the result's shape,
    strides and dtype, is written in the same half, and no later op of that half reads it.
    """
    half = _halves(graph)
    last = {(s, op.backward): op.id for op in graph.ops for s in op.reads}
    saved = saved_in(graph)
    taken = graph.returned.union(*(graph.storages_of[n] for _, n in graph.mutations))
    found: dict[int, int] = {}
    for op in graph.ops:
        if not op.writes or not ((op.repeatable and len(op.writes) == 1) or _is_batch_norm(op.node)):
            continue
        operands = (s for a in op.node.args if isinstance(a, fx.Node) and (s := _storage(graph, op, a)) is not None)
        free = [s for s in operands if s not in taken and half.get(s) == op.backward and last[s, op.backward] == op.id]
        if free:
            found[op.id] = min(free, key=lambda s: s in saved)  # what no backward op reads is free in every plan
    return found


def saved_in(graph: Graph) -> frozenset[int]:
    """Return what the forward writes and the backward reads: it dies where plans say, any other in its last read."""
    half = _halves(graph)
    return frozenset(s for op in graph.ops if op.backward for s in op.reads if half.get(s) is False)


def _halves(graph: Graph) -> dict[int, bool]:
    return {s: op.backward for op in graph.ops for s in op.writes}


def written_over(graph: Graph, op: GraphOp, storage: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return the call of `op` that writes over its operand in `storage`; `args` are the rewritten ones."""
    nodes = enumerate(op.node.args)
    index = next(i for i, a in nodes if isinstance(a, fx.Node) and _storage(graph, op, a) == storage)
    first, out = _forms(op.node)
    if index == 0 and first is not None:
        return first, args, kwargs
    assert out is not None
    return out, args, {**kwargs, out._schema.arguments[-1].name: args[index]}


def batch_norm_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Return _native_batch_norm_legit_functional's results for `x` (N, C, ...); the first is written over it.

    The same kernel: statistics first, then each element from itself. Without running statistics there are no new ones.
    """
    saved = {"save_mean": weight.new_empty(x.shape[1]), "save_invstd": weight.new_empty(x.shape[1])}
    if mean is None or var is None:
        aten._native_batch_norm_legit.no_stats_out(x, weight, bias, training, momentum, eps, out=x, **saved)
        return (x, *saved.values(), None, None)
    running = mean.clone(), var.clone()
    aten._native_batch_norm_legit.out(x, weight, bias, *running, training, momentum, eps, out=x, **saved)
    return (x, *saved.values(), *running)


def _is_batch_norm(node: fx.Node) -> bool:
    """Whether `batch_norm_` does the same, which was shown on CPU."""
    if node.target is not aten._native_batch_norm_legit_functional.default:
        return False
    (result, saved, *_), weight, training = node.meta["val"], node.args[1], node.args[5]
    like = isinstance(weight, fx.Node) and weight.meta["val"].dtype is saved.dtype
    here = result.device.type == "cpu" and _runs(aten._native_batch_norm_legit.out, "CPU")
    return training is True and like and here


def _storage(graph: Graph, op: GraphOp, operand: fx.Node) -> int | None:
    """Return the storage of `operand` if the op's result fits it exactly and can be written there."""
    value, result = operand.meta.get("val"), op.node.meta["val"]
    storages = graph.storages_of[operand.name]
    if _is_batch_norm(op.node):
        result = result[0]
    if len(storages) != 1 or not isinstance(value, Tensor) or not isinstance(result, Tensor):
        return None
    first, out = _forms(op.node)
    if out is None and (first is None or op.node.args[0] is not operand):
        return None
    (s,) = storages
    if (value.shape, value.stride(), value.dtype) != (result.shape, result.stride(), result.dtype):
        return None
    nbytes = value.numel() * value.element_size()
    if not nbytes == graph.storages[s].nbytes == graph.storages[op.writes[0]].nbytes:
        return None
    # Another view of the same bytes, transposed say, would be read while they change.
    shared = any(s in graph.storages_of[a.name] for a in op.node.all_input_nodes if a is not operand)
    return None if shared else s


def _forms(node: fx.Node) -> tuple[Callable[..., Any] | None, torch._ops.OpOverload | None]:
    value = node.meta.get("val")
    if _is_batch_norm(node):
        return batch_norm_, None
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(value, Tensor):
        return None, None
    return forms_of(node.target, "CUDA" if value.is_cuda else "CPU")


@cache
def forms_of(
    target: torch._ops.OpOverload, key: str
) -> tuple[torch._ops.OpOverload | None, torch._ops.OpOverload | None]:
    """Return the overload that writes over its first argument, and the one with an `out` argument.

    Only those with a kernel of their own on the device: a generated one computes beside and copies.
    """
    if target is aten.addmm.default:
        return (aten.addmm_.default if _runs(aten.addmm_.default, key) else None), None  # `out` would be read meanwhile
    if torch.Tag.pointwise not in target.tags:
        return None, None
    own = [(a.name, str(a.type)) for a in target._schema.arguments]
    first = out = None
    name = target._schema.name.removeprefix("aten::")
    over = getattr(torch.ops.aten, f"{name}_", None) if target.namespace == "aten" else None
    if over is not None and target._overloadname in over.overloads():
        overload = getattr(over, target._overloadname)
        first = overload if _runs(overload, key) else None
    for overload in (getattr(target.overloadpacket, n) for n in target.overloadpacket.overloads()):
        arguments = overload._schema.arguments
        if [(a.name, str(a.type)) for a in arguments[:-1]] == own and arguments[-1].is_out and _runs(overload, key):
            out = overload
    return first, out


def _runs(overload: torch._ops.OpOverload, key: str) -> bool:
    schema = overload._schema
    name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))
