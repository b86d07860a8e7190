"""Dropout from the mask that it drew, forward and backward: native_dropout's products, nothing beside the result."""

from __future__ import annotations

import torch
from torch import Tensor

from graphplan.functions.register import registered
from graphplan.functions.scale import scaled_by_mask


@registered("(Tensor x, Tensor mask, float p) -> Tensor", lambda x, mask, p: torch.empty_like(x))
def dropout_from_mask(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Return native_dropout's output for the `mask` it drew: the same two products, no random number."""
    scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
    scaled = scaled_by_mask(x, mask, scale)
    return _times(_ones(mask, x).mul_(x), scale) if scaled is None else scaled


@registered(
    "(Tensor grad, Tensor mask, float scale) -> Tensor",
    lambda grad, mask, scale: torch.empty_like(grad),
    tags=(torch.Tag.pointwise,),
)
def dropout_backward(grad: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return the gradient of what dropout with `mask` and `scale` was applied to, as eager mode on a CPU makes it.

    ATen's native_dropout_backward needs a copy of the mask that is as wide as the gradient, and does not round the
    scale to a narrow dtype.
    """
    scaled = scaled_by_mask(grad, mask, scale)
    return _times(_ones(mask, grad), scale).mul_(grad) if scaled is None else scaled


def _ones(mask: Tensor, like: Tensor) -> Tensor:
    """Return a bool mask as numbers in the memory layout of `like`; bytes are converted in vectors, bools are not."""
    return torch.empty_like(like).copy_(mask.view(torch.uint8))


def _times(x: Tensor, scale: float) -> Tensor:
    # This overload rounds the scale to x's dtype first, as native_dropout does; `mul_(scale)` does not.
    return torch.ops.aten.mul_.Scalar(x, scale)  # type: ignore[no-any-return]
