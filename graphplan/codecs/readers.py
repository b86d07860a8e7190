"""What backward ops read of their arguments: READERS is the table; one line adds an op.

An op that is not here, or an argument of it that is not, reads values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Reads:
    """An op's `argument` is read for its shape alone, or for the side of a decision that each element is on.

    `side` is a key of functions.SIDES; `consts` are the positions, among the op's arguments, of its constants. The op
    is then elementwise. `when` says of the op's arguments whether this holds.
    """

    argument: int
    side: str | None = None
    consts: tuple[int, ...] = ()
    when: Callable[[tuple[Any, ...]], bool] = lambda args: True


READERS: dict[torch._ops.OpOverload, tuple[Reads, ...]] = {
    aten.threshold_backward.default: (Reads(1, "above", (2,)),),
    aten.hardtanh_backward.default: (Reads(1, "inside", (2, 3)),),
    aten.leaky_relu_backward.default: (Reads(1, "positive"),),
    aten.hardsigmoid_backward.default: (Reads(1, "hard"),),
    # clamp's backward asks these of its input.
    aten.ge.Scalar: (Reads(0, "ge", (1,)),),
    aten.gt.Scalar: (Reads(0, "gt", (1,)),),
    aten.le.Scalar: (Reads(0, "le", (1,)),),
    aten.lt.Scalar: (Reads(0, "lt", (1,)),),
    aten.eq.Scalar: (Reads(0, "eq", (1,)),),
    aten.ne.Scalar: (Reads(0, "ne", (1,)),),
    aten.avg_pool2d_backward.default: (Reads(1),),
    aten.avg_pool3d_backward.default: (Reads(1),),
    aten._adaptive_avg_pool2d_backward.default: (Reads(1),),
    aten._adaptive_avg_pool3d_backward.default: (Reads(1),),
    aten.max_pool2d_with_indices_backward.default: (Reads(1),),
    aten.max_pool3d_with_indices_backward.default: (Reads(1),),
    aten.adaptive_max_pool2d_backward.default: (Reads(1),),
    aten.adaptive_max_pool3d_backward.default: (Reads(1),),
    aten.fractional_max_pool2d_backward.default: (Reads(1),),
    aten.fractional_max_pool3d_backward.default: (Reads(1),),
    aten.reflection_pad1d_backward.default: (Reads(1),),
    aten.reflection_pad2d_backward.default: (Reads(1),),
    aten.reflection_pad3d_backward.default: (Reads(1),),
    aten.replication_pad1d_backward.default: (Reads(1),),
    aten.replication_pad2d_backward.default: (Reads(1),),
    aten.replication_pad3d_backward.default: (Reads(1),),
    aten.nll_loss_backward.default: (Reads(1),),
    aten.nll_loss2d_backward.default: (Reads(1),),
    # Of a convolution: the input when the weight's gradient is not asked for, and the other way round.
    aten.convolution_backward.default: (
        Reads(1, when=lambda args: not args[10][1]),
        Reads(2, when=lambda args: not args[10][0]),
    ),
}


def reads_of(node: fx.Node, argument: int) -> Reads | None:
    """Return what `node` reads of an argument, None for its values.

    Any elementwise op reads of a bool only on which side it is.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    found = next((r for r in READERS.get(target, ()) if r.argument == argument and r.when(node.args)), None)
    if found is not None:
        return found
    value = node.args[argument].meta["val"]  # type: ignore[union-attr]
    return Reads(argument, "true") if value.dtype is torch.bool and torch.Tag.pointwise in target.tags else None
