"""Letting go of the gradients that autograd hands to a backward before that backward returns.

Autograd holds them as long as the backward runs. Where nobody but autograd does, their memory can move to a tensor of
ours: then it is freed at its last use. Who holds a tensor is seen by counting references. What the counts are when
nobody does is measured beside it each time (a tenth of a millisecond): after a compilation that failed, autograd holds
one more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Counts = tuple[int, int]  # references from Python, and from C++
_use_count: Callable[[Tensor], int] | None = getattr(Tensor, "_use_count", None)  # not in every torch


def can_release() -> bool:
    """Return whether this torch tells who holds a tensor."""
    return _use_count is not None and hasattr(torch._C, "_storage_Use_Count")


def unheld(gradients: tuple[Any, ...]) -> list[bool]:
    """Return, for each argument of an autograd.Function's backward, whether only autograd holds its memory.

    To be called from `backward(ctx, *gradients)` itself, with `gradients` as they came: other frames hold them, too.
    """
    if not can_release():
        return [False] * len(gradients)
    alone = _alone()
    # By index: a loop's variable would be one more reference.
    return [
        isinstance(gradients[i], Tensor) and _counts(gradients[i]) == alone[gradients[i]._base is not None]
        for i in range(len(gradients))
    ]


def take(gradient: Tensor) -> Tensor:
    """Return an alias of a gradient that is `unheld`, and leave the gradient itself without elements."""
    alias, base = gradient.detach(), gradient._base
    for t in (gradient, base) if base is not None else (gradient,):
        t.data = t.new_empty(0)
    return alias


def _counts(gradient: Tensor) -> tuple[Counts, Counts, int]:
    """Return who holds the gradient, the tensor that it views if it does, and its storage."""
    base = gradient._base
    assert _use_count is not None
    own = (sys.getrefcount(gradient), _use_count(gradient))
    of_base = (0, 0) if base is None else (sys.getrefcount(base), _use_count(base))
    return own, of_base, torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)


def _alone() -> list[tuple[Counts, Counts, int]]:
    """Return the counts of a gradient that only autograd holds, and of a view of one, here and now."""
    found: list[tuple[Counts, Counts, int]] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 1, x * 2

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            found.extend(_counts(gradients[i]) for i in range(len(gradients)))
            return torch.zeros(2, 2, device="cpu")

    with torch.enable_grad():
        plain, viewed = Probe.apply(torch.ones(2, 2, device="cpu", requires_grad=True))  # type: ignore[no-untyped-call]
        (plain.square().sum() + viewed.view(4).square().sum()).backward()
    return found
