"""A deep multi-layer perceptron."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from models_zoo.entry import Example, generator


class MLP(nn.Module):
    """Equal linear layers with ReLU and a linear head, [N, width] to logits [N, classes]."""

    def __init__(self, *, layers: int = 20, width: int = 1024, num_classes: int = 10) -> None:
        """Make `layers` layers of `width` units and the head."""
        super().__init__()
        hidden: list[nn.Module] = []
        for _ in range(layers):
            linear = nn.Linear(width, width)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            hidden += [linear, nn.ReLU()]
        self.hidden = nn.Sequential(*hidden)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, width] to logits [N, classes]."""
        out: Tensor = self.head(self.hidden(x))
        return out


def vector_batch(
    batch: int | None = None, seed: int = 0, *, default_batch: int, width: int, classes: int = 10
) -> Example:
    """Return vectors [batch, width] with one class label each [batch]."""
    count = default_batch if batch is None else batch
    source = generator(seed)
    vectors = torch.randn(count, width, generator=source)
    return Example((vectors,), torch.randint(classes, (count,), generator=source))


def mlp(num_classes: int = 10) -> MLP:
    """Return a perceptron of twenty layers of 1024, [N, 1024] to logits [N, num_classes]."""
    return MLP(num_classes=num_classes)


def mlp_small() -> MLP:
    """Return a perceptron of eight layers of 64, [N, 64] to logits [N, 10]."""
    return MLP(layers=8, width=64)


mlp_example = partial(vector_batch, default_batch=512, width=1024)
mlp_example_small = partial(vector_batch, default_batch=256, width=64)
