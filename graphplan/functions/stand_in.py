"""Backward ops that read little of an activation: on which side of a decision each element lies, or its shape alone.

Such an op gives the same bits on any tensor of the same sides as on the activation itself. So the encoding is one bit
an element (`pack_sides`), and the op itself, the same ATen kernel, runs chunk by chunk on values that stand in for the
activation (`run_on_side`): no arithmetic is written twice. Where only the shape is read nothing is kept at all
(`run_on_shape`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphplan.functions import bits, native
from graphplan.functions.bits import (
    CHUNK,
    in_storage_order,
    memory_order,
    packed_bytes,
    pieces,
    spread_bits,
    write_bits,
)
from graphplan.functions.register import registered
from graphplan.functions.scale import scaled_from_bits

Values = tuple[float, float]
Like = tuple[torch.dtype, Sequence[int], Sequence[int]]  # dtype, size and stride of what is stood in for


@dataclass(frozen=True, slots=True)
class Side:
    """A decision with constants: `test(x, *consts)` of a chunk, and one value on each side (False, True).

    `rounded`: the op compares after rounding its constants to x's dtype; else in x's arithmetic (float32 for halves).
    `loop` is the test of floats among those of `native`, which has the constants of the side, or those `fixed` here.
    """

    test: Callable[..., Any]
    values: Callable[..., Values]
    loop: native.Test
    fixed: tuple[float, ...] = ()
    rounded: bool = False

    @property
    def consts(self) -> int:
        """How many constants it has."""
        return len(signature(self.test).parameters) - 1


def _between(low: float, high: float) -> float:
    """Return the middle of an interval: inside it in every dtype that holds any number inside it.

    An open end is cut where float16 ends, or at twice the other end.
    """
    top = high if high < math.inf else max(65504.0, 2 * abs(low) if low > -math.inf else 0)
    bottom = low if low > -math.inf else -max(65504.0, 2 * abs(high) if high < math.inf else 0)
    return (bottom + top) / 2


def _both(a: Any, b: Any) -> Any:
    a &= b
    return a


def _comparison(test: Callable[[Any, float], Any], at: float, loop: native.Test) -> Side:
    return Side(test, lambda c: (math.nan, at), loop, rounded=True)


SIDES: dict[str, Side] = {
    "true": Side(lambda x: x, lambda: (False, True), native.EQ),
    # NaN is above: the kernel asks x <= threshold.
    "above": Side(lambda x, threshold: ~(x <= threshold), lambda threshold: (-math.inf, math.nan), native.NOT_LE),
    "positive": Side(lambda x: x > 0, lambda: (-1.0, 1.0), native.GT, (0.0,)),
    "inside": Side(
        lambda x, low, high: _both(x > low, x < high), lambda low, high: (math.inf, _between(low, high)), native.INSIDE
    ),
    "hard": Side(lambda x: _both(x > -3, x < 3), lambda: (3.0, 0.0), native.INSIDE, (-3.0, 3.0)),
    "ge": _comparison(lambda x, c: x >= c, math.inf, native.GE),
    "gt": _comparison(lambda x, c: x > c, math.inf, native.GT),
    "le": _comparison(lambda x, c: x <= c, -math.inf, native.LE),
    "lt": _comparison(lambda x, c: x < c, -math.inf, native.LT),
    "eq": Side(lambda x, c: x == c, lambda c: (math.nan, c), native.EQ, rounded=True),
    "ne": Side(lambda x, c: x != c, lambda c: (c, math.nan), native.NE, rounded=True),
}


def _empty_bits(x: Tensor, sides: Sequence[str], consts: Sequence[float]) -> Tensor:
    return torch.empty(len(sides) * packed_bytes(x.numel()), dtype=torch.uint8, device=x.device)


@registered("(Tensor x, str[] sides, float[] consts) -> Tensor", _empty_bits)
def pack_sides(x: Tensor, sides: Sequence[str], consts: Sequence[float]) -> Tensor:
    """Return, for a dense x in storage order, whether each element passes SIDES[side], for each of `sides`.

    `consts` are the constants of the first side, then those of the next. One side after the other, the first element
    in the lowest bit: uint8 (len(sides) * ceil(numel / 8),).
    """
    packed = _empty_bits(x, sides, consts)
    if not len(packed):
        return packed
    each, tests = packed_bytes(x.numel()), _tests(x.dtype, tuple(sides), tuple(consts))
    if native.serves(x):
        elements, memory = native.line(x), native.array(packed)
        for i, (side, own) in enumerate(tests):
            _pack_by_loop(elements, side, own, memory[i * each : (i + 1) * each])
        return packed
    source, target = _as_arrays(in_storage_order(x), packed)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        for piece, chunk in pieces(x.numel(), _at_once(x, sides)):
            values = _comparable(source[chunk], x.dtype)
            for i, (side, own) in enumerate(tests):
                write_bits(target[i * each + piece.start : i * each + piece.stop], side.test(values, *own))
            del values  # before the next chunk's
    return packed


def _pack_by_loop(x: Any, side: Side, consts: Sequence[float], packed: Any) -> None:
    """Pack an array (n,), bools as bytes, into bytes (ceil(n / 8),)."""
    if x.dtype == np.uint8:
        native.run("pack_bools", x, packed)
        return
    a, b, *_ = (*map(native.number, side.fixed or consts), native.number(0.0), native.number(0.0))
    which, sign, flip = side.loop
    native.run("pack", x, which, native.number(sign), flip, a, b, packed)


def _at_once(x: Tensor, sides: Sequence[str]) -> int:
    """Return how many elements are packed at a time: fewer calls for bools, which need no memory beside their bits."""
    return 8 * CHUNK if bits.by_numpy(x) and set(sides) == {"true"} else CHUNK


def _as_arrays(*tensors: Tensor) -> tuple[Any, ...]:
    """Return the tensors as numpy arrays where numpy can work on them, which knows no bfloat16, else as they are."""
    if not bits.by_numpy(tensors[0]):
        return tensors
    return tuple((t.view(torch.int16) if t.dtype is torch.bfloat16 else t).numpy() for t in tensors)


def _comparable(chunk: Any, dtype: torch.dtype) -> Any:
    """Return a chunk, tensor or array, in the arithmetic that kernels compare in: float32 for halves."""
    if isinstance(chunk, Tensor):
        return chunk.float() if dtype in (torch.float16, torch.bfloat16) else chunk
    if dtype is torch.bfloat16:  # the upper half of a float32
        wide = chunk.astype(np.int32)
        wide <<= 16
        return wide.view(np.float32)
    return chunk.astype(np.float32) if dtype is torch.float16 else chunk


def run_on_side(
    op: torch._ops.OpOverload,
    args: tuple[Any, ...],
    at: int,
    packed: Tensor,
    part: int,
    values: Values,
    like: Like,
    result: Like,
    over: int | None = None,
) -> Tensor:
    """Return the elementwise op(*args), which is like `result`, for the x of `like` as argument `at`.

    `packed` is what `pack_sides` made of x, `part` the side that the op asks for, `values` one value on either side.
    With `over` the result is written over that argument. An argument whose strides are not x's costs a whole x.
    """
    x_dtype, size, stride = like
    each = packed_bytes(math.prod(size))
    own = packed if packed.numel() == each else packed[part * each : (part + 1) * each]
    out = None if over is None else args[over]
    geometries = [(a.shape, a.stride()) for a in args if isinstance(a, Tensor) and a.dim()]
    order = memory_order(size, stride)
    if any(memory_order(*g) != order for g in (*geometries, result[1:])):
        x = torch.empty_strided(tuple(size), tuple(stride), dtype=x_dtype, device=packed.device)
        flat, stand_in = in_storage_order(x), _StandIn(values, x_dtype, own)
        for piece, chunk in pieces(x.numel()):
            flat[chunk] = stand_in.chunk(piece, chunk.stop - chunk.start)
        whole: Tensor = _call(op, (*args[:at], x, *args[at + 1 :]), out)
        return whole
    if out is None:
        dtype, *geometry = result
        out = torch.empty_strided(*map(tuple, geometry), dtype=dtype, device=packed.device)
    if scaled_from_bits(op, args, at, own, out):
        return out
    stand_in = _StandIn(values, x_dtype, own)
    flats = [in_storage_order(a) if isinstance(a, Tensor) and a.dim() else a for a in args]
    flat = in_storage_order(out)
    for piece, chunk in pieces(out.numel()):
        given = [f[chunk] if isinstance(f, Tensor) and f.dim() else f for f in flats]
        given[at] = stand_in.chunk(piece, chunk.stop - chunk.start)
        _call(op, tuple(given), flat[chunk])
    return out


def run_on_shape(
    op: torch._ops.OpOverload, args: tuple[Any, ...], at: int, device: torch.device, like: Like, fill: bool
) -> Any:
    """Return op(*args) for an argument `at` of the shape, strides and dtype `like` whose values the op does not read.

    With `fill` the result is like it, too, and is written to the very memory that lends its shape; else that memory
    is beside the result while the op runs.
    """
    dtype, size, stride = like
    lent = torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device=device)
    return _call(op, (*args[:at], lent, *args[at + 1 :]), lent if fill else None)


@cache
def _tests(dtype: torch.dtype, sides: tuple[str, ...], consts: tuple[float, ...]) -> list[tuple[Side, list[float]]]:
    """Return each side and its constants, as the kernels round them."""
    left = list(consts)
    tests = []
    for side in (SIDES[name] for name in sides):
        own, left = left[: side.consts], left[side.consts :]
        tests.append((side, torch.tensor(own, dtype=dtype).tolist() if side.rounded else own))
    return tests


class _StandIn:
    """Values of the two sides, by the packed byte: eight of them are one row of a table."""

    def __init__(self, values: Values, dtype: torch.dtype, packed: Tensor) -> None:
        self.packed, self.dtype = packed, dtype
        self.pair = torch.tensor(values, dtype=dtype, device=packed.device)
        self.rows = _rows(_bits_of(values, dtype), dtype) if bits.by_numpy(packed) else None

    def chunk(self, piece: slice, numel: int) -> Tensor:
        if self.rows is None:
            return self.pair[spread_bits(self.packed[piece], numel).long()]
        rows = np.take(self.rows, self.packed[piece].numpy(), mode="clip")
        return torch.from_numpy(rows.view(np.uint8)).view(self.dtype)[:numel]


def _bits_of(values: Values, dtype: torch.dtype) -> bytes:
    """Return two values as bytes: a key that is equal for equal NaNs."""
    return torch.tensor(values, dtype=dtype).view(torch.uint8).numpy().tobytes()


@cache
def _rows(values: bytes, dtype: torch.dtype) -> np.ndarray[Any, np.dtype[np.void]]:
    pair = torch.frombuffer(bytearray(values), dtype=dtype)
    table = pair[spread_bits(torch.arange(256, dtype=torch.uint8), 2048).long()]
    return table.view(torch.uint8).numpy().view(f"V{8 * dtype.itemsize}")


def _call(op: torch._ops.OpOverload, args: tuple[Any, ...], out: Tensor | None) -> Any:
    if out is None:
        return op(*args)
    form = out_form(op)
    if form is None:
        return out.copy_(op(*args))
    return form(*args, **{form._schema.arguments[-1].name: out})


@cache
def out_form(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """Return the overload of `op` that writes its one result to memory given to it."""
    own = [(a.name, str(a.type)) for a in op._schema.arguments]
    for overload in (getattr(op.overloadpacket, n) for n in op.overloadpacket.overloads()):
        arguments = overload._schema.arguments
        if [(a.name, str(a.type)) for a in arguments[:-1]] == own and arguments[-1].is_out:
            return overload  # type: ignore[no-any-return]
    return None
