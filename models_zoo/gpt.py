"""A GPT-2 style decoder language model that returns its own loss when it is given targets."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_zoo.entry import Example, generator


class CausalAttention(nn.Module):
    """Multi-head self-attention over earlier positions, [N, T, width] to [N, T, width]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Make the joint query-key-value projection and the output projection."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, T, width] to [N, T, width]."""
        batch, time, width = x.shape
        parts = self.qkv(x).split(width, dim=2)
        query, key, value = (part.view(batch, time, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.dropout(self.proj(mixed.transpose(1, 2).reshape(batch, time, width)))
        return out


class DecoderBlock(nn.Module):
    """Attention and a perceptron, each normalized first and with a skip, [N, T, width] to the same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Make the two halves, the perceptron four times as wide inside."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, T, width] to [N, T, width]."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class GPT(nn.Module):
    """A decoder of tokens [N, T] to logits [N, T, vocab], or to a scalar loss given targets [N, T]."""

    def __init__(
        self,
        *,
        vocab: int = 8192,
        context: int = 256,
        layers: int = 6,
        width: int = 384,
        heads: int = 6,
        dropout: float = 0.1,
    ) -> None:
        """Make the embeddings, the blocks and a head that shares the token embedding's weight."""
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, width)
        self.position_embedding = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.token_embedding.weight
        self._initialize(layers)

    def _initialize(self, layers: int) -> None:
        """Draw the weights, those that end a residual branch smaller with the number of layers."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear) and module is not self.head:
                ends_branch = name.endswith(("attention.proj", "mlp.2"))
                nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if ends_branch else 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Map tokens [N, T] to logits [N, T, vocab], or with targets [N, T] to their mean cross entropy."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x: Tensor = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def token_batch(batch: int | None = None, seed: int = 0, *, default_batch: int, context: int, vocab: int) -> Example:
    """Return tokens [batch, context] and the tokens after them [batch, context], both inputs of the model."""
    count = default_batch if batch is None else batch
    text = torch.randint(vocab, (count, context + 1), generator=generator(seed))
    return Example((text[:, :-1].contiguous(), text[:, 1:].contiguous()), None)


def gpt() -> GPT:
    """Return a GPT of six layers, tokens [N, T <= 256] to logits [N, T, 8192]."""
    return GPT()


def gpt_small() -> GPT:
    """Return a GPT of two layers, tokens [N, T <= 32] to logits [N, T, 128]."""
    return GPT(vocab=128, context=32, layers=2, width=64, heads=2)


gpt_example = partial(token_batch, default_batch=8, context=256, vocab=8192)
gpt_example_small = partial(token_batch, default_batch=4, context=32, vocab=128)
