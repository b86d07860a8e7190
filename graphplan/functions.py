"""The functions that rewritten graphs call beside ATen: codecs' halves and repeatable variants.

Memory is part of each contract: results are allocated by torch (so that the allocator's meter sees them) and
temporaries never exceed a chunk of CHUNK elements, whatever the size of the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 18


def packed_bytes(numel: int) -> int:
    """Return the bytes of `numel` packed bits."""
    return (numel + 7) // 8


def pack_bits(mask: Tensor) -> Tensor:
    """Return the bits of a dense bool tensor, in storage order, as uint8 (ceil(numel / 8),); first bit highest."""
    packed = torch.empty(packed_bytes(mask.numel()), dtype=torch.uint8, device=mask.device)
    flat = _in_storage_order(mask)
    for piece, (start, stop) in _pieces(mask.numel()):
        packed[piece] = _pack(flat[start:stop])
    return packed


def unpack_bits(packed: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return the bool tensor that `pack_bits` packed, with its `size` and `stride`."""
    mask = torch.empty_strided(tuple(size), tuple(stride), dtype=torch.bool, device=packed.device)
    flat = _in_storage_order(mask)
    for piece, (start, stop) in _pieces(mask.numel()):
        flat[start:stop] = _unpack(packed[piece], stop - start)
    return mask


def pack_above(x: Tensor, threshold: float) -> Tensor:
    """Return pack_bits(not (x <= threshold)): the elements whose gradient `threshold_backward` lets through.

    NaN counts as above, as it does there.
    """
    packed = torch.empty(packed_bytes(x.numel()), dtype=torch.uint8, device=x.device)
    flat = _in_storage_order(x)
    for piece, (start, stop) in _pieces(x.numel()):
        packed[piece] = _pack((flat[start:stop] <= threshold).logical_not_())
    return packed


def threshold_backward_packed(grad: Tensor, packed: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return `threshold_backward(grad, x, t)` for the x of `size` and `stride` with `packed == pack_above(x, t)`."""
    if tuple(grad.stride()) != tuple(stride):
        return torch.where(unpack_bits(packed, size, stride), grad, 0)
    out = torch.empty_strided(tuple(size), tuple(stride), dtype=grad.dtype, device=grad.device)
    flat, flat_grad = _in_storage_order(out), _in_storage_order(grad)
    for piece, (start, stop) in _pieces(grad.numel()):
        blocked = _unpack(packed[piece], stop - start).logical_not_()
        flat[start:stop] = flat_grad[start:stop].masked_fill(blocked, 0)
    return out


def narrow_integers(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return non-negative integers `x` in the narrower `dtype`; the caller has proven that they fit."""
    return x.to(dtype)


def widen_integers(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in its original integer `dtype`."""
    return x.to(dtype)


def dropout_from_mask(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Return native_dropout's output for the `mask` it drew: the same two products, no random number."""
    scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
    # This overload rounds the scale to x's dtype first, as native_dropout does; `mul_(scale)` does not.
    return torch.ops.aten.mul_.Scalar(x.mul(mask), scale)  # type: ignore[no-any-return]


def is_dense(x: Tensor) -> bool:
    """Return whether the elements of `x` fill its storage: no gaps, no overlap, no offset."""
    step = 1
    for stride, size in sorted((st, sz) for sz, st in zip(x.shape, x.stride(), strict=True) if sz != 1):
        if stride != step:
            return False
        step *= size
    return x.storage_offset() == 0 and x.untyped_storage().nbytes() == x.numel() * x.element_size()


def _in_storage_order(x: Tensor) -> Tensor:
    return torch.as_strided(x, (x.numel(),), (1,))


def _pieces(numel: int) -> Iterator[tuple[slice, tuple[int, int]]]:
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        yield slice(start // 8, packed_bytes(stop)), (start, stop)


def _pack(bits: Tensor) -> Tensor:
    """Pack a chunk of bool (n,) into uint8 (ceil(n / 8),)."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.packbits(bits.numpy()))
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    packed = padded[:, 0] << 7
    for i in range(1, 8):
        packed |= padded[:, i] << (7 - i)
    return packed


def _unpack(packed: Tensor, numel: int) -> Tensor:
    """Unpack a chunk of uint8 into bool (numel,)."""
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=numel).view(np.bool_))
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).view(-1)[:numel].bool()
