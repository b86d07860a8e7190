"""A BERT style encoder with a masked-language-model head and attention written out as a softmax."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from models_zoo.entry import Example, generator

MASK_TOKEN = 103
UNSCORED = -100


class MaskedAttention(nn.Module):
    """Multi-head self-attention with dropout on its probabilities, [N, T, width] to [N, T, width]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Make the query, key, value and output projections."""
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def _split(self, x: Tensor) -> Tensor:
        """Map [N, T, width] to [N, heads, T, width / heads]."""
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map x [N, T, width], with bias [N, 1, 1, T] added to the scores, to [N, T, width]."""
        query, key, value = self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5 + bias
        chances: Tensor = self.dropout(scores.softmax(-1))
        out: Tensor = self.output((chances @ value).transpose(1, 2).reshape(x.shape))
        return out


class EncoderLayer(nn.Module):
    """Attention and a two-layer perceptron, each normalized after its skip, [N, T, width] to the same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Make the two halves, the perceptron four times as wide inside."""
        super().__init__()
        self.attention = MaskedAttention(width, heads, dropout)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map x [N, T, width] with score bias [N, 1, 1, T] to [N, T, width]."""
        x = self.norm1(x + self.dropout(self.attention(x, bias)))
        out: Tensor = self.norm2(x + self.dropout(self.mlp(x)))
        return out


class MaskedHead(nn.Module):
    """The masked-language-model head, [N, T, width] to logits [N, T, vocab]."""

    def __init__(self, embedding: nn.Embedding) -> None:
        """Make the transform and a decoder that shares the weight of the token embedding."""
        super().__init__()
        vocab, width = embedding.num_embeddings, embedding.embedding_dim
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12))
        self.decoder = nn.Linear(width, vocab)
        self.decoder.weight = embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, T, width] to logits [N, T, vocab]."""
        out: Tensor = self.decoder(self.transform(x))
        return out


class Bert(nn.Module):
    """An encoder over tokens [N, T] with an attention mask [N, T], to logits [N, T, vocab]."""

    def __init__(
        self,
        *,
        vocab: int = 8192,
        context: int = 512,
        layers: int = 6,
        width: int = 512,
        heads: int = 8,
        dropout: float = 0.1,
    ) -> None:
        """Make the embeddings of tokens, positions and segments, the layers and the head."""
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, width)
        self.position_embedding = nn.Embedding(context, width)
        self.segment_embedding = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, dropout) for _ in range(layers))
        self.head = MaskedHead(self.token_embedding)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, mask: Tensor, segments: Tensor | None = None) -> Tensor:
        """Map tokens, mask (true where attended) and segments, each [N, T], to logits [N, T, vocab]."""
        if segments is None:
            segments = torch.zeros_like(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x: Tensor = self.token_embedding(tokens) + self.position_embedding(positions)
        x = self.dropout(self.norm(x + self.segment_embedding(segments)))
        bias = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, bias)
        logits: Tensor = self.head(x)
        return logits


def masked_batch(batch: int | None = None, seed: int = 0, *, default_batch: int, context: int, vocab: int) -> Example:
    """Return tokens and attention mask, and as targets the masked tokens, each [batch, context]."""
    count = default_batch if batch is None else batch
    source = generator(seed)
    tokens = torch.randint(vocab, (count, context), generator=source)
    lengths = torch.randint(context // 2, context + 1, (count, 1), generator=source)
    attended = torch.arange(context) < lengths
    chosen = (torch.rand(count, context, generator=source) < 0.15) & attended
    chosen[:, 0] = True  # so that every sequence is scored somewhere
    targets = tokens.masked_fill(~chosen, UNSCORED)
    return Example((tokens.masked_fill(chosen, MASK_TOKEN), attended), targets)


def bert() -> Bert:
    """Return a BERT of six layers of width 512, tokens [N, T <= 512] to logits [N, T, 8192]."""
    return Bert()


def bert_small() -> Bert:
    """Return a BERT of two layers of width 64, tokens [N, T <= 32] to logits [N, T, 128]."""
    return Bert(vocab=128, context=32, layers=2, width=64, heads=2)


bert_example = partial(masked_batch, default_batch=8, context=128, vocab=8192)
bert_example_small = partial(masked_batch, default_batch=8, context=32, vocab=128)
