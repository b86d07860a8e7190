"""Max-pool indices as positions inside their windows: 2, 4 or 8 bits instead of 64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphplan.functions.register import registered

aten = torch.ops.aten
POOL_BLOCK = 1 << 16  # elements worked on at a time: a fourth of CHUNK, as indices have eight bytes
Pooling = tuple[tuple[int, ...], ...]  # input plane, kernel, stride, padding, dilation; a number for each dimension


def pool_code_bits(pooling: Pooling) -> int | None:
    """Return the bits that tell positions in a window apart; None where more than 8 are needed.

    Also None where two positions of a window may be the same index: a window wider than the padded plane's rows.
    """
    if math.prod(pooling[1]) > 256:
        return None
    offsets = _offsets(pooling)
    if len(set(offsets)) < len(offsets):
        return None
    return next((b for b in (2, 4, 8) if len(offsets) <= 1 << b), None)


def pool_code_bytes(size: Sequence[int], stride: Sequence[int], pooling: Pooling) -> int:
    """Return the bytes of `pack_pool_indices` for dense indices of `size` and `stride`."""
    bits = _bits(pooling)
    return sum(_packed(n, bits) for _, n in _blocks(_physical(size, stride)[1]))


_POOLING = "int[] plane, int[] kernel, int[] step, int[] padding, int[] dilation"


def _empty_codes(indices: Tensor, *pooling: Sequence[int]) -> Tensor:
    nbytes = pool_code_bytes(indices.shape, indices.stride(), tuple(map(tuple, pooling)))
    return torch.empty(nbytes, dtype=torch.uint8, device=indices.device)


@registered(f"(Tensor indices, {_POOLING}) -> Tensor", _empty_codes)
def pack_pool_indices(
    indices: Tensor,
    plane: Sequence[int],
    kernel: Sequence[int],
    step: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return, in storage order, which element of its window each of max_pool's (dense) int64 `indices` is."""
    pooling = tuple(map(tuple, (plane, kernel, step, padding, dilation)))
    order, shape = _physical(indices.shape, indices.stride())
    flat, first = indices.permute(order), _first(indices, pooling).permute(order).expand(shape)
    packed = _empty_codes(indices, *pooling)
    for block, place in _code_blocks(shape, _bits(pooling)):
        packed[place] = _codes(flat[block] - first[block], pooling)
    return packed


def _codes(offsets: Tensor, pooling: Pooling) -> Tensor:
    """Return a block's codes, packed, and write over its `offsets`: how far behind its window's first each index is."""
    places = _places(pooling).to(offsets.device)
    offsets = offsets.view(-1).clamp_(0, len(places) - 1)  # made-up indices are anywhere
    return _join(places.index_select(0, offsets), _bits(pooling))


@cache
def _places(pooling: Pooling) -> Tensor:
    """Return which element of its window lies at each offset, uint8."""
    offsets = _offsets(pooling)
    places = torch.zeros(max(offsets) + 1, dtype=torch.uint8)
    places[list(offsets)] = torch.arange(len(offsets), dtype=torch.uint8)
    return places


def _empty_indices(packed: Tensor, size: Sequence[int], stride: Sequence[int], *pooling: Sequence[int]) -> Tensor:
    return torch.empty_strided(tuple(size), tuple(stride), dtype=torch.int64, device=packed.device)


@registered(f"(Tensor packed, int[] size, int[] stride, {_POOLING}) -> Tensor", _empty_indices)
def unpack_pool_indices(
    packed: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    plane: Sequence[int],
    kernel: Sequence[int],
    step: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the int64 indices of `size` and `stride` that `pack_pool_indices` packed."""
    pooling = tuple(map(tuple, (plane, kernel, step, padding, dilation)))
    indices = _empty_indices(packed, size, stride, *pooling)
    order, shape = _physical(size, stride)
    flat, first = indices.permute(order), _first(indices, pooling).permute(order).expand(shape)
    for block, offsets in _offset_blocks(packed, shape, pooling):
        torch.add(first[block], offsets.view(first[block].shape), out=flat[block])
    return indices


def _empty_both(x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out, indices = aten.max_pool2d_with_indices.default(x, *options[1:])
    return out, _empty_codes(indices, x.shape[-2:], *options[1:-1])


@registered(f"(Tensor x, {_POOLING}, bool ceil_mode) -> (Tensor, Tensor)", _empty_both)
def max_pool2d_to_codes(
    x: Tensor,
    plane: Sequence[int],
    kernel: Sequence[int],
    step: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """Return max_pool2d of a contiguous x (..., H, W), and its indices as `pack_pool_indices` packs them.

    ATen's kernel, some planes at a time: the indices never exist whole. No plane of the result may have more than
    POOL_BLOCK elements.
    """
    pooling = tuple(map(tuple, (plane, kernel, step, padding, dilation)))
    if tuple(x.shape[-2:]) != tuple(plane):
        raise ValueError(f"an input {tuple(x.shape)} has no planes {tuple(plane)}")
    height, width = aten.max_pool2d_with_indices.default(
        torch.empty((1, *plane), device="meta"), kernel, step, padding, dilation, ceil_mode
    )[0].shape[-2:]
    out = x.new_empty((*x.shape[:-2], height, width))
    packed = x.new_empty(pool_code_bytes(out.shape, out.stride(), pooling), dtype=torch.uint8)
    first = _first(out, pooling).expand(out.shape)
    for block, place in _code_blocks(tuple(out.shape), _bits(pooling)):
        part = aten.max_pool2d_with_indices.default(x[block], kernel, step, padding, dilation, ceil_mode)
        out[block] = part[0]
        packed[place] = _codes(part[1].sub_(first[block]), pooling)
        del part
    return out, packed


def _empty_pooled(grad: Tensor, packed: Tensor, size: Sequence[int], *others: object) -> Tensor:
    return torch.empty(tuple(size), dtype=grad.dtype, device=grad.device)


@registered(f"(Tensor grad, Tensor packed, int[] size, {_POOLING}, bool ceil_mode) -> Tensor", _empty_pooled)
def max_pool2d_backward_from_codes(
    grad: Tensor,
    packed: Tensor,
    size: Sequence[int],
    plane: Sequence[int],
    kernel: Sequence[int],
    step: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """Return max_pool2d's gradient for a contiguous input of `size` (..., H, W): ATen's kernel, some planes at a time.

    `packed` is what `pack_pool_indices` made of contiguous indices of grad's shape, which no longer exist whole. No
    plane of grad may have more than POOL_BLOCK elements.
    """
    pooling = tuple(map(tuple, (plane, kernel, step, padding, dilation)))
    if tuple(grad.shape[:-2]) != tuple(size[:-2]) or tuple(size[-2:]) != tuple(plane):
        raise ValueError(f"a gradient {tuple(grad.shape)} is not of an input {tuple(size)} of planes {tuple(plane)}")
    out = _empty_pooled(grad, packed, size)
    last = math.prod(size[-2:]) - 1
    first = _first(grad, pooling).expand(grad.shape)
    for block, offsets in _offset_blocks(packed, tuple(grad.shape), pooling):
        offsets = offsets.view(first[block].shape).add_(first[block]).clamp_(0, last)  # the kernel trusts its indices
        part = out[block]
        aten.max_pool2d_with_indices_backward.grad_input(
            grad[block], part, kernel, step, padding, dilation, ceil_mode, offsets, grad_input=part
        )
    return out


def _offset_blocks(
    packed: Tensor, shape: tuple[int, ...], pooling: Pooling
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Yield blocks of `shape` (in memory's order), and how far each index lies behind its window's first, int64."""
    bits, rows = _bits(pooling), _offset_rows(pooling).to(packed.device)
    for (block, numel), (_, place) in zip(_blocks(shape), _code_blocks(shape, bits), strict=True):
        yield block, rows.index_select(0, packed[place].int()).view(-1)[:numel]


def _code_blocks(shape: tuple[int, ...], bits: int) -> Iterator[tuple[tuple[slice, ...], slice]]:
    """Yield blocks of `shape` and where the codes of each are."""
    start = 0
    for block, numel in _blocks(shape):
        stop = start + _packed(numel, bits)
        yield block, slice(start, stop)
        start = stop


def _bits(pooling: Pooling) -> int:
    bits = pool_code_bits(pooling)
    assert bits is not None
    return bits


def _offsets(pooling: Pooling) -> tuple[int, ...]:
    """Return how far each element of a window lies behind its first, in the flattened plane."""
    plane, kernel, _, _, dilation = pooling
    steps = [math.prod(plane[d + 1 :]) * dilation[d] for d in range(len(plane))]
    return tuple(sum(i * s for i, s in zip(at, steps, strict=True)) for at in itertools.product(*map(range, kernel)))


def _first(indices: Tensor, pooling: Pooling) -> Tensor:
    """Return where each window would begin in the flattened plane, padding included, to broadcast with `indices`."""
    plane, _, step, padding, _ = pooling
    dims = len(plane)
    first = torch.zeros((), dtype=torch.int64, device=indices.device)
    for d in range(dims):
        starts = torch.arange(indices.shape[d - dims], device=indices.device) * step[d] - padding[d]
        first = first.unsqueeze(-1) + starts * math.prod(plane[d + 1 :])
    return first.view((1,) * (indices.dim() - dims) + tuple(first.shape))


@cache
def _offset_rows(pooling: Pooling) -> Tensor:
    """Return the offsets that each packed byte stands for, int64 (256, 8 / bits)."""
    bits = _bits(pooling)
    offsets = torch.tensor(_offsets(pooling))
    codes = (torch.arange(256)[:, None] >> torch.arange(0, 8, bits)) & ((1 << bits) - 1)
    return offsets[codes.clamp(max=len(offsets) - 1)]


def _join(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes (n,) into uint8 (ceil(n * bits / 8),), the first in the lowest bits.

    One product of the bytes that belong together, read as a (little-endian) integer, lines them up in its top byte.
    """
    each = 8 // bits
    if each == 1:
        return codes
    if codes.numel() % each:
        codes = torch.nn.functional.pad(codes, (0, -codes.numel() % each))
    word = torch.int16 if each == 2 else torch.int32
    factor = sum(1 << (8 * (each - 1) - (8 - bits) * i) for i in range(each))
    return (codes.view(word) * factor).view(torch.uint8)[each - 1 :: each]


def _packed(numel: int, bits: int) -> int:
    return (numel * bits + 7) // 8


def _physical(size: Sequence[int], stride: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
    """Return the dimensions from slowest to fastest in memory, and their sizes."""
    order = sorted(range(len(size)), key=lambda d: (-stride[d], d))
    return order, tuple(size[d] for d in order)


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[tuple[slice, ...], int]]:
    """Cut a contiguous shape into contiguous blocks of at most POOL_BLOCK elements: (slices, elements)."""
    if not shape or math.prod(shape) <= POOL_BLOCK:
        yield (slice(None),), math.prod(shape)
        return
    inner = math.prod(shape[1:])
    if inner > POOL_BLOCK:
        for i in range(shape[0]):
            for rest, numel in _blocks(shape[1:]):
                yield (slice(i, i + 1), *rest), numel
        return
    step = POOL_BLOCK // inner
    for i in range(0, shape[0], step):
        yield (slice(i, i + step),), min(step, shape[0] - i) * inner
