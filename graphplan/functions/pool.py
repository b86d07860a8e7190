"""Max-pool indices as positions inside their windows: 2, 4 or 8 bits instead of 64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from graphplan.functions.bits import CHUNK
from graphplan.functions.register import registered

Pooling = tuple[tuple[int, ...], ...]  # input plane, kernel, stride, padding, dilation; a number for each dimension


def pool_code_bits(pooling: Pooling) -> int | None:
    """Return the bits that tell positions in a window apart; None where more than 8 are needed.

    Also None where two positions of a window may be the same index: a window wider than the padded plane's rows.
    """
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
    bits = _bits(pooling)
    offsets = _offsets(pooling)
    position = torch.zeros(max(offsets) + 1, dtype=torch.uint8)
    position[list(offsets)] = torch.arange(len(offsets), dtype=torch.uint8)
    position = position.to(indices.device)
    flat, first = indices.permute(order), _first(indices, pooling).permute(order).expand(shape)
    packed = _empty_codes(indices, *pooling)
    start = 0
    for block, numel in _blocks(shape):
        stop = start + _packed(numel, bits)
        offset = (flat[block] - first[block]).view(-1).clamp_(0, len(position) - 1)  # made-up indices are anywhere
        codes = position.index_select(0, offset)
        packed[start:stop] = _join(codes, bits)
        start = stop
    return packed


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
    bits = _bits(pooling)
    rows = _offset_rows(pooling).to(packed.device)
    flat, first = indices.permute(order), _first(indices, pooling).permute(order).expand(shape)
    start = 0
    for block, numel in _blocks(shape):
        stop = start + _packed(numel, bits)
        offsets = rows.index_select(0, packed[start:stop].int()).view(-1)[:numel]
        torch.add(first[block], offsets.view(first[block].shape), out=flat[block])
        start = stop
    return indices


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
    """Cut a contiguous shape into contiguous blocks of at most CHUNK elements: (slices, elements)."""
    if not shape or math.prod(shape) <= CHUNK:
        yield (slice(None),), math.prod(shape)
        return
    inner = math.prod(shape[1:])
    if inner > CHUNK:
        for i in range(shape[0]):
            for rest, numel in _blocks(shape[1:]):
                yield (slice(i, i + 1), *rest), numel
        return
    step = CHUNK // inner
    for i in range(0, shape[0], step):
        yield (slice(i, i + step),), min(step, shape[0] - i) * inner
