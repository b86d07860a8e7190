"""The kernels of lossy codes in plain torch: loops and compilers are held against them, and they run without either."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 256
SPAN = 1 << 15  # elements: whole groups, and a divisor of CHUNK
# What kernels work on as they are: all that they hold is less than a chunk in float32, and calls are few.
PIECE = 3 * SPAN
PIECE_IN_PLACE = 6 * SPAN  # holding no more than each element once, in float32
_SMALLEST = torch.finfo(torch.float32).tiny


def whole_groups(chunk: Tensor) -> Tensor:
    """Return a chunk as groups; a short last one repeats its last element."""
    missing = -chunk.numel() % GROUP
    if missing:
        chunk = torch.cat((chunk, chunk[-1:].expand(missing)))
    return chunk.view(-1, GROUP)


def encode(x: Tensor, noise: Tensor, codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Write the codes of the groups x (groups, GROUP), by noise in (0, 1); return their least and greatest elements.

    Written so that a compiler makes one loop over groups, each read from memory once: another result of a group than a
    reduction's, or noise by any other index, and its codes are a second loop behind that over all groups.
    """
    least, most = x.amin(dim=1), x.amax(dim=1)  # aminmax is ten times as slow
    bottom = least.float()
    rate = _rate(_width(bottom, most.float(), bits))
    own = noise[torch.arange(len(x), device=x.device) % len(noise)]
    at = (x - bottom[:, None]) * rate[:, None] + own
    code, *others = (at.floor() if bits < 8 else at).view(len(x), 8 // bits, -1).unbind(1)
    for i, part in enumerate(others, 1):
        code = code + part * float(1 << (bits * i))  # exact; shifts of integers take longer
    codes.copy_(code.int())
    return least, most


def encode_in_pieces(x: Tensor, noise: Tensor, codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Do what `encode` does, and hold no more than a piece needs."""
    least, most = x.amin(dim=1), x.amax(dim=1)
    bottom = least.float()
    rate = _rate(_width(bottom, most.float(), bits))
    each = (PIECE_IN_PLACE if x.dtype is torch.float32 else PIECE) // GROUP  # others are cast first
    for start in range(0, len(x), each):
        rows = slice(start, start + each)
        _write_codes(x[rows], noise, bottom[rows], rate[rows], codes[rows], bits)
    return least, most


def _width(least: Tensor, most: Tensor, bits: int) -> Tensor:
    return (most - least).mul_(unit_of(bits))


def unit_of(bits: int) -> float:
    """Return a step as a part of the distance between a group's ends."""
    return 1 / ((1 << bits) - 1)


def _rate(width: Tensor) -> Tensor:
    """Return steps as factors. A step below the least normal number is none; no step, no rate."""
    return torch.where(width > _SMALLEST, width.reciprocal(), 0.0)


def write_side(ends: tuple[Tensor, Tensor], bits: int, low: Tensor, step: Tensor) -> None:
    """Write the minima and steps to keep of groups with these ends, with one zero and one NaN: kernels choose others.

    By arithmetic alone: on CPU a comparison or a `where` takes five times as long. In a group with a NaN any code may
    stand: its step says what it is.
    """
    least, most = ends
    width = (
        most.float().sub_(least).mul_(unit_of(bits))
    )  # over the kernel's result: all that is held is less than a chunk
    broken = width - width  # 0 or NaN
    torch.add(broken, least, out=low).nan_to_num_(torch.nan)
    torch.add(broken, torch.nn.functional.threshold(width, _SMALLEST, 0.0, inplace=True), out=step).nan_to_num_(
        torch.nan
    )


def _write_codes(x: Tensor, noise: Tensor, least: Tensor, rate: Tensor, codes: Tensor, bits: int) -> None:
    """Write the codes of the groups x (groups, GROUP), every intermediate result over the last."""
    each = 8 // bits
    at = (x - least[:, None]).mul_(rate[:, None])  # the ends up to 1e-4: noise comes no nearer to 0 and 1
    at.view(-1, *noise.shape).add_(noise)
    parts = (at.floor_() if each > 1 else at).view(-1, each, GROUP // each)
    code = parts[:, 0]
    for i in range(1, each):
        torch.add(code, parts[:, i], alpha=1 << (bits * i), out=code)  # exact
    # On CPU straight from float32 to uint8 is five times as slow.
    codes.copy_(code.view(torch.int32).copy_(code))


def decode(codes: Tensor, low: Tensor, step: Tensor, out: Tensor, bits: int) -> None:
    """Write the groups out (groups, GROUP)."""
    mask, each = (1 << bits) - 1, 8 // bits
    if out.dtype is not torch.float32:
        parts = torch.stack([(codes >> (bits * i)) & mask for i in range(each)], dim=1)
        out.copy_(parts.view(-1, GROUP) * step[:, None] + low[:, None])
        return
    parts = out.view(-1, each, GROUP // each)
    for i in range(each):
        part = codes >> (bits * i) if i > 0 else codes
        parts[:, i] = part & mask if i < each - 1 else part
    out.mul_(step[:, None]).add_(low[:, None])


def decode_at_once(codes: Tensor, low: Tensor, step: Tensor, out: Tensor, bits: int) -> None:
    """Do what `decode` does, as one loop for a compiler: run as it stands it would hold every intermediate result."""
    each = 8 // bits
    shifts = torch.arange(each, dtype=torch.int32, device=codes.device).mul(bits)[None, :, None]
    code = (codes.int()[:, None] >> shifts) & ((1 << bits) - 1)
    # In the code's three dimensions: over two, a compiler finds no vectors.
    out.view(-1, each, GROUP // each).copy_(code.float() * step[:, None, None] + low[:, None, None])


def round_half(x: Tensor, noise: Tensor, out: Tensor) -> None:
    """Write x (n,) rounded up or down to bfloat16: noise is added below its last bit, and cut off."""
    x = x.float()
    below = (noise * (1 << 16)).int()
    words = (x.view(torch.int32).view(-1, *noise.shape) + below).bitwise_and_(~0xFFFF)
    rounded = words.view(torch.float32).view(x.shape)
    # Beyond the largest number the nearest; NaN and infinity as they are.
    out.copy_(torch.where(rounded - rounded == 0, rounded, x))
