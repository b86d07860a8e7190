"""Channel-wise mixed bits: groups of single channels in 2, 4 or 8 bits each, as wide as the channel's range asks for.

Channel c of n elements and range R_c, in b bits, errs by n R_c^2 / (6 (2^b - 1)^2). Bits are dealt out so that the
sum is least while their mean stays within a given one: more to where they save most a bit, channel after channel,
which is optimal on the convex hull (FedHybrid's channel-wise mix compression, as far as it is known; ActNN's
allocation). They follow from the data at each encode; the bytes do not. Groups are `group`'s.

Bytes: the bits of each channel, uint8, filled up to a multiple of 4; then, by width, by samples and by channels as many
as a piece holds, what `group.encode` makes of them. A channel's last group of such a piece is filled up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphplan.functions.bits import in_storage_order
from graphplan.functions.group import SIDE_BYTES, decodings, encode, mix, quantised_bytes
from graphplan.functions.group_kernels import GROUP, SPAN
from graphplan.functions.register import registered

WIDTHS = (2, 4, 8)
PIECE = 3 * SPAN  # elements gathered at a time: with what the kernel holds, less than a chunk in float32
Planes = tuple[int, int, int]  # (samples, channels, elements of a plane) in storage order


def mixed_bytes(planes: Planes, mean_bits: int) -> int:
    """Return the bytes of `quantise_channels`."""
    samples, channels, inner = planes
    groups = sum(-(-(stop - start) * inner // GROUP) for start, stop in _sample_blocks(samples, inner))
    return -(-channels // 4) * 4 + channels * groups * (GROUP * mean_bits // 8 + SIDE_BYTES)


def _packed_like(x: Tensor, planes: Sequence[int], mean_bits: int, key: int, slot: int) -> Tensor:
    samples, channels, inner = planes
    return torch.empty(mixed_bytes((samples, channels, inner), mean_bits), dtype=torch.uint8, device=x.device)


@registered("(Tensor x, int[] planes, int mean_bits, int key, int slot) -> Tensor", _packed_like)
def quantise_channels(x: Tensor, planes: Sequence[int], mean_bits: int, key: int, slot: int) -> Tensor:
    """Return dense x, which lies in memory as `planes` (samples, channels, elements), as uint8 (mixed_bytes,)."""
    packed = _packed_like(x, planes, mean_bits, key, slot).zero_()  # bits that are left over
    view = in_storage_order(x).view(*planes)
    ranges = (view.amax(dim=(0, 2)).double() - view.amin(dim=(0, 2)).double()).cpu().numpy()
    packed[: planes[1]] = torch.from_numpy(deal_bits(ranges, mean_bits)).to(x.device)
    for i, (part, width, samples, chosen) in enumerate(_runs(packed, planes)):
        values = view[samples].transpose(0, 1).index_select(0, chosen).view(len(chosen), -1)
        missing = -values.shape[1] % GROUP
        if missing:
            values = torch.cat((values, values[:, -1:].expand(-1, missing)), dim=1)
        flat = values.view(-1)
        encode(part, flat.numel(), width, mix(key, slot, i), partial(_slice, flat), x.dtype)
    return packed


def _unpacked_like(
    packed: Tensor, planes: Sequence[int], size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device=packed.device)


@registered("(Tensor packed, int[] planes, int[] size, int[] stride, ScalarType dtype) -> Tensor", _unpacked_like)
def dequantise_channels(
    packed: Tensor, planes: Sequence[int], size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Return what `quantise_channels` packed, of this size, stride and dtype."""
    x = _unpacked_like(packed, planes, size, stride, dtype)
    view = in_storage_order(x).view(*planes)
    for part, width, samples, chosen in _runs(packed, planes):
        count, numel = samples.stop - samples.start, (samples.stop - samples.start) * planes[2]
        values = x.new_empty(len(chosen), -(-numel // GROUP) * GROUP)
        flat = values.view(-1)
        for start, stop, decode in decodings(part, flat.numel(), width, dtype):
            decode(flat[start:stop])
        planes_of = values[:, :numel].view(len(chosen), count, planes[2])
        view[samples].index_copy_(1, chosen, planes_of.transpose(0, 1))
    return x


def deal_bits(ranges: NDArray[np.float64], mean_bits: int) -> NDArray[np.uint8]:
    """Return the bits of each channel, of WIDTHS, with a mean of at most mean_bits; what is not finite has least."""
    channels = len(ranges)
    energy = np.square(np.where(np.isfinite(ranges), ranges, 0.0))
    error = {w: 1.0 / ((1 << w) - 1) ** 2 for w in WIDTHS}
    steps = list(itertools.pairwise(WIDTHS))
    saved = np.concatenate([energy * (error[a] - error[b]) / (b - a) for a, b in steps])
    bits, left = np.full(channels, WIDTHS[0], dtype=np.uint8), (mean_bits - WIDTHS[0]) * channels
    for at in np.argsort(-saved, kind="stable"):
        before, after = steps[at // channels]
        if saved[at] <= 0 or left < WIDTHS[1] - WIDTHS[0]:
            break
        if bits[at % channels] == before and after - before <= left:
            bits[at % channels] = after
            left -= after - before
    return bits


def _slice(flat: Tensor, start: int, stop: int) -> Tensor:
    return flat[start:stop]


def _sample_blocks(samples: int, inner: int) -> Iterator[tuple[int, int]]:
    """Cut samples so that a channel's elements of a block fit a piece."""
    each = max(1, PIECE // inner)
    for start in range(0, samples, each):
        yield start, min(start + each, samples)


def _runs(packed: Tensor, planes: Sequence[int]) -> Iterator[tuple[Tensor, int, slice, Tensor]]:
    """Yield (memory of a code, its bits, samples, channels int64): pieces that are encoded together."""
    samples, channels, inner = planes
    bits, at = packed[:channels].long(), -(-channels // 4) * 4
    for width in WIDTHS:
        chosen = (bits == width).nonzero().view(-1)
        for start, stop in _sample_blocks(samples, inner):
            padded = -(-(stop - start) * inner // GROUP) * GROUP
            for run in torch.split(chosen, max(1, PIECE // padded)) if len(chosen) else ():
                nbytes = quantised_bytes(len(run) * padded, width)
                yield packed[at : at + nbytes], width, slice(start, stop), run
                at += nbytes
