"""Lossy codes: groups of 256 elements in 8, 4 or 2 bits between their minimum and maximum, or bfloat16.

Rounding is stochastic: up with the probability that makes the decoded value right on average. The noise is a hash of
(key, slot, element), so that the same step gives the same code, and no random stream is touched. The quantiser is
ActNN's (Chen et al. 2021) but for exact ends: codes are clamped on both sides, a short last group repeats its last
element, a group with a NaN, an infinity or a range beyond float32 decodes to NaN.

Bytes: every group has 256 * bits / 8 of codes, then come all minima and all steps in float32. In a byte stand elements
j, j + 256 / k, j + 512 / k, ... of a group, k = 8 / bits, so that packing reads and writes whole vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphplan.functions.bits import CHUNK, in_storage_order
from graphplan.functions.register import registered

GROUP = 256
SIDE_BYTES = 8  # of a group: minimum and step
HALF = 16  # "bits" of bfloat16, which has no groups
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
    packed = torch.empty(quantised_bytes(x.numel(), bits), dtype=torch.uint8, device=x.device)
    flat, words = in_storage_order(x), packed.view(torch.bfloat16) if bits == HALF else packed
    for start in range(0, x.numel(), CHUNK):
        stop = min(start + CHUNK, x.numel())
        seed = torch.tensor(_word(mix(key, slot, start)), dtype=torch.int32, device=x.device)
        chunk = flat[start:stop].float()
        if bits == HALF:
            words[start:stop] = _round_half(chunk, seed)
            continue
        rows = slice(start // GROUP, -(-stop // GROUP))
        codes, low, step = _parts(packed, x.numel(), bits)
        codes[rows], low[rows], step[rows] = _encode(_whole_groups(chunk), seed, bits)
    return packed


def _unpacked_like(packed: Tensor, bits: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device=packed.device)


@registered("(Tensor packed, int bits, SymInt[] size, SymInt[] stride, ScalarType dtype) -> Tensor", _unpacked_like)
def dequantise(packed: Tensor, bits: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return what `quantise` packed, of this size, stride and dtype."""
    x = torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device=packed.device)
    flat, numel = in_storage_order(x), x.numel()
    if bits == HALF:
        return _copied(x, flat, packed.view(torch.bfloat16))
    codes, low, step = _parts(packed, numel, bits)
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        rows = slice(start // GROUP, -(-stop // GROUP))
        flat[start:stop] = _decode(codes[rows], low[rows], step[rows], bits).view(-1)[: stop - start]
    return x


def _copied(x: Tensor, flat: Tensor, values: Tensor) -> Tensor:
    flat.copy_(values)
    return x


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


def _encode(x: Tensor, seed: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, minima and steps of the groups x, float32 (groups, GROUP)."""
    levels, each = (1 << bits) - 1, 8 // bits
    low, high = x.aminmax(dim=1)
    step = (high - low) / levels
    finite = step.isfinite()
    step = torch.where(finite, torch.where(step < _SMALLEST, 0.0, step), torch.nan)
    rate = torch.where(step > 0, 1 / step, 0.0)
    at = (x - low[:, None]) * rate[:, None] + _uniform(x.shape, seed)
    # A NaN becomes some integer, which is clamped like the others: its group's step says what it is.
    codes = at.int().clamp(0, levels)  # at >= 0: truncation is floor
    if each > 1:
        parts = codes.view(-1, each, GROUP // each)
        codes = parts[:, 0]
        for i in range(1, each):
            codes = codes | (parts[:, i] << (bits * i))
    return codes.to(torch.uint8), low, step


def _decode(codes: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return the groups, float32 (groups, GROUP)."""
    if bits == 8:
        return codes * step[:, None] + low[:, None]
    mask = (1 << bits) - 1
    parts = torch.stack([(codes >> (bits * i)) & mask for i in range(8 // bits)], dim=1)
    return parts.view(-1, GROUP) * step[:, None] + low[:, None]


def _round_half(x: Tensor, seed: Tensor) -> Tensor:
    """Return float32 x rounded up or down to bfloat16: noise is added below its last bit, and cut off."""
    below = (_hash(x.shape, seed) >> 8) & 0xFFFF
    words = (x.view(torch.int32) + below) & ~0xFFFF
    rounded = words.view(torch.float32)
    # Beyond the largest number the nearest; NaN and infinity as they are.
    return torch.where(rounded.isfinite(), rounded, x).bfloat16()


def _uniform(shape: Sequence[int], seed: Tensor) -> Tensor:
    """Return multiples of 2^-24 in [0, 1), float32."""
    return ((_hash(shape, seed) >> 8) & 0xFFFFFF).float() * 2.0**-24


def _hash(shape: Sequence[int], seed: Tensor) -> Tensor:
    """Return 32 mixed bits of (seed, position), int32. Shifts are arithmetic: what they bring in is masked off."""
    numel = 1
    for n in shape:
        numel *= n
    h = torch.arange(numel, dtype=torch.int32, device=seed.device).view(*shape) * _word(0x9E3779B1) + seed
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * _word(0x2C1B3C6D)
    h = h ^ ((h >> 12) & 0xFFFFF)
    h = h * _word(0x297A2D39)
    return h ^ ((h >> 15) & 0x1FFFF)


def _word(n: int) -> int:
    """Return the lowest 32 bits as a signed number."""
    n &= 0xFFFFFFFF
    return n - (1 << 32) if n >> 31 else n
