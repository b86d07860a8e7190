"""The convolutional network of the federated averaging paper, without any normalisation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from models_zoo.entry import Example, generator


class CNN(nn.Module):
    """Stages of convolution, ReLU and max pooling, then a hidden layer: [N, 1, S, S] to logits [N, classes]."""

    def __init__(
        self,
        *,
        widths: tuple[int, ...] = (32, 64),
        convolutions: int = 1,
        kernel: int = 5,
        side: int = 28,
        hidden: int = 512,
        num_classes: int = 10,
    ) -> None:
        """Make a stage of `convolutions` layers for each width; each stage halves the sides of the image."""
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width in widths:
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, kernel, padding="same"), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
            side //= 2
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(channels * side * side, hidden)
        self.head = nn.Linear(hidden, num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 1, S, S] to logits [N, classes]."""
        out: Tensor = self.head(torch.relu(self.hidden(torch.flatten(self.features(x), 1))))
        return out


def grey_batch(batch: int | None = None, seed: int = 0, *, default_batch: int, side: int, classes: int = 10) -> Example:
    """Return images [batch, 1, side, side] with one class label each [batch]."""
    count = default_batch if batch is None else batch
    source = generator(seed)
    images = torch.randn(count, 1, side, side, generator=source)
    return Example((images,), torch.randint(classes, (count,), generator=source))


def cnn(num_classes: int = 10) -> CNN:
    """Return the paper's network, images [N, 1, 28, 28] to logits [N, num_classes]."""
    return CNN(num_classes=num_classes)


def cnn_small() -> CNN:
    """Return eight narrow 3x3 convolutions in one stage, images [N, 1, 16, 16] to logits [N, 10]."""
    return CNN(widths=(8,), convolutions=8, kernel=3, side=16, hidden=32)


cnn_example = partial(grey_batch, default_batch=128, side=28)
cnn_example_small = partial(grey_batch, default_batch=32, side=16)
