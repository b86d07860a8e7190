"""The functions that rewritten graphs call beside ATen: codecs' halves and repeatable variants.

Memory is part of each contract: results are allocated by torch (so that the allocator's meter sees them) and
temporaries never exceed a few chunks of CHUNK elements, whatever the size of the tensor, unless a docstring says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphplan.functions.bits import CHUNK, is_dense, packed_bytes, unpack_bits
from graphplan.functions.derived import from_shape, from_sides
from graphplan.functions.dropout import dropout_backward, dropout_from_mask
from graphplan.functions.group import HALF, dequantise, mix, quantise, quantised_bytes, warm_up
from graphplan.functions.mixed import Planes, dequantise_channels, mixed_bytes, quantise_channels
from graphplan.functions.native import start_loops
from graphplan.functions.pool import (
    POOL_BLOCK,
    Pooling,
    max_pool2d_backward_from_codes,
    max_pool2d_to_codes,
    pack_pool_indices,
    pool_code_bits,
    pool_code_bytes,
    unpack_pool_indices,
)
from graphplan.functions.register import registered
from graphplan.functions.slope import SLOPES, from_slopes, quantise_slopes, slope_error
from graphplan.functions.stand_in import SIDES, Like, pack_sides

__all__ = [
    "CHUNK",
    "HALF",
    "POOL_BLOCK",
    "SIDES",
    "SLOPES",
    "Like",
    "Planes",
    "Pooling",
    "dequantise",
    "dequantise_channels",
    "dropout_backward",
    "dropout_from_mask",
    "from_shape",
    "from_sides",
    "from_slopes",
    "is_dense",
    "max_pool2d_backward_from_codes",
    "max_pool2d_to_codes",
    "mix",
    "mixed_bytes",
    "narrow_integers",
    "pack_pool_indices",
    "pack_sides",
    "packed_bytes",
    "pool_code_bits",
    "pool_code_bytes",
    "quantise",
    "quantise_channels",
    "quantise_slopes",
    "quantised_bytes",
    "slope_error",
    "start_loops",
    "unpack_bits",
    "unpack_pool_indices",
    "warm_up",
    "widen_integers",
]


def _as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@registered("(Tensor x, ScalarType dtype) -> Tensor", _as_dtype)
def narrow_integers(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return non-negative integers `x` in the narrower `dtype`; the caller has proven that they fit."""
    return x.to(dtype)


@registered("(Tensor x, ScalarType dtype) -> Tensor", _as_dtype)
def widen_integers(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in its original integer `dtype`."""
    return x.to(dtype)
