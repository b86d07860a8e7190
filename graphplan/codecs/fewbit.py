"""Few-bit codes: of an activation that only the backward of its elementwise function reads, that function's derivative.

A GELU's input is such an activation. Its code is of f'(x), in `functions.slope`: in the same bytes it adds less noise
than a code of x, and no bias; nothing as large as x is decoded. Where anything else in the backward reads values of the
activation there is no such code: the activation itself would still be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from graphplan import functions
from graphplan.codecs.find import Call, backward_readers, base_of, encode, instead, packed, saved_nodes, target_of
from graphplan.codecs.lossy import codable
from graphplan.graph import Graph, GraphOp
from graphplan.in_place import operands_of
from graphplan.instructions import Emitter, Encoded, Instruction, Loss

aten = torch.ops.aten
Slope = tuple[str, tuple[float, ...]]  # a key of functions.SLOPES and its constants


@dataclass(frozen=True, slots=True)
class Backward:
    """A backward op: `function` names its key in functions.SLOPES, `argument` is what it reads beside the gradient."""

    function: Callable[[fx.Node], str]
    argument: int = 1
    consts: tuple[int, ...] = ()
    when: Callable[[tuple[Any, ...]], bool] = lambda args: True


BACKWARDS: dict[torch._ops.OpOverload, Backward] = {
    aten.gelu_backward.default: Backward(lambda n: "gelu_tanh" if n.kwargs.get("approximate") == "tanh" else "gelu"),
    aten.silu_backward.default: Backward(lambda n: "silu"),
    aten.mish_backward.default: Backward(lambda n: "mish"),
    aten.hardswish_backward.default: Backward(lambda n: "hardswish"),
    aten.softplus_backward.default: Backward(lambda n: "softplus", consts=(2, 3)),
    aten.elu_backward.default: Backward(lambda n: "elu", 5, (1, 2, 3), when=lambda args: not args[4]),
    aten.tanh_backward.default: Backward(lambda n: "tanh"),
    aten.sigmoid_backward.default: Backward(lambda n: "sigmoid"),
}


@dataclass(frozen=True, slots=True)
class FewBit:
    """Rounds derivatives to `bits` an element; its noise is estimated and capped (`graphplan.noise`)."""

    name: str
    bits: int
    exact: bool = False

    def find(self, graph: Graph, first_id: int) -> tuple[list[Encoded], list[Instruction]]:
        """Return a code for every activation whose one backward reader is its function's backward."""
        encoded: list[Encoded] = []
        made: list[Instruction] = []
        readers, operands = backward_readers(graph), operands_of(graph)
        for node, storage in saved_nodes(graph):
            if not codable(node, self.bits) or len(readers[storage]) != 1:
                continue
            (op,) = readers[storage]
            slope = _slope_read(graph, op, node, storage)
            if slope is None:
                continue
            nbytes = functions.quantised_bytes(node.meta["val"].numel(), self.bits)
            loss = Loss(FEWBIT4.name, partial(_error, slope=slope, bits=self.bits))
            id_, name = first_id + len(encoded), f"{node.name}__{self.name}"
            encoded.append(replace(packed(id_, name, nbytes, storage, self.name), loss=loss))
            args = (slope[0], list(slope[1]), self.bits)
            made.append(encode(node, storage, encoded[-1], functions.quantise_slopes, args, keyed=True))
            made.append(self._run(graph, op, storage, encoded[-1], operands.get(op.id)))
        return encoded, made

    def _run(self, graph: Graph, op: GraphOp, storage: int, new: Encoded, operand: int | None) -> Instruction:
        at, result = BACKWARDS[target_of(op.node)].argument, op.node.meta["val"]
        val = op.node.args[at].meta["val"]  # type: ignore[union-attr]
        like = (tuple(val.shape), tuple(val.stride()), result.dtype, tuple(result.stride()))
        grad = op.node.args[0]
        over = 0 if isinstance(grad, fx.Node) and operand in graph.storages_of[grad.name] else None

        def call(out: Emitter) -> Call:
            form = functions.from_slopes(target_of(op.node), at, over if out.takes_over else None)
            others = fx.map_arg((*op.node.args[:at], *op.node.args[at + 1 :]), out.load)
            return form, (out.load_encoded(new.id), self.bits, *like, *others)

        return instead(graph, op, storage, new, f"from_{self.name}", call, operand if over is not None else None)


def _slope_read(graph: Graph, op: GraphOp, node: fx.Node, storage: int) -> Slope | None:
    """Return the derivative that `op` asks of the activation `node`, None if it asks for something else."""
    found = BACKWARDS.get(op.node.target)  # type: ignore[call-overload]
    if found is None or not op.repeatable or not found.when(op.node.args):
        return None
    grad, arg = op.node.args[0], op.node.args[found.argument]
    if not isinstance(grad, fx.Node) or not isinstance(arg, fx.Node) or storage in graph.storages_of[grad.name]:
        return None
    a, b, g, result = (n.meta["val"] for n in (arg, node, grad, op.node))
    # Any view of all of it: its elements lie in memory as the activation's do.
    whole = base_of(graph, arg) is node and functions.is_dense(a) and a.numel() == b.numel() and a.dtype == b.dtype
    if not whole or g.shape != a.shape or result.shape != a.shape:
        return None
    return found.function(op.node), tuple(float(op.node.args[i]) for i in found.consts)


def _error(x: torch.Tensor, slope: Slope, bits: int) -> float:
    return functions.slope_error(x, *slope, bits)


FEWBIT4, FEWBIT2 = FewBit("fewbit4", 4), FewBit("fewbit2", 2)
