"""Models of the transformers library, built from a config (random weights, nothing downloaded)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphplan

transformers = pytest.importorskip("transformers")


def ids(batch: int = 4, length: int = 32) -> torch.Tensor:
    return torch.randint(0, 100, (batch, length), generator=torch.Generator().manual_seed(1))


def gpt2() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = transformers.GPT2Config(
        vocab_size=100, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids(), "labels": ids()}


def bert() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    inputs = {"input_ids": ids(), "attention_mask": torch.ones(4, 32, dtype=torch.long), "labels": ids()}
    return transformers.BertForMaskedLM(config), inputs


def llama() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": ids(), "labels": ids()}


def t5() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = transformers.T5Config(
        vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids(), "labels": ids()}


def swin() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    inputs = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.zeros(4, dtype=torch.long)}
    return transformers.SwinForImageClassification(config), inputs


def convnext() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)
    inputs = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.zeros(4, dtype=torch.long)}
    return transformers.ConvNextForImageClassification(config), inputs


def mamba() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = transformers.MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config), {"input_ids": ids(2, 12), "labels": ids(2, 12)}


FOREIGN: dict[str, Callable[[], tuple[torch.nn.Module, dict[str, Any]]]] = {
    f.__name__: f for f in (gpt2, bert, llama, t5, swin, convnext, mamba)
}


@pytest.mark.parametrize("name", FOREIGN)
def test_planned_and_verified(name: str) -> None:
    model, inputs = FOREIGN[name]()
    model.train()
    loss = {"loss_fn": lambda outputs: outputs.loss}
    free = graphplan.optimize(model, "100%", (), inputs, time_limit=3, **loss)
    budget = (free.plan.minimum_peak_bytes + free.plan.baseline_peak_bytes) // 2
    planned = free.at_budget(budget)
    graphplan.verify(planned, model, (), example_kwargs=inputs, **loss)
    assert type(planned(**inputs)) is type(model(**inputs))
    assert any(d.fate != "keep" for d in planned.plan.decisions.values())
