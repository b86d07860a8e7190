"""Backward ops that multiply a gradient by one of two numbers, as a bit or a bool says: one loop for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphplan.functions import native
from graphplan.functions.bits import fills, memory_order


class Scale(NamedTuple):
    """What an element is multiplied by where its bit is set, and where not: None is "left as it is", and "made 0"."""

    on: float | None
    off: float | None


SCALES: dict[str, Callable[..., Scale]] = {  # by the constants behind gradient and activation
    "aten::threshold_backward": lambda threshold: Scale(None, None),
    "aten::hardtanh_backward": lambda low, high: Scale(None, None),
    "aten::leaky_relu_backward": lambda slope, of_result: Scale(None, slope),
    "aten::hardsigmoid_backward": lambda: Scale(1 / 6, None),
    "graphplan::dropout_backward": lambda scale: Scale(scale, 0.0),
}


def scaled_from_bits(op: torch._ops.OpOverload, args: tuple[Any, ...], at: int, bits: Tensor, out: Tensor) -> bool:
    """Write op(*args) to `out` from the bits (ceil(n / 8),) of the sides of argument `at`; return whether it did.

    The gradient, `out` and that argument lie in one order in memory.
    """
    make = SCALES.get(op._schema.name)
    if make is None or at != 1 or not native.serves(args[0], out):
        return False
    _run(make(*args[2:]), bits, True, args[0], out)
    return True


def scaled_by_mask(x: Tensor, mask: Tensor, scale: float) -> Tensor | None:
    """Return x times `scale` where the bool `mask` is true, else times 0; None where no loop serves."""
    out = torch.empty_like(x)
    if not native.serves(x, mask) or not _in_one_order(x, mask, out):
        return None
    _run(Scale(scale, 0.0), mask, False, x, out)
    return out


def _in_one_order(x: Tensor, *others: Tensor) -> bool:
    """Return whether tensors of one shape lie in memory without gaps, in the same order."""
    if x.is_contiguous() and all(t.is_contiguous() for t in others):
        return True
    order = memory_order(x.shape, x.stride())
    return fills(x) and all(memory_order(t.shape, t.stride()) == order for t in others)


def _run(scale: Scale, mask: Tensor, bits: bool, x: Tensor, out: Tensor) -> None:
    on, off = native.number(scale.on or 0.0), native.number(scale.off or 0.0)
    same, zero, over = scale.on is None, scale.off is None, x.data_ptr() == out.data_ptr()
    native.run("scale", native.line(mask), bits, on, off, same, zero, native.line(x), native.line(out), over)
