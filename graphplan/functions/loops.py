"""What codecs do to each element, as loops that Numba compiles: on a CPU they run at the speed of memory.

No C++ compiler is needed, and what is compiled once is kept on disk. Arrays are numpy's, in storage order; `native`
gives them tensors. A loop works on BLOCKs that stay in the first cache, PARTs of them on each thread. Inner loops are
over slices and in types of 32 bits at every step, written out: Numba widens integers else, and finds no vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np
from llvmlite import ir
from numba import prange
from numba.extending import intrinsic

from graphplan.functions.native import EQUAL, GREATER, NOT_LESS

Array = np.ndarray[Any, np.dtype[Any]]
Loop = Callable[..., Any]

# Types of 32 bits and others, as the compiler sees them.
I32: Any = np.int32
U8: Any = np.uint8
U16: Any = np.uint16
U32: Any = np.uint32
U64: Any = np.uint64
UP: Any = np.uintp
F32: Any = np.float32

BLOCK = 1 << 12
PART = 1 << 15
GROUP = 256
AHEAD, LINE = 6 * GROUP, 16  # elements: what is fetched into the cache before its turn, and one line of that
_LOW_BITS, _EACH_BIT = U64(0x0101010101010101), U64(0x8040201008040201)
_GATHER, _SEVEN = U64(0x0102040810204080), U64(0x7F7F7F7F7F7F7F7F)
_FIRST, _LAST = I32(-0x80000000), I32(0x7FFFFFFF)
_ONE, _MAGNITUDE, _INFINITY, _NAN = U32(1), U32(0x7FFFFFFF), U32(0x7F800000), U32(0x7FC00000)
_SMALLEST, _NOT_A_NUMBER = np.finfo(np.float32).tiny, F32(np.nan)


def _jit(function: Loop, **options: Any) -> Loop:
    kind = {"nogil": True, "error_model": "numpy", **options}
    try:
        return cast(Loop, numba.njit(cache=True, **kind)(function))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written to
        return cast(Loop, numba.njit(**kind)(function))


def inner(function: Loop) -> Loop:
    """Compile what loops call."""
    return _jit(function)


def inlined(function: Loop) -> Loop:
    """Compile what loops call, in its place."""
    return _jit(function, inline="always")


def threaded(function: Loop) -> Loop:
    """Compile a loop for several threads."""
    return _jit(function, parallel=True)


def _prefetch_type(_: Any, array: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        how = [ir.Constant(word, value) for value in (0, 3, 1)]  # to read, into the nearest cache, data
        builder.call(prefetch, [builder.bitcast(builder.gep(data, [args[1]]), byte), *how])
        return context.get_dummy_value()

    return numba.void(array, index), generate


# Asks for the memory of an array's element, which may be beyond its end. A processor sees a stream coming, but while it
# computes the codes of one group it does not ask for the next.
_prefetch: Loop = intrinsic(_prefetch_type)


def _widest_type(_: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # llvmlite's own `add` knows no attribute that is a text.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return numba.void(), generate


# In a loop's body, has it compiled for the widest vectors that there are: where these are of 512 bits, LLVM takes 256.
widest: Loop = intrinsic(_widest_type)


@inner
def _gather(words: Array, packed: Array) -> None:
    """Write eight bytes, each 0 or not, as the bits of one."""
    for j in range(len(packed)):
        word = words[j]
        ones = ((((word & _SEVEN) + _SEVEN) | word) >> U64(7)) & _LOW_BITS
        packed[j] = U8((ones * _GATHER) >> U64(56))


@inner
def _spread(packed: Array, words: Array) -> None:
    """Write each bit as a byte, 0 or not."""
    for j in range(len(packed)):
        words[j] = (U64(packed[j]) * _LOW_BITS) & _EACH_BIT


@inner
def _test(x: Array, test: int, sign: Any, flip: bool, a: Any, b: Any, passed: Array) -> None:
    """Write for each element of a block whether `sign` times it passes, or does not (`flip`)."""
    if test == GREATER:
        for i in range(len(x)):
            passed[i] = (sign * x[i] > sign * a) != flip
    elif test == NOT_LESS:
        for i in range(len(x)):
            passed[i] = (sign * x[i] >= sign * a) != flip
    elif test == EQUAL:
        for i in range(len(x)):
            passed[i] = (x[i] == a) != flip
    else:
        for i in range(len(x)):
            passed[i] = (x[i] > a) & (x[i] < b)


@threaded
def pack(x: Array, test: int, sign: Any, flip: bool, a: Any, b: Any, packed: Array) -> None:
    """Write whether each element passes a test with constants a and b: uint8 (ceil(n / 8),), lowest bit first."""
    for part in prange((len(x) + PART - 1) // PART):
        passed = np.zeros(BLOCK, np.uint8)
        words = passed.view(np.uint64)
        for start in range(part * PART, min(len(x), (part + 1) * PART), BLOCK):
            stop = min(len(x), start + BLOCK)
            if stop - start < BLOCK:
                passed[:] = 0
            _test(x[start:stop], test, sign, flip, a, b, passed[: stop - start])
            _gather(words, packed[start // 8 : (stop + 7) // 8])


@threaded
def pack_bools(mask: Array, packed: Array) -> None:
    """Write bytes, 0 or not, as bits: uint8 (ceil(n / 8),), lowest bit first."""
    for part in prange((len(mask) + PART - 1) // PART):
        start, stop = part * PART, min(len(mask), (part + 1) * PART)
        whole = (stop - start) // 8
        _gather(mask[start : start + 8 * whole].view(np.uint64), packed[start // 8 : start // 8 + whole])
        if start + 8 * whole < stop:
            last = np.zeros(8, np.uint8)
            last[: stop - start - 8 * whole] = mask[start + 8 * whole : stop]
            _gather(last.view(np.uint64), packed[stop // 8 : stop // 8 + 1])


@threaded
def unpack(packed: Array, mask: Array) -> None:
    """Write bits as bytes of 0 or 1, (n,)."""
    for part in prange((len(mask) + PART - 1) // PART):
        found = np.empty(BLOCK, np.uint8)
        words = found.view(np.uint64)
        for start in range(part * PART, min(len(mask), (part + 1) * PART), BLOCK):
            stop = min(len(mask), start + BLOCK)
            _spread(packed[start // 8 : (stop + 7) // 8], words)
            target = mask[start:stop]
            for i in range(len(target)):
                target[i] = found[i] != 0


@inner
def _choose(found: Array, on: Any, off: Any, same: bool, zero: bool, y: Array) -> None:
    """Multiply a block in place: by `on` where a byte is not 0 (`same`: leave it), else by `off` (`zero`: write 0)."""
    if same and zero:
        for i in range(len(y)):
            y[i] = y[i] if found[i] != 0 else F32(0)
    elif zero:
        for i in range(len(y)):
            y[i] = y[i] * on if found[i] != 0 else F32(0)
    elif same:
        for i in range(len(y)):
            y[i] = y[i] if found[i] != 0 else y[i] * off
    else:
        for i in range(len(y)):
            y[i] = y[i] * (on if found[i] != 0 else off)


@threaded
def scale(mask: Array, bits: bool, on: Any, off: Any, same: bool, zero: bool, x: Array, out: Array, over: bool) -> None:
    """Write x times what the mask says (`_choose`) to out, which is x if `over`. The mask is of `bits`, or of bytes."""
    for part in prange((len(x) + PART - 1) // PART):
        found = np.empty(BLOCK, np.uint8)
        words = found.view(np.uint64)
        for start in range(part * PART, min(len(x), (part + 1) * PART), BLOCK):
            stop = min(len(x), start + BLOCK)
            if bits:
                _spread(mask[start // 8 : (stop + 7) // 8], words)
            else:
                found[: stop - start] = mask[start:stop]
            if not over:
                out[start:stop] = x[start:stop]
            _choose(found, on, off, same, zero, out[start:stop])


@inner
def _ends(words: Array, base: Any) -> Any:
    """Return the bits of the least and the greatest number of a group, from its bits as integers.

    These are ordered as the numbers are where positive, the other way round where negative, and those come last when
    unsigned. A NaN is beyond every number: then one of the two is a NaN.
    """
    first, last, greatest = _LAST, _FIRST, U32(0)
    for i in range(GROUP):
        word = words[base + UP(i)]
        first, last, greatest = min(first, word), max(last, word), max(greatest, U32(word))
    return (I32(greatest) if first < 0 else first), (last if last >= 0 else first)


@inner
def _code(x: Array, i: Any, noise: Array, j: Any, bottom: Any, rate: Any) -> Any:
    return I32((x[i] - bottom) * rate + noise[j])


@inner
def _codes(
    x: Array, base: Any, noise: Array, row: Any, bottom: Any, rate: Any, bits: int, codes: Array, to: Any
) -> None:
    """Write the codes of the group from `base`, with the noise from `row`, from `to` on."""
    widest()
    if bits == 8:
        for n in range(GROUP):
            i = UP(n)
            codes[to + i] = U8(_code(x, base + i, noise, row + i, bottom, rate))
    elif bits == 4:
        for n in range(GROUP // 2):
            i, k = UP(n), UP(n + GROUP // 2)
            a = _code(x, base + i, noise, row + i, bottom, rate)
            b = _code(x, base + k, noise, row + k, bottom, rate)
            codes[to + i] = U8(I32(a + I32(b * I32(16))))
    else:
        for n in range(GROUP // 4):
            i, k, m, o = UP(n), UP(n + 64), UP(n + 128), UP(n + 192)
            a = _code(x, base + i, noise, row + i, bottom, rate)
            b = _code(x, base + k, noise, row + k, bottom, rate)
            c = _code(x, base + m, noise, row + m, bottom, rate)
            d = _code(x, base + o, noise, row + o, bottom, rate)
            low = I32(a + I32(b * I32(4)))
            codes[to + i] = U8(I32(low + I32(I32(c * I32(16)) + I32(d * I32(64)))))


@inlined
def encode_group(
    x: Array, words: Array, base: Any, noise: Array, row: Any, unit: Any, bits: int,
    codes: Array, to: Any, ends: Array, numbers: Array,
) -> Any:  # fmt: skip
    """Write the codes of the group from `base`; return its minimum and step. `numbers` are the bits of `ends`, (2,)."""
    ends[0], ends[1] = _ends(words, base)
    bottom = numbers[0]
    width = (numbers[1] - bottom) * unit
    rate = F32(1) / width if width > _SMALLEST else F32(0)  # no step, no rate
    _codes(x, base, noise, row, bottom, rate, bits, codes, to)
    if width - width != 0:  # one NaN
        return _NOT_A_NUMBER, _NOT_A_NUMBER
    return bottom + F32(0), (width if width > _SMALLEST else F32(0))  # one zero


@threaded
def encode(x: Array, noise: Array, unit: Any, bits: int, codes: Array, least: Array, step: Array) -> None:
    """Write the codes of the groups x (n,), and their minima and steps (groups,).

    The noise (whole groups,) is taken again and again.
    """
    each, words = PART // GROUP, x.view(np.int32)
    for part in prange((len(step) + each - 1) // each):
        widest()
        ends = np.empty(2, np.int32)
        numbers = ends.view(np.float32)
        for g in range(part * each, min(len(step), (part + 1) * each)):
            base, to = UP(g * GROUP), UP(g * 32 * bits)
            row = base % UP(len(noise))
            for i in range(GROUP // LINE):
                _prefetch(x, base + UP(AHEAD + i * LINE))
            least[g], step[g] = encode_group(x, words, base, noise, row, unit, bits, codes, to, ends, numbers)


@threaded
def decode(codes: Array, low: Array, step: Array, bits: int, out: Array) -> None:
    """Write the groups out (n,)."""
    each, wide, mask = PART // GROUP, 32 * bits, I32((1 << bits) - 1)
    for part in prange((len(low) + each - 1) // each):
        for g in range(part * each, min(len(low), (part + 1) * each)):
            bottom, width = low[g], step[g]
            for k in range(8 // bits):
                shift, start, to = I32(k * bits), UP(g * wide), UP(g * GROUP + k * wide)
                for i in range(wide):
                    number = I32(I32(I32(codes[start + UP(i)]) >> shift) & mask)
                    out[to + UP(i)] = F32(number) * width + bottom


@threaded
def decode_times(codes: Array, low: Array, step: Array, bits: int, x: Array, out: Array, over: bool) -> None:
    """Write x (n,) times the groups to out, which is x if `over`."""
    each, wide, mask = PART // GROUP, 32 * bits, I32((1 << bits) - 1)
    for part in prange((len(low) + each - 1) // each):
        for g in range(part * each, min(len(low), (part + 1) * each)):
            bottom, width = low[g], step[g]
            for k in range(8 // bits):
                shift, start, to = I32(k * bits), UP(g * wide), UP(g * GROUP + k * wide)
                if over:
                    for i in range(wide):
                        number = I32(I32(I32(codes[start + UP(i)]) >> shift) & mask)
                        out[to + UP(i)] = out[to + UP(i)] * (F32(number) * width + bottom)
                else:
                    for i in range(wide):
                        number = I32(I32(I32(codes[start + UP(i)]) >> shift) & mask)
                        out[to + UP(i)] = x[to + UP(i)] * (F32(number) * width + bottom)


@threaded
def round_half(x: Array, noise: Array, out: Array) -> None:
    """Write the bits x (n,) of float32 rounded by noise to bfloat16's, uint16; the noise (rows,) again and again."""
    for part in prange((len(x) + BLOCK - 1) // BLOCK):
        start, stop = part * BLOCK, min(len(x), (part + 1) * BLOCK)
        source, target, own = x[start:stop], out[start:stop], noise[start % len(noise) :][: stop - start]
        for i in range(len(source)):
            word = source[i]
            up = U32(word + U32(I32(own[i] * F32(65536))))
            nearest = U32(word + U32(U32(0x7FFF) + U32(U32(word >> U32(16)) & _ONE)))
            nearest = nearest if U32(word & _MAGNITUDE) <= _INFINITY else _NAN
            chosen = up if U32(up & _INFINITY) != _INFINITY else nearest  # beyond the largest number the nearest
            target[i] = U16(U32(chosen >> U32(16)))
