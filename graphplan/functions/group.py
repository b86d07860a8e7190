"""Lossy codes: groups of 256 elements in 8, 4 or 2 bits between their minimum and maximum, or bfloat16.

Rounding is stochastic: up with the probability that makes the decoded value right on average. The noise is a hash of
(key, slot, element), so that the same step gives the same code, and no random stream is touched. The quantiser is
ActNN's (Chen et al. 2021) but for exact ends: codes are clamped on both sides, a short last group repeats its last
element, a group with a NaN, an infinity or a range beyond float32 decodes to NaN, one whose steps would be subnormal
to its minimum.

Bytes: every group has 256 * bits / 8 of codes, then come all minima and all steps in float32. In a byte stand elements
j, j + 256 / k, j + 512 / k, ... of a group, k = 8 / bits, so that packing reads and writes whole vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from graphplan.functions.bits import CHUNK, in_storage_order
from graphplan.functions.compiled import Kernel, Trial, compiled
from graphplan.functions.register import registered

GROUP = 256
SIDE_BYTES = 8  # of a group: minimum and step
HALF = 16  # "bits" of bfloat16, which has no groups
FAST_BLOCKS = (4 * CHUNK, CHUNK // 2)  # elements that compiled kernels work on, largest first: exactly so many
GOLDEN = 0x9E3779B1
FRACTION = 1 << 16
_SMALLEST = torch.finfo(torch.float32).tiny


def quantised_bytes(numel: int, bits: int) -> int:
    """Return the bytes of `quantise` for `numel` elements."""
    if bits == HALF:
        return 2 * numel
    return -(-numel // GROUP) * (GROUP * bits // 8 + SIDE_BYTES)


def mix(*parts: int) -> int:
    """Return a hash of integers, as int64 (splitmix64's finaliser over each part in turn)."""
    h = 0x9E3779B97F4A7C15
    for part in parts:
        h = (h + part * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 31
    return h - (1 << 64) if h >> 63 else h


def _packed_like(x: Tensor, bits: int, key: int, slot: int) -> Tensor:
    return torch.empty(quantised_bytes(x.numel(), bits), dtype=torch.uint8, device=x.device)


@registered("(Tensor x, int bits, int key, int slot) -> Tensor", _packed_like)
def quantise(x: Tensor, bits: int, key: int, slot: int) -> Tensor:
    """Return dense x in storage order as uint8 (quantised_bytes,). `key` differs by step, `slot` by tensor."""
    packed, seed = _packed_like(x, bits, key, slot), mix(key, slot)
    flat, numel = in_storage_order(x), x.numel()
    for start, stop, kernel in _stretches(numel, "encode", bits, x):
        # Position i of a stretch is element start + i: the hash multiplies both alike.
        at = torch.tensor(_word(seed + start * GOLDEN), dtype=torch.int32, device=x.device)
        if bits == HALF:
            kernel(flat[start:stop], at, packed.view(torch.bfloat16)[start:stop])
            continue
        rows = slice(start // GROUP, -(-stop // GROUP))
        codes, low, step = _parts(packed, numel, bits)
        low[rows], step[rows] = kernel(_whole_groups(flat[start:stop]), at, codes[rows])
    return packed


def _unpacked_like(packed: Tensor, bits: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device=packed.device)


@registered("(Tensor packed, int bits, SymInt[] size, SymInt[] stride, ScalarType dtype) -> Tensor", _unpacked_like)
def dequantise(packed: Tensor, bits: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return what `quantise` packed, of this size, stride and dtype."""
    x = _unpacked_like(packed, bits, size, stride, dtype)
    flat, numel = in_storage_order(x), x.numel()
    if bits == HALF:
        flat.copy_(packed.view(torch.bfloat16))
        return x
    for start, stop, kernel in _stretches(numel, "decode", bits, x):
        rows, whole = slice(start // GROUP, -(-stop // GROUP)), (stop - start) % GROUP == 0
        out = flat[start:stop] if whole else flat.new_empty((rows.stop - rows.start) * GROUP)
        kernel(*(part[rows] for part in _parts(packed, numel, bits)), out.view(-1, GROUP))
        if not whole:
            flat[start:stop] = out[: stop - start]
    return x


def _stretches(numel: int, half: str, bits: int, x: Tensor) -> Iterator[tuple[int, int, Kernel]]:
    """Cut a tensor into what one call of a kernel works on: chunks, or with a compiler blocks of its sizes first.

    A compiled kernel keeps less beside its results. For a tensor of one chunk, compiling one does not pay.
    """
    kernel, start = _kernel(half, bits), 0
    for block in FAST_BLOCKS if numel > CHUNK else ():
        fast = compiled(kernel, _trial(half, bits, x.dtype, block), x.device)
        while fast is not None and start + block <= numel:
            yield start, start + block, fast
            start += block
    for begin in range(start, numel, CHUNK):
        yield begin, min(begin + CHUNK, numel), kernel


@cache
def _kernel(half: str, bits: int) -> Kernel:
    if bits == HALF:
        return _round_half
    kernel: Kernel = _encode if half == "encode" else _decode
    return lambda *args: kernel(*args, bits)


@cache
def _trial(half: str, bits: int, dtype: torch.dtype, block: int) -> Trial:
    """Return arguments to compare compiled kernels on: ordinary groups, wide, constant and tiny ones, and a NaN."""
    groups = block // GROUP

    def arguments(device: torch.device) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(0)
        x = torch.randn(groups, GROUP, generator=random) * torch.logspace(-44, 37, groups)[:, None]
        x[3], x[4, 7], x[5, 9] = 1.5, math.nan, math.inf
        x = x.to(dtype).to(device)
        seed = torch.tensor(12345, dtype=torch.int32, device=device)
        if bits == HALF:
            return x.view(-1), seed, torch.empty(x.numel(), dtype=torch.bfloat16, device=device)
        parts = _parts(torch.zeros(quantised_bytes(x.numel(), bits), dtype=torch.uint8, device=device), x.numel(), bits)
        if half == "encode":
            return x, seed, parts[0]
        low, step = _encode(x, seed, parts[0], bits)
        return parts[0], low, step, torch.empty_like(x)

    return arguments


def warm_up(bits: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what `quantise` and `dequantise` of large tensors run, where a compiler stands."""
    for half in ("encode", "decode") if bits != HALF else ("encode",):
        for block in FAST_BLOCKS:
            compiled(_kernel(half, bits), _trial(half, bits, dtype, block), device)


def _parts(packed: Tensor, numel: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views: codes uint8 (groups, bytes of one), minima and steps float32 (groups,)."""
    groups, each = -(-numel // GROUP), GROUP * bits // 8
    side = packed[groups * each :].view(torch.float32)
    return packed[: groups * each].view(groups, each), side[:groups], side[groups:]


def _whole_groups(chunk: Tensor) -> Tensor:
    missing = -chunk.numel() % GROUP
    if missing:
        chunk = torch.cat((chunk, chunk[-1:].expand(missing)))
    return chunk.view(-1, GROUP)


def _encode(x: Tensor, seed: Tensor, codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Write the codes of the groups x (groups, GROUP); return their minima and steps."""
    levels, each = (1 << bits) - 1, 8 // bits
    x = x.float()
    least, most = x.aminmax(dim=1)
    width = (most - least) / levels
    finite = width.isfinite()
    least = torch.where(finite, least, torch.nan) + 0.0  # one zero, one NaN: compilers choose others
    width = torch.where(finite, torch.where(width < _SMALLEST, 0.0, width), torch.nan)
    rate = torch.where(width > 0, 1.0 / width, 0.0)
    # Fixed point: the fraction of a step, plus as many random bits, carries with the fraction's probability.
    at = ((x - least[:, None]) * rate[:, None] * FRACTION).int() + ((_hash(x.shape, seed) >> 16) & (FRACTION - 1))
    # In a group with a NaN anything may stand: its step says what it is.
    code = (at >> 16).clamp_max(levels)
    if each > 1:
        parts = code.view(-1, each, GROUP // each)
        code = parts[:, 0]
        for i in range(1, each):
            code = code | (parts[:, i] << (bits * i))
    codes.copy_(code)
    return least, width


def _decode(codes: Tensor, low: Tensor, step: Tensor, out: Tensor, bits: int) -> None:
    """Write the groups out (groups, GROUP)."""
    mask = (1 << bits) - 1
    parts = torch.stack([(codes >> (bits * i)) & mask for i in range(8 // bits)], dim=1)
    out.copy_(parts.view(-1, GROUP) * step[:, None] + low[:, None])


def _round_half(x: Tensor, seed: Tensor, out: Tensor) -> None:
    """Write x (n,) rounded up or down to bfloat16: noise is added below its last bit, and cut off."""
    x = x.float()
    words = (x.view(torch.int32) + ((_hash(x.shape, seed) >> 16) & 0xFFFF)) & ~0xFFFF
    rounded = words.view(torch.float32)
    # Beyond the largest number the nearest; NaN and infinity as they are.
    out.copy_(torch.where(rounded.isfinite(), rounded, x))


def _hash(shape: Sequence[int], seed: Tensor) -> Tensor:
    """Return 32 mixed bits of (seed, position), int32. Shifts are arithmetic: what they bring in is masked off."""
    h = torch.arange(math.prod(shape), dtype=torch.int32, device=seed.device).view(*shape) * _word(GOLDEN) + seed
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * _word(0x2C1B3C6D)
    h = h ^ ((h >> 12) & 0xFFFFF)
    h = h * _word(0x297A2D39)
    return h ^ ((h >> 15) & 0x1FFFF)


def _word(n: int) -> int:
    """Return the lowest 32 bits as a signed number."""
    n &= 0xFFFFFFFF
    return n - (1 << 32) if n >> 31 else n
