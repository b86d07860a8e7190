"""U-Net for image segmentation, with padded convolutions and batch normalization."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from models_zoo.entry import Example, generator


def _double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return two 3x3 convolutions with normalization and ReLU, [N, in, H, W] to [N, out, H, W]."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class Up(nn.Module):
    """A decoder step that doubles the sides and joins a skip, [N, 2C, H, W] to [N, C, 2H, 2W]."""

    def __init__(self, channels: int) -> None:
        """Make the layers for `channels` channels out and twice as many in."""
        super().__init__()
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.conv = _double_conv(2 * channels, channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map x [N, 2C, H, W] and skip [N, C, 2H, 2W] to [N, C, 2H, 2W]."""
        out: Tensor = self.conv(torch.cat([skip, self.up(x)], 1))
        return out


class UNet(nn.Module):
    """Encoder and decoder, images [N, C, H, W] of sides divisible by 2^depth to logits [N, classes, H, W]."""

    def __init__(self, *, num_classes: int = 2, in_channels: int = 3, base_channels: int = 32, depth: int = 4) -> None:
        """Make the two halves, with `base_channels` at full resolution and twice as many after each step."""
        super().__init__()
        widths = [base_channels * 2**level for level in range(depth + 1)]
        sources = [in_channels, *widths]
        self.encoder = nn.ModuleList(_double_conv(sources[level], widths[level]) for level in range(depth))
        self.pool = nn.MaxPool2d(2)
        self.bottom = _double_conv(widths[depth - 1], widths[depth])
        self.decoder = nn.ModuleList(Up(widths[level]) for level in reversed(range(depth)))
        self.head = nn.Conv2d(base_channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W] to logits [N, classes, H, W]."""
        skips: list[Tensor] = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottom(x)
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            x = stage(x, skip)
        out: Tensor = self.head(x)
        return out


def segmentation_batch(
    batch: int | None = None, seed: int = 0, *, default_batch: int, size: int, classes: int = 2
) -> Example:
    """Return images [batch, 3, size, size] with one label for each pixel [batch, size, size]."""
    count = default_batch if batch is None else batch
    source = generator(seed)
    images = torch.randn(count, 3, size, size, generator=source)
    return Example((images,), torch.randint(classes, (count, size, size), generator=source))


def unet(num_classes: int = 2, in_channels: int = 3) -> UNet:
    """Return a U-Net of depth four, images [N, in_channels, H, W] to logits [N, num_classes, H, W]."""
    return UNet(num_classes=num_classes, in_channels=in_channels)


def unet_small() -> UNet:
    """Return a U-Net of depth two, images [N, 3, 32, 32] to logits [N, 2, 32, 32]."""
    return UNet(base_channels=8, depth=2)


unet_example = partial(segmentation_batch, default_batch=4, size=256)
unet_example_small = partial(segmentation_batch, default_batch=8, size=32)
