"""Codes of an elementwise function's derivative, which is all that its backward asks of its input.

Backward of y = f(x) is grad * f'(x). So f'(x) is rounded in place of x (few-bit, Novikov et al. 2023): the gradient is
linear in what is decoded, hence right on average, which it is not with a code of x, and f' of a GELU lies in
[-0.13, 1.13] however wide x is spread. Groups have ends of their own, as in `group`: between ends fixed beforehand,
which would cost no bytes, inputs near 0, as models have at first, would all lie in one step (DECISIONS 38).

f' itself is the ATen backward's, of a gradient of ones, chunk by chunk; that of GELU and SiLU a loop's (`slope_loops`)
where there is one. Decoding multiplies chunk by chunk and can write over the gradient. Bytes and what is not finite:
as in `group`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphplan.functions import native
from graphplan.functions.bits import in_storage_order, memory_order
from graphplan.functions.group import decode, decodings, encode, encode_by_loop, mix, parts_of, quantised_bytes
from graphplan.functions.group_kernels import GROUP, SPAN
from graphplan.functions.register import derived, registered

aten = torch.ops.aten
# Elements at a time with a compiled kernel: less than a chunk stands beside the code.
MOST = 3 * SPAN  # derivatives, and the gradient of ones that their kernel makes
MOST_DECODED = 7 * SPAN  # derivatives alone
LOOPS = {"gelu": 0, "gelu_tanh": 1, "silu": 2}  # `slope_loops` has these
# f'(x) as (a gradient of ones, x, constants) where x is what the backward reads
SLOPES: dict[str, Callable[..., Tensor]] = {
    "gelu": lambda one, x: aten.gelu_backward(one, x),
    "gelu_tanh": lambda one, x: aten.gelu_backward(one, x, approximate="tanh"),
    "silu": aten.silu_backward.default,
    "mish": aten.mish_backward.default,
    "hardswish": aten.hardswish_backward.default,
    "softplus": aten.softplus_backward.default,
    "elu": lambda one, x, *scales: aten.elu_backward(one, *scales, False, x),
    "tanh": aten.tanh_backward.default,
    "sigmoid": aten.sigmoid_backward.default,
}


def _slopes_like(x: Tensor, function: str, consts: Sequence[float], bits: int, key: int, slot: int) -> Tensor:
    return torch.empty(quantised_bytes(x.numel(), bits), dtype=torch.uint8, device=x.device)


@registered("(Tensor x, str function, float[] consts, int bits, int key, int slot) -> Tensor", _slopes_like)
def quantise_slopes(x: Tensor, function: str, consts: Sequence[float], bits: int, key: int, slot: int) -> Tensor:
    """Return SLOPES[function] at dense x, in storage order, as uint8 (quantised_bytes,).

    `key` differs by step, `slot` by tensor.
    """
    packed = _slopes_like(x, function, consts, bits, key, slot)
    if function in LOOPS and native.serves(x) and _agrees(function):
        encode_by_loop("encode_slopes", packed, x, bits, mix(key, slot), LOOPS[function])
        return packed
    flat = in_storage_order(x)

    def load(start: int, stop: int) -> Tensor:
        one = torch.ones((), device=x.device).expand(stop - start)
        return SLOPES[function](one, flat[start:stop].float(), *consts)

    encode(packed, x.numel(), bits, mix(key, slot), load, torch.float32, MOST)
    return packed


@cache
def _agrees(function: str) -> bool:
    """Return whether the loop's derivative is ATen's within 1e-5, wherever it bends."""
    x, found = torch.linspace(-12, 12, 16 * GROUP), torch.empty(16 * GROUP)
    fraction, whole = torch.empty(GROUP), torch.empty(GROUP, dtype=torch.int32)
    for base in range(0, len(x), GROUP):
        out = found[base : base + GROUP]
        native.run("slopes", x, np.uintp(base), LOOPS[function], out, fraction, whole, whole.view(torch.float32))
    worst = float((found - SLOPES[function](torch.ones_like(x), x)).abs().max())
    if not worst < 1e-5:
        warnings.warn(
            f"graphplan takes {function}'s derivative from ATen: a loop's is {worst:.2g} off",
            RuntimeWarning,
            stacklevel=2,
        )
    return worst < 1e-5


def slope_error(x: Tensor, function: str, consts: Sequence[float], bits: int) -> float:
    """Return the mean square of what the code of x's derivative changes in it."""
    flat = in_storage_order(x).float()
    slopes, decoded = SLOPES[function](torch.ones_like(flat), flat, *consts), torch.empty_like(flat)
    decode(quantise_slopes(x, function, consts, bits, 0, 0), decoded, bits)
    return float((decoded - slopes).square_().mean())


def from_slopes(op: torch._ops.OpOverload, at: int, over: int | None = None) -> torch._ops.OpOverload:
    """Return the backward `op` that reads the code of its function's derivative in place of its argument `at`.

    It takes what `quantise_slopes` packed, its bits, size and stride of the argument, the
    result's dtype and stride, then `op`'s own without `at`, first the gradient, which it may write `over`.
    """

    def run(
        packed: Tensor, bits: int, size: Sequence[int], stride: Sequence[int],
        dtype: torch.dtype, result_stride: Sequence[int], grad: Tensor, *consts: Any, **named: Any,
    ) -> Tensor:  # fmt: skip
        out = grad
        if over is None:
            out = torch.empty_strided(tuple(size), tuple(result_stride), dtype=dtype, device=grad.device)
        order = memory_order(size, stride)
        if all(memory_order(t.shape, t.stride()) == order for t in (grad, out)):
            _times(packed, bits, grad, out, over is not None)
            return out
        # The gradient lies in another order: all derivatives at once, beside the result.
        slopes = torch.empty_strided(tuple(size), tuple(stride), device=grad.device)
        decode(packed, slopes, bits)
        return torch.mul(grad, slopes, out=out) if out.dtype is slopes.dtype else out.copy_(grad * slopes)

    def fake(
        packed: Tensor, bits: int, size: Sequence[int], stride: Sequence[int],
        dtype: torch.dtype, result_stride: Sequence[int], grad: Tensor, *consts: Any, **named: Any,
    ) -> Tensor:  # fmt: skip
        if over is not None:
            return grad
        return torch.empty_strided(tuple(size), tuple(result_stride), dtype=dtype, device=grad.device)

    like = "int[] like_size, int[] like_stride, ScalarType result_dtype, int[] result_stride"
    return derived(op, at, "from_slopes", f"Tensor packed, int bits, {like}", run, fake, over)


def _times(packed: Tensor, bits: int, grad: Tensor, out: Tensor, over: bool) -> None:
    """Write grad times the derivatives packed to out, which is grad if `over`: both in the order of the packed."""
    if native.serves(grad, out) and _multiplies(bits):
        _times_by_loop(packed, bits, grad, out, over)
        return
    grad, out = in_storage_order(grad), in_storage_order(out)
    if not over and out.dtype is torch.float32:
        decode(packed, out, bits)
        out.mul_(grad)
        return
    for start, stop, write in decodings(packed, grad.numel(), bits, torch.float32, MOST_DECODED):
        slopes = torch.empty(-(-(stop - start) // GROUP) * GROUP, device=packed.device)
        write(slopes)
        slopes = slopes[: stop - start]
        if out.dtype is slopes.dtype:
            torch.mul(grad[start:stop], slopes, out=out[start:stop])
        else:
            out[start:stop] = slopes.mul_(grad[start:stop])


def _times_by_loop(packed: Tensor, bits: int, grad: Tensor, out: Tensor, over: bool) -> None:
    """Multiply whole groups by a loop, and by those of the last one that are there."""
    given, made = native.line(grad), native.line(out)
    for part, start, stop in parts_of(packed, len(given), bits):
        if stop % GROUP == 0:
            native.run("decode_times", *part, bits, given[start:stop], made[start:stop], over)
            continue
        last = np.empty(GROUP, np.float32)
        native.run("decode", *part, bits, last)
        np.multiply(given[start:], last[: stop - start], out=made[start:])


@cache
def _multiplies(bits: int) -> bool:
    """Return whether the loop's products are, to the bit, those of what is decoded."""
    x, grad = torch.linspace(-4, 4, 16 * GROUP + 1), torch.linspace(3, -5, 16 * GROUP + 1)
    packed, decoded = quantise_slopes(x, "gelu", (), bits, 0, 0), torch.empty_like(x)
    decode(packed, decoded, bits)
    for over in (False, True):
        out = grad.clone()
        _times_by_loop(packed, bits, out if over else grad, out, over)
        if not torch.equal(out, grad * decoded):
            warnings.warn(
                "graphplan multiplies derivatives by torch: a loop's products differ", RuntimeWarning, stacklevel=2
            )
            return False
    return True
