"""Forms of ATen ops that read an encoding in place of an activation, as ops of `torch.ops.graphplan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphplan.functions.register import derived
from graphplan.functions.stand_in import run_on_shape, run_on_side

_LIKE = "ScalarType like_dtype, int[] like_size, int[] like_stride"


def from_sides(op: torch._ops.OpOverload, at: int, over: int | None = None) -> torch._ops.OpOverload:
    """Return the elementwise `op` that reads the sides of its argument `at`; it may write over its argument `over`.

    Its arguments are `run_on_side`'s: packed, part, values, then like (dtype, size, stride), the result's dtype and
    stride, then `op`'s own without `at`.
    """

    def run(
        packed: Tensor, part: int, values: Sequence[float], dtype: torch.dtype, size: Sequence[int],
        stride: Sequence[int], result_dtype: torch.dtype, result_stride: Sequence[int], *others: Any,
    ) -> Tensor:  # fmt: skip
        args = (*others[:at], None, *others[at:])
        pair, like = (values[0], values[1]), (dtype, size, stride)
        return run_on_side(op, args, at, packed, part, pair, like, (result_dtype, size, result_stride), over)

    def fake(
        packed: Tensor, part: int, values: Sequence[float], dtype: torch.dtype, size: Sequence[int],
        stride: Sequence[int], result_dtype: torch.dtype, result_stride: Sequence[int], *others: Any,
    ) -> Tensor:  # fmt: skip
        if over is not None:
            written: Tensor = (*others[:at], None, *others[at:])[over]
            return written
        return torch.empty_strided(tuple(size), tuple(result_stride), dtype=result_dtype, device=packed.device)

    instead = f"Tensor packed, int part, float[] values, {_LIKE}, ScalarType result_dtype, int[] result_stride"
    return derived(op, at, "from_sides", instead, run, fake, over)


def from_shape(op: torch._ops.OpOverload, at: int) -> torch._ops.OpOverload:
    """Return `op` that reads the shape alone of its argument `at`.

    Its arguments are `run_on_shape`'s: a tensor on the device, like (dtype, size, stride), fill, then `op`'s own
    without `at`.
    """

    def run(
        beside: Tensor, dtype: torch.dtype, size: Sequence[int], stride: Sequence[int], fill: bool, *others: Any
    ) -> Any:
        args = (*others[:at], None, *others[at:])
        return run_on_shape(op, args, at, beside.device, (dtype, size, stride), fill)

    def fake(beside: Tensor, dtype: torch.dtype, size: Sequence[int], stride: Sequence[int], _: bool, *o: Any) -> Any:
        return run(beside, dtype, size, stride, False, *o)  # some ops have no fake kernel that writes to given memory

    return derived(op, at, "from_shape", f"Tensor beside, {_LIKE}, bool fill", run, fake)
