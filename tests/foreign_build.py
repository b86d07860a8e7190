"""What makes small models of the transformers library from their configs, with inputs: random, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Any]]
# Most configs know these by these names; the others are given theirs beside.
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
TWO_SIDED = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
}
SPEECH = {
    "conv_dim": [32, 32, 32],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    "classifier_proj_size": 16,
}
PYRAMID = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}


def ids(batch: int = 4, length: int = 32) -> Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(1))


def pixels(batch: int, side: int) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(2))


def classes(batch: int) -> Tensor:
    return torch.arange(batch) % 2


def build(model: str, settings: dict[str, Any]) -> nn.Module:
    """Return the model of this class name with this config; `...` leaves a setting as it is by default."""
    import transformers

    cls = getattr(transformers, model)
    made: nn.Module = cls(cls.config_class(**{k: v for k, v in settings.items() if v is not ...}))
    return made


def text(model: str, *, length: int = 32, batch: int = 4, **settings: Any) -> Callable[[], Made]:
    """A language model, its labels as long as its inputs."""

    def make() -> Made:
        inputs = {"input_ids": ids(batch, length), "labels": ids(batch, length)}
        return build(model, {**TEXT, **SMALL, **settings}), inputs

    return make


def image(model: str, side: int, batch: int = 4, *, labels: str = "classes", **settings: Any) -> Callable[[], Made]:
    """A model of images; `labels` are classes, maps of 3 classes, or none."""

    def make() -> Made:
        inputs: dict[str, Any] = {"pixel_values": pixels(batch, side)}
        if labels == "classes":
            inputs["labels"] = classes(batch)
        elif labels == "maps":
            inputs["labels"] = torch.randint(0, 3, (batch, side, side), generator=torch.Generator().manual_seed(3))
        counted = {"num_labels": 2 if labels == "classes" else 3} if labels in ("classes", "maps") else {}
        return build(model, {**SMALL, "image_size": side, **counted, **settings}), inputs

    return make


def speech(model: str, **settings: Any) -> Callable[[], Made]:
    def make() -> Made:
        waves = torch.randn(2, 2000, generator=torch.Generator().manual_seed(2))
        return build(model, {**SMALL, **SPEECH, **settings}), {"input_values": waves, "labels": classes(2)}

    return make


def pair(model: str, *, positions: int = 40, **settings: Any) -> Callable[[], Made]:
    """A model of images and texts, with the loss that tells pairs from others."""

    def make() -> Made:
        tower = {**SMALL, "hidden_size": 32, "intermediate_size": 64}
        words = {**tower, "vocab_size": 100, "max_position_embeddings": positions}
        sees = {**tower, "image_size": 32, "patch_size": 8}
        inputs = {"input_ids": ids(), "pixel_values": pixels(4, 32), "return_loss": True}
        return build(model, {"text_config": words, "vision_config": sees, "projection_dim": 16, **settings}), inputs

    return make


def given(model: str, inputs: Callable[[], dict[str, Any]], **settings: Any) -> Callable[[], Made]:
    """Any other model, with its own inputs."""
    return lambda: (build(model, {**SMALL, **settings}), inputs())


def noise(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(2))
