"""Derivatives of GELU and SiLU in vectors, and their codes, as loops that Numba compiles (see `loops`).

Numba calls libm for each exp and erf. Here 2^x is a polynomial and a shift, and erfc Abramowitz and Stegun's formula
7.1.26 (within 1.5e-7): a derivative is within 1e-6, where a step of its code is a hundredth at least.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from graphplan.functions.loops import F32, GROUP, I32, PART, UP, Array, encode_group, inner, threaded, widest

GELU, GELU_TANH, SILU = range(3)

_ZERO, _ONE, _HALF, _TWO, _FURTHEST = F32(0), F32(1), F32(0.5), F32(2), F32(87)
_LOG2E, _HALF_AND_256 = F32(1.4426950408889634), F32(256.5)
_P1, _P2, _P3 = F32(0.6931471805599453), F32(0.2402265069591007), F32(0.05550410866482158)
_P4, _P5, _P6 = F32(0.009618129107628477), F32(0.0013333558146428443), F32(0.00015403530393381606)
_ROOT_HALF, _DENSITY = F32(0.7071067811865476), F32(0.3989422804014327)
_A, _A1, _A2, _A3 = F32(0.3275911), F32(0.254829592), F32(-0.284496736), F32(1.421413741)
_A4, _A5 = F32(-1.453152027), F32(1.061405429)
_WIDE = F32(13)  # from here on a GELU is straight, as far as float32 can tell
_INNER, _CUBE, _CUBE3 = F32(0.7978845608028654), F32(0.044715), F32(0.134145)


@inner
def _exp(z: Array, fraction: Array, whole: Array, power: Array) -> None:
    """Write exp(z) over z (GROUP,), for z within 87 of 0; `power` are `whole`'s bits as float32."""
    widest()
    for i in range(GROUP):
        v = z[i] if z[i] < _FURTHEST else _FURTHEST
        v = (v if v > -_FURTHEST else -_FURTHEST) * _LOG2E
        n = I32(I32(v + _HALF_AND_256) - I32(256))  # the nearest integer
        whole[i] = I32(I32(n + I32(127)) << I32(23))
        fraction[i] = v - F32(n)
    for i in range(GROUP):
        f = fraction[i]
        z[i] = power[i] * (_ONE + f * (_P1 + f * (_P2 + f * (_P3 + f * (_P4 + f * (_P5 + f * _P6))))))


@inner
def slopes(x: Array, base: Any, kind: int, out: Array, fraction: Array, whole: Array, power: Array) -> None:
    """Write the derivative at the group of x from `base` to out (GROUP,)."""
    widest()
    for n in range(GROUP):
        v = x[base + UP(n)]
        if kind == GELU:
            out[n] = -_HALF * v * v
        elif kind == GELU_TANH:
            out[n] = _TWO * _INNER * (v + _CUBE * v * v * v)
        else:
            out[n] = -v
    _exp(out, fraction, whole, power)
    for n in range(GROUP):
        given, e = x[base + UP(n)], out[n]
        far = _WIDE if kind == GELU else _FURTHEST
        v = far if given > far else (-far if given < -far else given)  # NaN stays
        if kind == GELU:
            t = _ONE / (_ONE + _A * _ROOT_HALF * abs(v))
            tail = _HALF * e * t * (_A1 + t * (_A2 + t * (_A3 + t * (_A4 + t * _A5))))
            out[n] = (_ONE - tail if v > _ZERO else tail) + v * e * _DENSITY
        elif kind == GELU_TANH:
            t = _ONE - _TWO / (e + _ONE)
            out[n] = _HALF * (_ONE + t) + _HALF * v * (_ONE - t * t) * _INNER * (_ONE + _CUBE3 * v * v)
        else:
            s = _ONE / (_ONE + e)
            out[n] = s * (_ONE + v * (_ONE - s))
        out[n] += given - given  # nothing, or of an infinity NaN: as a group's other numbers that are not finite


@threaded
def encode_slopes(
    x: Array, kind: int, noise: Array, unit: Any, bits: int, codes: Array, least: Array, step: Array
) -> None:
    """Write the codes of the derivatives at the groups x (n,), as `loops.encode` does of numbers."""
    each = PART // GROUP
    for part in prange((len(step) + each - 1) // each):
        widest()
        own, fraction, whole = np.empty(GROUP, np.float32), np.empty(GROUP, np.float32), np.empty(GROUP, np.int32)
        words, power = own.view(np.int32), whole.view(np.float32)
        ends = np.empty(2, np.int32)
        numbers = ends.view(np.float32)
        for g in range(part * each, min(len(step), (part + 1) * each)):
            base = UP(g * GROUP)
            slopes(x, base, kind, own, fraction, whole, power)
            row, to = base % UP(len(noise)), UP(g * 32 * bits)
            least[g], step[g] = encode_group(own, words, UP(0), noise, row, unit, bits, codes, to, ends, numbers)
