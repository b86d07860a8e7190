"""VGG with batch normalization for image classification."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from models_zoo.entry import image_batch

# Channels of every 3x3 convolution, one inner tuple for each stage; a pooling by two follows each stage.
Stages = tuple[tuple[int, ...], ...]
VGG16: Stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def _features(stages: Stages, in_channels: int) -> nn.Sequential:
    """Return the convolutional part, [N, in, H, W] to [N, last, H / 2^stages, W / 2^stages]."""
    layers: list[nn.Module] = []
    for stage in stages:
        for channels in stage:
            layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
            layers.append(nn.BatchNorm2d(channels))
            layers.append(nn.ReLU(inplace=True))
            in_channels = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class VGG(nn.Module):
    """Stacks of 3x3 convolutions and a three-layer classifier, images [N, C, H, W] to logits [N, classes]."""

    def __init__(
        self,
        stages: Stages,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        hidden: int = 4096,
        pool: int = 7,
        dropout: float = 0.5,
    ) -> None:
        """Make the stages, a pooling to [pool, pool], and a classifier with two layers of `hidden` units."""
        super().__init__()
        self.features = _features(stages, in_channels)
        self.avgpool = nn.AdaptiveAvgPool2d(pool)
        self.classifier = nn.Sequential(
            nn.Linear(stages[-1][-1] * pool * pool, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W] to logits [N, classes]."""
        out: Tensor = self.avgpool(self.features(x))
        out = self.classifier(torch.flatten(out, 1))
        return out


def vgg16_bn(num_classes: int = 1000, in_channels: int = 3) -> VGG:
    """Return VGG-16 with batch normalization, images [N, in_channels, H, W] to logits [N, num_classes]."""
    return VGG(VGG16, num_classes=num_classes, in_channels=in_channels)


def vgg16_bn_small() -> VGG:
    """Return all layers of VGG-16 at an eighth of the width, images [N, 3, 32, 32] to logits [N, 10]."""
    stages = tuple(tuple(channels // 8 for channels in stage) for stage in VGG16)
    return VGG(stages, num_classes=10, hidden=64, pool=1)


vgg16_bn_example = partial(image_batch, default_batch=8, size=128, classes=1000)
vgg16_bn_example_small = partial(image_batch, default_batch=8, size=32, classes=10)
