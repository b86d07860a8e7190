"""Models for the solver lane beside the zoo: deeper GPTs, explicit attention, foreign architectures from a config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models_zoo import MODELS
from models_zoo.gpt import GPT, gpt_example

Source = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class ExplicitAttention(nn.Module):
    """Causal attention [N, T, width] to the same, written out: its weights [N, heads, T, T] are activations."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Make the projections, and the dropout on the weights."""
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
        later = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
        scores = query @ key.transpose(-2, -1) / (width // self.heads) ** 0.5
        weights = self.dropout(scores.masked_fill(later, float("-inf")).softmax(-1))
        out: Tensor = self.dropout(self.proj((weights @ value).transpose(1, 2).reshape(batch, time, width)))
        return out


def deep_gpt(layers: int, *, explicit: bool = False) -> Source:
    """Return a GPT of so many layers, width 256."""
    model = GPT(layers=layers, width=256, heads=4)
    if explicit:
        for block in model.blocks:
            block.attention = ExplicitAttention(256, 4, 0.1)
    return model, gpt_example(batch=4).inputs, {}


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 8000, (batch, length), generator=torch.Generator().manual_seed(0))


def hf_gpt2() -> Source:
    """Return GPT-2's architecture, 6 layers of width 384."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=8000, n_positions=256, n_embd=384, n_layer=6, n_head=6, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), (), {"input_ids": _ids(4, 256), "labels": _ids(4, 256)}


def hf_llama() -> Source:
    """Return LLaMA's architecture, 6 layers of width 384."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=8000, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6
    )
    return transformers.LlamaForCausalLM(config), (), {"input_ids": _ids(4, 256), "labels": _ids(4, 256)}


def hf_t5() -> Source:
    """Return T5's encoder and decoder, 4 layers each of width 256."""
    import transformers

    config = transformers.T5Config(
        vocab_size=8000, d_model=256, d_kv=64, d_ff=1024, num_layers=4, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), (), {"input_ids": _ids(8, 128), "labels": _ids(8, 128)}


def hf_swin() -> Source:
    """Return Swin-T's windowed attention at 112 pixels."""
    import transformers

    config = transformers.SwinConfig(image_size=112, embed_dim=64, depths=[2, 2, 6], num_heads=[2, 4, 8])
    inputs = {"pixel_values": torch.randn(8, 3, 112, 112), "labels": torch.zeros(8, dtype=torch.long)}
    return transformers.SwinForImageClassification(config), (), inputs


def hf_convnext() -> Source:
    """Return ConvNeXt at 112 pixels, four stages."""
    import transformers

    config = transformers.ConvNextConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 4, 2])
    inputs = {"pixel_values": torch.randn(8, 3, 112, 112), "labels": torch.zeros(8, dtype=torch.long)}
    return transformers.ConvNextForImageClassification(config), (), inputs


def _zoo(name: str, small: bool) -> Source:
    entry = MODELS[name]
    example = entry.example_small() if small else entry.example()
    return entry.build_small() if small else entry.build(), example.inputs, {}


SOURCES: dict[str, Callable[[], Source]] = {
    **{name: (lambda name=name: _zoo(name, False)) for name in MODELS},  # type: ignore[misc]
    **{f"{name}_small": (lambda name=name: _zoo(name, True)) for name in MODELS},  # type: ignore[misc]
    "gpt12": lambda: deep_gpt(12),
    "gpt24": lambda: deep_gpt(24),
    "gpt48": lambda: deep_gpt(48),
    "gpt24_explicit": lambda: deep_gpt(24, explicit=True),
    "gpt48_explicit": lambda: deep_gpt(48, explicit=True),
    "hf_gpt2": hf_gpt2,
    "hf_llama": hf_llama,
    "hf_t5": hf_t5,
    "hf_swin": hf_swin,
    "hf_convnext": hf_convnext,
}
