"""One bit an element, in storage order, the first element in the lowest bit: packing and unpacking by chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from graphplan.functions.register import registered

CHUNK = 1 << 18  # elements worked on at a time: a multiple of 8
THREADS = 4  # at most: beyond them memory is the bottleneck
SHARE = 4  # chunks that are worth a thread


def packed_bytes(numel: int) -> int:
    """Return the bytes of `numel` packed bits."""
    return (numel + 7) // 8


def _empty_mask(packed: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    return torch.empty_strided(tuple(size), tuple(stride), dtype=torch.bool, device=packed.device)


@registered("(Tensor packed, int[] size, int[] stride) -> Tensor", _empty_mask)
def unpack_bits(packed: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return the bool tensor whose elements in storage order are the bits of `packed`, lowest first."""
    mask = _empty_mask(packed, size, stride)
    flat = in_storage_order(mask)
    if packed.device.type != "cpu":
        for piece, (start, stop) in pieces(mask.numel()):
            flat[start:stop] = spread_bits(packed[piece], stop - start)
        return mask
    source, target = packed.numpy(), flat.numpy()

    def unpack(piece: slice, start: int, stop: int) -> None:
        bits = np.unpackbits(source[piece], count=stop - start, bitorder="little")
        target[start:stop] = bits.view(np.bool_)

    on_threads(mask.numel(), unpack)
    return mask


def write_bits(packed: Tensor, bits: Tensor) -> None:
    """Pack a chunk of bool (n,) into `packed`, uint8 (ceil(n / 8),), on any device."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    packed.copy_((padded << shifts).sum(dim=1))


def spread_bits(packed: Tensor, numel: int) -> Tensor:
    """Return a chunk of uint8 as bool (numel,), on any device."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).view(-1)[:numel].bool()


def is_dense(x: Tensor) -> bool:
    """Return whether the elements of `x` fill its storage: no gaps, no overlap, no offset."""
    step = 1
    for stride, size in sorted((st, sz) for sz, st in zip(x.shape, x.stride(), strict=True) if sz != 1):
        if stride != step:
            return False
        step *= size
    return x.storage_offset() == 0 and x.untyped_storage().nbytes() == x.numel() * x.element_size()


def in_storage_order(x: Tensor) -> Tensor:
    """Return the elements of a tensor without gaps or overlap as they lie in memory, (numel,)."""
    return torch.as_strided(x, (x.numel(),), (1,))


def pieces(numel: int, chunk: int | None = None) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Yield (the bytes of a chunk's bits, (its first element, the one after its last))."""
    chunk = chunk or CHUNK
    for start in range(0, numel, chunk):
        stop = min(start + chunk, numel)
        yield slice(start // 8, packed_bytes(stop)), (start, stop)


def on_threads(numel: int, work: Callable[[slice, int, int], None]) -> None:
    """Call work(bytes, start, stop) for all pieces, on up to THREADS threads, which share one chunk.

    For numpy: it lets go of the interpreter while it works.
    """
    threads = min(torch.get_num_threads(), THREADS, numel // (SHARE * CHUNK))
    if threads <= 1:
        for piece, (start, stop) in pieces(numel):
            work(piece, start, stop)
        return
    with ThreadPoolExecutor(threads) as pool:
        parts = pieces(numel, CHUNK // threads // 8 * 8)
        for done in [pool.submit(work, piece, start, stop) for piece, (start, stop) in parts]:
            done.result()
