"""Ops that work in slices: the same kernels on parts of their operands, in a fraction of the memory.

Where parts are independent (channels of a BatchNorm, images of a convolution and of its input gradient), the bits are
those of the whole as long as torch takes the same kernel for a part, which on CPU `_images` sees to. A sum over slices
rounds differently; such functions say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
SLICE_BYTES = 1 << 20  # of one operand: fits a cache
# ATen/native/Convolution.cpp, use_mkldnn: one image of no more elements goes to another kernel than several do
LONE_IMAGE = 20480


def batch_norm_backward_(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return native_batch_norm_backward's three results for `x` (N, C, ...); the first is written over `grad`."""
    return _batch_norm_backward(grad, x, weight, mean, invstd, eps, grad)


def batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return native_batch_norm_backward's three results for `x` (N, C, ...), whose scratch is then that of a slice."""
    return _batch_norm_backward(grad, x, weight, mean, invstd, eps, torch.empty_like(grad))


def _batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, eps: float, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if grad.shape != x.shape or any(t.shape != x.shape[1:2] for t in (weight, mean, invstd)):
        raise ValueError("BatchNorm's statistics belong to another input")  # the kernel would read beyond them
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
    for s in _slices(x.shape[1], x.numel() * x.element_size()):
        part = aten.native_batch_norm_backward.default(
            grad[:, s].contiguous(),
            x[:, s].contiguous(),
            weight[s],
            mean[s],
            invstd[s],
            mean[s],
            invstd[s],
            True,
            eps,
            [True, True, True],
        )
        out[:, s], grad_weight[s], grad_bias[s] = part
        del part
    return out, grad_weight, grad_bias


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, options: Sequence[Any], size: Sequence[int]) -> Tensor:
    """Return the convolution of `x` (N, C, ...), whose result is of `size`, image by image.

    The kernel's scratch, which may be as large as operand and result together, is then that of a slice. `options` are
    the op's arguments from `stride` to `groups`.
    """
    out = x.new_empty(tuple(size))
    for s in _images(out, x):
        out[s] = aten.convolution.default(x[s], weight, bias, *options)
    return out


def convolution_input_gradient(grad: Tensor, size: Sequence[int], weight: Tensor, options: Sequence[Any]) -> Tensor:
    """Return convolution_backward's gradient for an input of `size` (N, C, ...), image by image.

    `options` are that op's arguments from `bias_sizes` to `groups`.
    """
    out = grad.new_empty(tuple(size))
    for s in _images(grad, out):
        # Of the input only the geometry counts, which its own gradient shares.
        part = aten.convolution_backward.default(grad[s], out[s], weight, *options, [True, False, False])
        out[s] = part[0]
        del part
    return out


def convolution_input_gradients(
    grad: Tensor, size: Sequence[int], weight: Tensor, options: Sequence[Any], widths: Sequence[int]
) -> tuple[Tensor, ...]:
    """Return `convolution_input_gradient` cut along the channels into tensors of `widths`, each of its own memory."""
    if sum(widths) != size[1]:
        raise ValueError(f"parts of {list(widths)} channels are not all of {size[1]}")
    outs = tuple(grad.new_empty((size[0], width, *size[2:])) for width in widths)
    whole = torch.empty(tuple(size), dtype=grad.dtype, device="meta")
    memory = max(outs, key=Tensor.numel).view(-1)
    for s in _images(grad, whole):
        shape, count = whole[s].shape, whole[s].numel()
        # Again only the geometry of the input counts, so that any memory stands in for it.
        x = memory[:count].view(shape) if count <= memory.numel() else grad.new_empty(shape)
        part = aten.convolution_backward.default(grad[s], x, weight, *options, [True, False, False])
        for out, piece in zip(outs, part[0].split(tuple(widths), dim=1), strict=True):
            out[s] = piece
        del part, piece, x
    return outs


def convolution_weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, options: Sequence[Any], mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return convolution_backward's gradients for weight and bias (`mask`), summed image by image: other rounding."""
    total: list[Tensor | None] = [None, None]
    for s in _images(grad, x):
        part = aten.convolution_backward.default(grad[s], x[s], weight, *options, [False, *mask])
        for i, new in enumerate(part[1:]):
            if mask[i]:
                total[i] = new if total[i] is None else total[i].add_(new)  # type: ignore[union-attr]
        del part, new
    return total[0], total[1]


SLICED = (
    batch_norm_backward,
    batch_norm_backward_,
    convolution,
    convolution_input_gradient,
    convolution_input_gradients,
    convolution_weight_gradient,
)


def _images(y: Tensor, x: Tensor) -> Iterator[slice]:
    """Cut a batch (N, C, ...) into slices of images for which torch takes the kernel that it takes for all."""
    lone = x.shape[0] > 1 and x[0].numel() <= LONE_IMAGE
    return _slices(x.shape[0], max(t.numel() * t.element_size() for t in (y, x)), least=2 if lone else 1)


def _slices(count: int, nbytes: int, least: int = 1) -> Iterator[slice]:
    """Cut `count` parts of `nbytes` together into slices of about SLICE_BYTES, none of fewer than `least` parts."""
    cuts = max(1, min(count // least, -(-nbytes // SLICE_BYTES)))
    for i in range(cuts):
        yield slice(count * i // cuts, count * (i + 1) // cuts)
