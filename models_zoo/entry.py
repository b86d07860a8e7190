"""What a registry entry holds, and the batches and losses several families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Example:
    """One training batch: positional arguments of forward, and what the loss gets beside the output."""

    inputs: tuple[Tensor, ...]
    targets: Tensor | None  # None where the model returns its own loss


@dataclass(frozen=True, slots=True)
class Entry:
    """One model: how to build it, feed it and score it, at its real size and at a small one for tests."""

    name: str
    build: Callable[[], nn.Module]
    build_small: Callable[[], nn.Module]
    example: Callable[..., Example]  # example(batch: int | None = None, seed: int = 0)
    example_small: Callable[..., Example]  # example_small(batch: int | None = None, seed: int = 0)
    loss: Callable[..., Tensor]  # loss(outputs, targets) -> scalar
    source: str


def generator(seed: int) -> torch.Generator:
    """Return a CPU random generator of its own, so that batches leave the global one alone."""
    return torch.Generator().manual_seed(seed)


def image_batch(batch: int | None = None, seed: int = 0, *, default_batch: int, size: int, classes: int) -> Example:
    """Return images [batch, 3, size, size] with one class label each [batch]."""
    count = default_batch if batch is None else batch
    source = generator(seed)
    images = torch.randn(count, 3, size, size, generator=source)
    return Example((images,), torch.randint(classes, (count,), generator=source))


def cross_entropy_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of outputs [batch, classes, ...] against labels [batch, ...]."""
    return F.cross_entropy(outputs, targets)


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of logits [batch, time, vocab] at the tokens [batch, time] not -100."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100)


def own_loss(outputs: Tensor, targets: None = None) -> Tensor:
    """Return the scalar the model itself gave as its loss."""
    return outputs
