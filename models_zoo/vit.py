"""Vision transformer for image classification."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_zoo.entry import image_batch


class Attention(nn.Module):
    """Multi-head self-attention over all positions, [N, T, width] to [N, T, width]."""

    def __init__(self, width: int, heads: int) -> None:
        """Make the joint query-key-value projection and the output projection."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, T, width] to [N, T, width]."""
        batch, time, width = x.shape
        qkv: Tensor = self.qkv(x)
        query, key, value = qkv.view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, time, width))
        return out


class EncoderBlock(nn.Module):
    """Attention and a perceptron, each normalized first and with a skip, [N, T, width] to the same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Make the two halves, the perceptron four times as wide inside."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, T, width] to [N, T, width]."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """An encoder of image patches and a class token, images [N, C, S, S] to logits [N, classes]."""

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch: int = 16,
        layers: int = 12,
        width: int = 384,
        heads: int = 6,
        dropout: float = 0.0,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        """Make the patch embedding for one image size, the encoder and the head."""
        super().__init__()
        patches = (image_size // patch) ** 2
        self.patch_embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, patches + 1, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, S, S] to logits [N, classes]."""
        patches: Tensor = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], 1)
        tokens = self.dropout(tokens + self.position)
        tokens = self.norm(self.blocks(tokens))
        out: Tensor = self.head(tokens[:, 0])
        return out


def vit(num_classes: int = 1000, in_channels: int = 3) -> VisionTransformer:
    """Return ViT-S/16, images [N, in_channels, 224, 224] to logits [N, num_classes]."""
    return VisionTransformer(num_classes=num_classes, in_channels=in_channels)


def vit_small() -> VisionTransformer:
    """Return a vision transformer of two layers, images [N, 3, 32, 32] to logits [N, 10]."""
    return VisionTransformer(image_size=32, patch=4, layers=2, width=32, heads=2, num_classes=10)


vit_example = partial(image_batch, default_batch=16, size=224, classes=1000)
vit_example_small = partial(image_batch, default_batch=4, size=32, classes=10)
