"""Densely connected networks with bottlenecks and compression (DenseNet-BC) for image classification."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from models_zoo.entry import image_batch


class DenseLayer(nn.Module):
    """A 1x1 and a 3x3 convolution over all maps so far, a list of [N, C_i, H, W] to [N, growth, H, W]."""

    def __init__(self, in_channels: int, growth: int, bottleneck: int) -> None:
        """Make the layers for `in_channels` joined channels, `bottleneck * growth` in the middle."""
        super().__init__()
        middle = bottleneck * growth
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, middle, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(middle)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(middle, growth, 3, padding=1, bias=False)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Map the block's maps so far, each [N, C_i, H, W], to the next one [N, growth, H, W]."""
        joined = torch.cat(maps, 1)
        out: Tensor = self.conv1(self.relu1(self.norm1(joined)))
        out = self.conv2(self.relu2(self.norm2(out)))
        return out


class DenseBlock(nn.Module):
    """Layers that each read all earlier maps, [N, C, H, W] to [N, C + layers * growth, H, W]."""

    def __init__(self, layers: int, in_channels: int, growth: int, bottleneck: int) -> None:
        """Make `layers` dense layers, each `growth` channels wider in than the one before."""
        super().__init__()
        self.layers = nn.ModuleList(
            DenseLayer(in_channels + index * growth, growth, bottleneck) for index in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C + layers * growth, H, W]."""
        maps = [x]
        for layer in self.layers:
            maps.append(layer(maps))
        return torch.cat(maps, 1)


def _transition(in_channels: int) -> nn.Sequential:
    """Return the layers between two blocks, [N, C, H, W] to [N, C / 2, H / 2, W / 2]."""
    return nn.Sequential(
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, in_channels // 2, 1, bias=False),
        nn.AvgPool2d(2),
    )


class DenseNet(nn.Module):
    """Dense blocks with halving transitions between them, images [N, C, H, W] to logits [N, classes]."""

    def __init__(
        self,
        blocks: tuple[int, ...],
        *,
        growth: int = 32,
        first_channels: int = 64,
        bottleneck: int = 4,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        """Make one dense block for each number of layers in `blocks`."""
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, first_channels, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(first_channels),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
        channels = first_channels
        for index, count in enumerate(blocks):
            layers.append(DenseBlock(count, channels, growth, bottleneck))
            channels += count * growth
            if index + 1 < len(blocks):
                layers.append(_transition(channels))
                channels //= 2
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W] to logits [N, classes]."""
        out: Tensor = self.avgpool(self.features(x))
        out = self.classifier(torch.flatten(out, 1))
        return out


def densenet121(num_classes: int = 1000, in_channels: int = 3) -> DenseNet:
    """Return DenseNet-121, images [N, in_channels, H, W] to logits [N, num_classes]."""
    return DenseNet((6, 12, 24, 16), num_classes=num_classes, in_channels=in_channels)


def densenet121_small() -> DenseNet:
    """Return a DenseNet of four blocks of two layers, images [N, 3, 64, 64] to logits [N, 10]."""
    return DenseNet((2, 2, 2, 2), growth=8, first_channels=16, num_classes=10)


densenet121_example = partial(image_batch, default_batch=8, size=128, classes=1000)
densenet121_example_small = partial(image_batch, default_batch=8, size=64, classes=10)
