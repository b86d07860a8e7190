"""Lossy codes: groups of 256 elements in 8, 4 or 2 bits between their minimum and maximum, or bfloat16.

Rounding is stochastic: up with the probability that makes the decoded value right on average. The noise is a hash's:
a table of it, read from a place that a hash of (key, slot) says, again every SPAN elements. So the same step gives the
same code, no random stream is touched, and no element costs a hash. The quantiser is
ActNN's (Chen et al. 2021) but for exact ends: codes are clamped on both sides, a short last group repeats its last
element, a group with a NaN, an infinity or a range beyond float32 decodes to NaN, one whose steps would be subnormal
to its minimum.

Bytes: every group has 256 * bits / 8 of codes, then come all minima and all steps in float32. In a byte stand elements
j, j + 256 / k, j + 512 / k, ... of a group, k = 8 / bits, so that packing reads and writes whole vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphplan.functions import group_kernels as kernels
from graphplan.functions import native
from graphplan.functions.bits import CHUNK, in_storage_order
from graphplan.functions.compiled import Kernel, Trial, compiled
from graphplan.functions.group_kernels import GROUP, PIECE, SPAN
from graphplan.functions.register import registered

SIDE_BYTES = 8  # of a group: minimum and step
HALF = 16  # "bits" of bfloat16, which has no groups
PIECE_OF_BYTES = 28 * SPAN  # half of an element in bytes twice
AHEAD = 8 * CHUNK  # whose groups' ends are found at once
MOST = 64 * CHUNK  # elements that a compiled encode works on: what is held of each group is less than a chunk
MOST_NARROW = 2 * CHUNK  # of a compiled decode to less than float32, which holds what it decodes


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
    packed = _packed_like(x, bits, key, slot)
    if native.serves(x) and _agrees("encode", bits):
        encode_by_loop("encode", packed, x, bits, mix(key, slot))
    else:
        flat = in_storage_order(x)
        encode(packed, x.numel(), bits, mix(key, slot), lambda start, stop: flat[start:stop], x.dtype)
    return packed


def encode_by_loop(name: str, packed: Tensor, x: Tensor, bits: int, seed: int, *given: Any) -> None:
    """Write the code of dense x, or of what the loop makes of it and of `given`, as `encode` does."""
    elements, table, place = native.line(x), _noise(), seed % SPAN
    for part, start, stop in parts_of(packed, len(elements), bits):
        missing = -stop % GROUP
        own = np.pad(elements[start:], (0, missing), mode="edge") if missing else elements[start:stop]
        begin = place + start % SPAN
        native.run(name, own, *given, table[begin : begin + min(SPAN, len(own))], _unit(bits), bits, *part)


def decode_by_loop(packed: Tensor, x: Tensor, bits: int) -> None:
    """Write the code of groups to dense x, float32."""
    elements = native.line(x)
    for part, start, stop in parts_of(packed, len(elements), bits):
        out = np.empty(GROUP, np.float32) if stop % GROUP else elements[start:stop]
        native.run("decode", *part, bits, out)
        if stop % GROUP:
            elements[start:] = out[: stop - start]


def parts_of(packed: Tensor, numel: int, bits: int) -> Iterator[tuple[tuple[Any, ...], int, int]]:
    """Yield arrays (codes, minima, steps), first element and end: of all whole groups, then of a short last one."""
    memory, groups, each = native.array(packed), -(-numel // GROUP), GROUP * bits // 8
    side, whole = memory[groups * each :].view(np.float32), numel // GROUP * GROUP
    for start, stop in ((0, whole), (whole, numel)):
        if start < stop:
            first, last = start // GROUP, -(-stop // GROUP)
            codes = memory[first * each : last * each]
            yield (codes, side[first:last], side[groups + first : groups + last]), start, stop


@cache
def _agrees(half: str, bits: int) -> bool:
    """Return whether a loop of groups stands, and does what the kernel does."""
    cpu = torch.device("cpu")
    return (
        bits != HALF
        and _loop(half, bits, torch.float32, cpu) is not None
        and _fast(half, 0, bits, torch.float32, cpu) is not None
    )


@cache
def _noise() -> Any:
    return native.array(noise_table(torch.device("cpu")))


@cache
def _unit(bits: int) -> Any:
    return native.number(kernels.unit_of(bits))


def encode(
    packed: Tensor,
    numel: int,
    bits: int,
    seed: int,
    load: Callable[[int, int], Tensor],
    dtype: torch.dtype,
    most: int | None = None,
) -> None:
    """Write the code of `numel` elements to packed (quantised_bytes,).

    `load(start, stop)` returns elements in `dtype`: as many as the kernel likes, or, where they are made and held
    beside it, at most `most` with a compiled kernel, which holds nothing else. `seed` says where the noise begins.
    """
    place, table = seed % SPAN, noise_table(packed.device)
    codes, low, step = (
        code_parts(packed, numel, bits) if bits != HALF else (packed.view(torch.bfloat16), packed, packed)
    )
    for start, stop, kernel in _stretches(
        "encode", numel, bits, dtype, packed.device, most or MOST, PIECE if most or bits == HALF else AHEAD
    ):
        begin = place + start % SPAN
        noise = table[begin : begin + min(SPAN, -(-(stop - start) // GROUP) * GROUP)]
        if bits == HALF:
            kernel(load(start, stop), noise[: stop - start], codes[start:stop])
            continue
        rows = slice(start // GROUP, -(-stop // GROUP))
        kernel(kernels.whole_groups(load(start, stop)), noise.view(-1, GROUP), codes[rows], low[rows], step[rows])


def _unpacked_like(packed: Tensor, bits: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device=packed.device)


@registered("(Tensor packed, int bits, SymInt[] size, SymInt[] stride, ScalarType dtype) -> Tensor", _unpacked_like)
def dequantise(packed: Tensor, bits: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return what `quantise` packed, of this size, stride and dtype."""
    x = _unpacked_like(packed, bits, size, stride, dtype)
    if bits == HALF:
        in_storage_order(x).copy_(packed.view(torch.bfloat16))
    else:
        decode(packed, x, bits)
    return x


def decode(packed: Tensor, x: Tensor, bits: int) -> None:
    """Write the code of groups to dense x."""
    if x.dtype is torch.float32 and native.serves(x) and _agrees("decode", bits):
        decode_by_loop(packed, x, bits)
        return
    flat = in_storage_order(x)
    for start, stop, write in decodings(packed, flat.numel(), bits, flat.dtype):
        whole = (stop - start) % GROUP == 0
        out = flat[start:stop] if whole else flat.new_empty(-(-(stop - start) // GROUP) * GROUP)
        write(out)
        if not whole:
            flat[start:stop] = out[: stop - start]


def decodings(
    packed: Tensor, numel: int, bits: int, dtype: torch.dtype, most: int | None = None
) -> Iterator[tuple[int, int, Callable[[Tensor], object]]]:
    """Yield (start, stop, what writes these elements and those that fill up their last group to memory of `dtype`).

    `most`: so many elements at a time, of whole groups, where the caller holds what is written. Else a compiled kernel,
    which to float32 holds nothing beside, writes all whole groups in one call.
    """
    parts, wide = code_parts(packed, numel, bits), dtype is torch.float32
    ahead = PIECE_OF_BYTES if most is None and wide else PIECE
    most = most or (max(numel, GROUP) if wide else MOST_NARROW)
    for start, stop, kernel in _stretches("decode", numel, bits, dtype, packed.device, most, ahead):
        own = [part[start // GROUP : -(-stop // GROUP)] for part in parts]
        yield start, stop, partial(_decode_to, kernel, own)


def _decode_to(kernel: Kernel, parts: Sequence[Tensor], out: Tensor) -> None:
    kernel(*parts, out.view(-1, GROUP))


def _stretches(
    half: str, numel: int, bits: int, dtype: torch.dtype, device: torch.device, most: int, ahead: int
) -> Iterator[tuple[int, int, Kernel]]:
    """Cut a tensor into what one call works on: at most `most` elements with a compiled kernel, else `ahead`."""
    plain, fast = _whole(half, bits, _plain(half, bits)), _fast(half, numel, bits, dtype, device)
    unit = SPAN if half == "encode" else GROUP  # a kernel's noise is a whole span, or less than one
    whole = numel // unit * unit
    if fast is not None and _loop(half, bits, dtype, device):
        end, rest = whole, fast
    else:  # a first dimension of one would be compiled anew
        end, rest = 0 if fast is None else whole - (unit if whole % most == unit else 0), plain
    for first, last, size, kernel in ((0, end, most, fast), (end, whole, ahead, rest), (whole, numel, ahead, rest)):
        for start in range(first, last, size):
            yield start, min(start + size, last), kernel or plain


def _fast(half: str, numel: int, bits: int, dtype: torch.dtype, device: torch.device) -> Kernel | None:
    """Return the kernel as a loop or compiled, for any number of spans or groups.

    To compile does not pay for a tensor of one chunk.
    """
    loop = _loop(half, bits, dtype, device)
    if (loop is None and numel <= CHUNK) or (half == "decode" and bits == HALF):
        return None
    if loop is not None:
        plain = _whole(half, bits, _plain(half, bits))
        return compiled(plain, _trial(half, bits, dtype, True), device, plain, loop)
    # To less than float32 NaNs would be other ones.
    kernel = _at_once(bits) if half == "decode" and dtype is torch.float32 else _kernel(half, bits)
    made = compiled(kernel, _trial(half, bits, dtype, False), device, _plain(half, bits))
    return made and _whole(half, bits, made)


@cache
def _loop(half: str, bits: int, dtype: torch.dtype, device: torch.device) -> Kernel | None:
    """Return the kernel as a loop of Numba's, where one stands."""
    if native.loops() is None or device.type != "cpu" or dtype is not torch.float32:
        return None
    if half == "decode":
        return lambda codes, low, step, out: native.run("decode", codes.view(-1), low, step, bits, out.view(-1))
    if bits == HALF:
        return lambda x, noise, out: native.run("round_half", x.view(torch.uint32), noise, out)

    def encode(x: Tensor, noise: Tensor, codes: Tensor, low: Tensor, step: Tensor) -> None:
        native.run("encode", x.view(-1), noise.reshape(-1), _unit(bits), bits, codes.view(-1), low, step)

    return encode


@cache
def _whole(half: str, bits: int, kernel: Kernel) -> Kernel:
    """Return the kernel that writes all parts of a code: one that encodes groups returns their ends."""
    if half == "decode" or bits == HALF:
        return kernel

    def encode(x: Tensor, noise: Tensor, codes: Tensor, low: Tensor, step: Tensor) -> None:
        kernels.write_side(kernel(x, noise, codes), bits, low, step)

    return encode


@cache
def _kernel(half: str, bits: int) -> Kernel:
    if bits == HALF:
        return kernels.round_half
    kernel: Kernel = kernels.encode if half == "encode" else kernels.decode
    return lambda *args: kernel(*args, bits)


@cache
def _at_once(bits: int) -> Kernel:
    kernel: Kernel = kernels.decode_at_once
    return lambda *args: kernel(*args, bits)


@cache
def _in_pieces(bits: int) -> Kernel:
    kernel: Kernel = kernels.encode_in_pieces
    return lambda *args: kernel(*args, bits)


def _plain(half: str, bits: int) -> Kernel:
    """Return the kernel as it runs without a compiler, with the same results."""
    return _kernel(half, bits) if half == "decode" or bits == HALF else _in_pieces(bits)


@cache
def _trial(half: str, bits: int, dtype: torch.dtype, whole: bool) -> Trial:
    """Return arguments to compare kernels on: ordinary groups, wide, constant and tiny ones, and a NaN.

    `whole`: to encode, with the minima and steps to write, too.
    """
    groups = 3 * SPAN // GROUP

    def arguments(device: torch.device) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(0)
        x = torch.randn(groups, GROUP, generator=random) * torch.logspace(-44, 37, groups)[:, None]
        x[3], x[4, 7], x[5, 9] = 1.5, math.nan, math.inf
        x = x.to(dtype).to(device)
        noise = noise_table(device)[12345 : 12345 + min(SPAN, x.numel())]
        if bits == HALF:
            return x.view(-1), noise, torch.empty(x.numel(), dtype=torch.bfloat16, device=device)
        parts = code_parts(
            torch.zeros(quantised_bytes(x.numel(), bits), dtype=torch.uint8, device=device), x.numel(), bits
        )
        if half == "encode":
            return x, noise.view(-1, GROUP), *(parts if whole else parts[:1])
        kernels.write_side(kernels.encode(x, noise.view(-1, GROUP), parts[0], bits), bits, parts[1], parts[2])
        return *parts, torch.empty_like(x)

    return arguments


def warm_up(numel: int, bits: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what `quantise` and `dequantise` of up to `numel` elements run, where a compiler stands."""
    for half in ("encode", "decode"):
        _fast(half, numel, bits, dtype, device)


def code_parts(packed: Tensor, numel: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views: codes uint8 (groups, bytes of one), minima and steps float32 (groups,)."""
    groups, each = -(-numel // GROUP), GROUP * bits // 8
    side = packed[groups * each :].view(torch.float32)
    return packed[: groups * each].view(groups, each), side[:groups], side[groups:]


@cache
def noise_table(device: torch.device) -> Tensor:
    """Return noise in (0, 1), the middles of 2^12 steps, float32 (2 * SPAN,): of 32 mixed bits of each position."""
    h = np.arange(2 * SPAN, dtype=np.uint32) * np.uint32(0x9E3779B1)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    return torch.from_numpy(((h >> np.uint32(20)).astype(np.float32) + 0.5) / (1 << 12)).to(device)
