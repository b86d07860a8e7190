"""Residual networks for image classification, with the stride of a bottleneck on its 3x3 convolution."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from models_zoo.entry import image_batch


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the skip path from [N, in, H, W] to [N, out, H / stride, W / stride]."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a skip path, [N, in, H, W] to [N, width, H / stride, W / stride]."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        """Make the layers for `in_channels` channels in and `width` out."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in, H, W] to [N, width, H / stride, W / stride]."""
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        out = self.relu(out)
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a skip, [N, in, H, W] to [N, 4 width, H / stride, W / stride]."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        """Make the layers for `in_channels` channels in and four times `width` out."""
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in, H, W] to [N, 4 width, H / stride, W / stride]."""
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        out = self.relu(out)
        return out


class ResNet(nn.Module):
    """Four stages of residual blocks, images [N, C, H, W] to logits [N, classes]."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        small_input: bool = False,
    ) -> None:
        """Make stages of `depths` blocks whose width starts at `width` and doubles from stage to stage."""
        super().__init__()
        self.stem = self._stem(in_channels, width, small_input)
        stages: list[nn.Module] = []
        channels = width
        for index, depth in enumerate(depths):
            stage_width = width * 2**index
            blocks: list[nn.Module] = []
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(block(channels, stage_width, stride))
                channels = stage_width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stem(in_channels: int, width: int, small_input: bool) -> nn.Sequential:
        """Return the first layers: a quarter of the image's sides, or all of them for a small input."""
        if small_input:
            conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        conv = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True), pool)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W] to logits [N, classes]."""
        out: Tensor = self.avgpool(self.stages(self.stem(x)))
        out = self.fc(torch.flatten(out, 1))
        return out


def resnet18(num_classes: int = 1000, in_channels: int = 3, small_input: bool = False) -> ResNet:
    """Return ResNet-18, images [N, in_channels, H, W] to logits [N, num_classes]."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, in_channels=in_channels, small_input=small_input)


def resnet50(num_classes: int = 1000, in_channels: int = 3, small_input: bool = False) -> ResNet:
    """Return ResNet-50, images [N, in_channels, H, W] to logits [N, num_classes]."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, in_channels=in_channels, small_input=small_input)


def resnet18_small() -> ResNet:
    """Return all layers of ResNet-18 at a quarter of the width, images [N, 3, 32, 32] to logits [N, 10]."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=10, width=16, small_input=True)


def resnet50_small() -> ResNet:
    """Return a bottleneck network of seven blocks, images [N, 3, 64, 64] to logits [N, 10]."""
    return ResNet(Bottleneck, (2, 2, 2, 1), num_classes=10, width=8)


resnet18_example = partial(image_batch, default_batch=16, size=128, classes=1000)
resnet50_example = partial(image_batch, default_batch=16, size=128, classes=1000)
resnet18_example_small = partial(image_batch, default_batch=8, size=32, classes=10)
resnet50_example_small = partial(image_batch, default_batch=8, size=64, classes=10)
