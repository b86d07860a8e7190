"""MobileNetV2 for image classification."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from models_zoo.entry import image_batch

# One row for each group of blocks: expansion, channels out, blocks, stride of the first block.
Settings = tuple[tuple[int, int, int, int], ...]
V2: Settings = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
V2_SMALL: Settings = ((1, 8, 1, 1), (6, 8, 2, 2), (6, 16, 2, 2), (6, 24, 2, 1), (6, 32, 1, 1))


def _conv_bn_relu6(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return convolution, normalization and ReLU6, [N, in, H, W] to [N, out, H / stride, W / stride]."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Widening, depthwise and narrowing convolutions, [N, in, H, W] to [N, out, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        """Make the layers, with a skip path where input and output have one shape."""
        super().__init__()
        hidden = in_channels * expansion
        self.use_skip = stride == 1 and in_channels == out_channels
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(_conv_bn_relu6(in_channels, hidden, 1))
        layers.append(_conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden))
        layers.append(nn.Conv2d(hidden, out_channels, 1, bias=False))
        layers.append(nn.BatchNorm2d(out_channels))
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in, H, W] to [N, out, H / stride, W / stride]."""
        out: Tensor = self.conv(x)
        return x + out if self.use_skip else out


class MobileNetV2(nn.Module):
    """Inverted residual blocks between two plain convolutions, images [N, C, H, W] to logits [N, classes]."""

    def __init__(
        self,
        settings: Settings,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        first_channels: int = 32,
        last_channels: int = 1280,
        dropout: float = 0.2,
    ) -> None:
        """Make the blocks `settings` lists, each group's first block with its stride."""
        super().__init__()
        layers: list[nn.Module] = [_conv_bn_relu6(in_channels, first_channels, 3, stride=2)]
        channels = first_channels
        for expansion, out_channels, blocks, first_stride in settings:
            for position in range(blocks):
                stride = first_stride if position == 0 else 1
                layers.append(InvertedResidual(channels, out_channels, stride, expansion))
                channels = out_channels
        layers.append(_conv_bn_relu6(channels, last_channels, 1))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last_channels, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W] to logits [N, classes]."""
        out: Tensor = self.avgpool(self.features(x))
        out = self.classifier(torch.flatten(out, 1))
        return out


def mobilenet_v2(num_classes: int = 1000, in_channels: int = 3) -> MobileNetV2:
    """Return MobileNetV2 at width 1.0, images [N, in_channels, H, W] to logits [N, num_classes]."""
    return MobileNetV2(V2, num_classes=num_classes, in_channels=in_channels)


def mobilenet_v2_small() -> MobileNetV2:
    """Return a MobileNetV2 of eight narrow blocks, images [N, 3, 32, 32] to logits [N, 10]."""
    return MobileNetV2(V2_SMALL, num_classes=10, first_channels=8, last_channels=64)


mobilenet_v2_example = partial(image_batch, default_batch=32, size=128, classes=1000)
mobilenet_v2_example_small = partial(image_batch, default_batch=16, size=32, classes=10)
