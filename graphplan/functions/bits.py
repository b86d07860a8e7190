"""One bit an element, in storage order, the first element in the lowest bit: packing and unpacking by chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphplan.functions import native
from graphplan.functions.register import registered

CHUNK = 1 << 18  # elements worked on at a time: a multiple of 8


def by_numpy(x: Tensor) -> bool:
    """Return whether numpy can work on the memory of `x`; else plain torch does the same."""
    return x.device.type == "cpu"


def packed_bytes(numel: int) -> int:
    """Return the bytes of `numel` packed bits."""
    return (numel + 7) // 8


def _empty_mask(packed: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    return torch.empty_strided(tuple(size), tuple(stride), dtype=torch.bool, device=packed.device)


@registered("(Tensor packed, int[] size, int[] stride) -> Tensor", _empty_mask)
def unpack_bits(packed: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return the bool tensor whose elements in storage order are the bits of `packed`, lowest first."""
    mask = _empty_mask(packed, size, stride)
    if native.serves(mask):
        native.run("unpack", packed, native.line(mask))
        return mask
    flat = in_storage_order(mask)
    if not by_numpy(packed):
        for piece, chunk in pieces(mask.numel()):
            flat[chunk] = spread_bits(packed[piece], chunk.stop - chunk.start)
        return mask
    source = packed.numpy()
    for piece, chunk in pieces(mask.numel(), 2 * CHUNK):  # a byte each, and those before are still there
        found = np.unpackbits(source[piece], count=chunk.stop - chunk.start, bitorder="little")
        flat[chunk] = torch.from_numpy(found.view(np.bool_))  # torch copies with all its threads
    return mask


def write_bits(packed: Any, bits: Any) -> None:
    """Pack a chunk of bool (n,) into `packed`, uint8 (ceil(n / 8),): both numpy arrays, or tensors."""
    if not isinstance(bits, Tensor):
        packed[...] = np.packbits(bits, bitorder="little")
        return
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    packed.copy_((padded << shifts).sum(dim=1))


def spread_bits(packed: Tensor, numel: int) -> Tensor:
    """Return a chunk of uint8 as bool (numel,), on any device."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).view(-1)[:numel].bool()


def is_dense(x: Tensor) -> bool:
    """Return whether the elements of `x` fill its storage: no gaps, no overlap, no offset."""
    return fills(x) and x.storage_offset() == 0 and x.untyped_storage().nbytes() == x.numel() * x.element_size()


def fills(x: Tensor) -> bool:
    """Return whether the elements of `x` lie in memory without gaps or overlap."""
    step = 1
    for stride, size in sorted((st, sz) for sz, st in zip(x.shape, x.stride(), strict=True) if sz != 1):
        if stride != step:
            return False
        step *= size
    return True


def in_storage_order(x: Tensor) -> Tensor:
    """Return the elements of a tensor without gaps or overlap as they lie in memory, (numel,)."""
    return x.view(-1) if x.is_contiguous() else torch.as_strided(x, (x.numel(),), (1,))


def memory_order(size: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return what says how elements lie in memory: each dimension of more than one, its size and its stride."""
    return [(d, n, step) for d, (n, step) in enumerate(zip(size, stride, strict=True)) if n != 1]


def pieces(numel: int, most: int = CHUNK) -> Iterator[tuple[slice, slice]]:
    """Yield (the bytes of a chunk's bits, its elements), at most `most`, a multiple of 8."""
    for start in range(0, numel, most):
        stop = min(start + most, numel)
        yield slice(start // 8, packed_bytes(stop)), slice(start, stop)
