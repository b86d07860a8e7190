"""Models of the transformers library, built small from a config: random weights, nothing downloaded.

FOREIGN maps a name to what makes (model, keyword inputs); REFUSED has those that one graph cannot hold.
"""

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
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
}  # fmt: skip
SPEECH = {
    "conv_dim": [32, 32, 32], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 2], "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False, "layerdrop": 0.0,
    "classifier_proj_size": 16,
}  # fmt: skip
PYRAMID = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}


def ids(batch: int = 4, length: int = 32) -> Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(1))


def pixels(batch: int, side: int) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(2))


def classes(batch: int) -> Tensor:
    return torch.arange(batch) % 2


def build(model: str, settings: dict[str, Any]) -> nn.Module:
    """Return the model of this class name with this config."""
    import transformers

    cls = getattr(transformers, model)
    made: nn.Module = cls(cls.config_class(**settings))
    return made


def text(model: str, *, length: int = 32, batch: int = 4, **settings: Any) -> Callable[[], Made]:
    """A language model, its labels as long as its inputs."""

    def make() -> Made:
        inputs = {"input_ids": ids(batch, length), "labels": ids(batch, length)}
        return build(model, {**TEXT, **SMALL, **settings}), inputs

    return make


def image(model: str, side: int, batch: int = 4, *, labels: str = "classes", **settings: Any) -> Callable[[], Made]:
    """A model of images; `labels` are classes, maps of 3 classes, depth maps, or none."""

    def make() -> Made:
        inputs: dict[str, Any] = {"pixel_values": pixels(batch, side)}
        if labels == "classes":
            inputs["labels"] = classes(batch)
        elif labels == "maps":
            inputs["labels"] = torch.randint(0, 3, (batch, side, side), generator=torch.Generator().manual_seed(3))
        elif labels == "depths":
            inputs["labels"] = torch.rand(batch, side, side, generator=torch.Generator().manual_seed(3))
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


def _noise(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(2))


FOREIGN: dict[str, Callable[[], Made]] = {
    # decoders of text
    "gpt2": text("GPT2LMHeadModel", n_positions=64),
    "gpt_neo": text(
        "GPTNeoForCausalLM", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8,
        max_position_embeddings=64,
    ),
    "gpt_neox": text("GPTNeoXForCausalLM"),
    "gptj": text("GPTJForCausalLM", rotary_dim=8, n_positions=64),
    "gpt_bigcode": text("GPTBigCodeForCausalLM", n_positions=64),
    "codegen": text("CodeGenForCausalLM", rotary_dim=8, n_positions=64, n_ctx=64),
    "ctrl": text("CTRLLMHeadModel", dff=128, n_positions=64),
    "opt": text("OPTForCausalLM", ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64),
    "bloom": text("BloomForCausalLM"),
    "falcon": text("FalconForCausalLM"),
    "llama": text("LlamaForCausalLM", num_key_value_heads=2),
    "qwen2": text("Qwen2ForCausalLM", num_key_value_heads=2),
    "qwen3": text("Qwen3ForCausalLM", num_key_value_heads=2, head_dim=16),
    "gemma2": text("Gemma2ForCausalLM", num_key_value_heads=2, head_dim=16),
    "phi": text("PhiForCausalLM"),
    "phi3": text("Phi3ForCausalLM", num_key_value_heads=2),
    "olmo2": text("Olmo2ForCausalLM", num_key_value_heads=2),
    "stablelm": text("StableLmForCausalLM", num_key_value_heads=2),
    "cohere": text("CohereForCausalLM", num_key_value_heads=2),
    "granite": text("GraniteForCausalLM", num_key_value_heads=2),
    "nemotron": text("NemotronForCausalLM", num_key_value_heads=2, head_dim=16),
    "starcoder2": text("Starcoder2ForCausalLM", num_key_value_heads=2),
    "xglm": text("XGLMForCausalLM", d_model=64, ffn_dim=128, num_layers=2, attention_heads=4),
    "biogpt": text("BioGptForCausalLM", max_position_embeddings=64, layerdrop=0.0),
    "mixtral": text("MixtralForCausalLM", num_key_value_heads=2, num_local_experts=4),
    "mamba": text("MambaForCausalLM", hidden_size=32, state_size=4, length=12, batch=2),
    "mamba2": text("Mamba2ForCausalLM", hidden_size=32, state_size=8, num_heads=4, head_dim=16, n_groups=2, chunk_size=16),
    "rwkv": text("RwkvForCausalLM", hidden_size=32, attention_hidden_size=32, length=8),
    "xlnet": text("XLNetLMHeadModel", d_model=64, n_layer=2, n_head=4, d_inner=128),
    # encoders of text
    "bert": text("BertForMaskedLM"),
    "albert": text("AlbertForMaskedLM", embedding_size=32),
    "electra": text("ElectraForMaskedLM", embedding_size=32),
    "deberta": text("DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "roformer": text("RoFormerForMaskedLM", max_position_embeddings=64),
    "rembert": text("RemBertForMaskedLM", input_embedding_size=32, output_embedding_size=48),
    "esm": text("EsmForMaskedLM", max_position_embeddings=64, mask_token_id=3, position_embedding_type="rotary"),
    "funnel": text("FunnelForMaskedLM", block_sizes=[1, 1], d_model=64, n_head=4, d_head=16, d_inner=128),
    "big_bird": text("BigBirdForMaskedLM", attention_type="original_full", max_position_embeddings=64),
    "fnet": text("FNetForMaskedLM"),
    "convbert": text("ConvBertForMaskedLM", embedding_size=32),
    "squeezebert": text("SqueezeBertForMaskedLM", embedding_size=64),
    "mpnet": text("MPNetForMaskedLM"),
    "ibert": text("IBertForMaskedLM", max_position_embeddings=64),
    "modernbert": text("ModernBertForMaskedLM", attn_implementation="sdpa", cls_token_id=1, sep_token_id=2),
    "perceiver": given(
        "PerceiverForMaskedLM", lambda: {"inputs": ids(), "labels": ids()}, vocab_size=100, num_latents=16, d_latents=64,
        d_model=64, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4,
        num_cross_attention_heads=4, max_position_embeddings=32,
    ),
    # both sides of text
    "t5": text("T5ForConditionalGeneration", d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
    "bart": text("BartForConditionalGeneration", **TWO_SIDED),
    "marian": text("MarianMTModel", **TWO_SIDED),
    "pegasus": text("PegasusForConditionalGeneration", **TWO_SIDED),
    "m2m_100": text("M2M100ForConditionalGeneration", **TWO_SIDED, encoder_layerdrop=0.0, decoder_layerdrop=0.0),
    "blenderbot": text("BlenderbotForConditionalGeneration", **TWO_SIDED),
    "prophetnet": text(
        "ProphetNetForConditionalGeneration", num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64,
    ),
    # images
    "resnet": image(
        "ResNetForImageClassification", 128, 8, embedding_size=64, hidden_sizes=[64, 128, 128, 256], depths=[1, 1, 1, 1],
        layer_type="basic",
    ),
    "regnet": image(
        "RegNetForImageClassification", 128, 8, embedding_size=32, hidden_sizes=[32, 64, 64, 128], depths=[1, 1, 1, 1],
        groups_width=16,
    ),
    "mobilenet_v1": image("MobileNetV1ForImageClassification", 96),
    "mobilevit": image(
        "MobileViTForImageClassification", 64, hidden_sizes=[32, 48, 64], neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 128],
        num_attention_heads=2, intermediate_size=64,
    ),
    "levit": image(
        "LevitForImageClassification", 128, hidden_sizes=[64, 96, 128], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
        key_dim=[16, 16, 16],
    ),
    "convnext": image("ConvNextForImageClassification", 32, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
    "convnextv2": image("ConvNextV2ForImageClassification", 64, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
    "poolformer": image("PoolFormerForImageClassification", 64, **PYRAMID),
    "focalnet": image("FocalNetForImageClassification", 64, embed_dim=24, depths=[1, 1, 1, 1]),
    "swin": image(
        "SwinForImageClassification", 32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    "swinv2": image("Swinv2ForImageClassification", 64, embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=4),
    "hiera": image(
        "HieraForImageClassification", 64, image_size=[64, 64], embed_dim=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8],
    ),
    "beit": image("BeitForImageClassification", 64),
    "dinov2": image("Dinov2ForImageClassification", 56, patch_size=14),
    "data2vec_vision": image("Data2VecVisionForImageClassification", 64),
    "pvt": image("PvtForImageClassification", 64, num_attention_heads=[1, 2, 5, 8], hidden_sizes=[16, 32, 40, 64], depths=[1] * 4),
    "vit_mae": image(
        "ViTMAEForPreTraining", 32, labels="none", patch_size=8, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4, decoder_intermediate_size=64,
    ),
    "swin2sr": given(
        "Swin2SRForImageSuperResolution", lambda: {"pixel_values": pixels(2, 16)}, image_size=16, embed_dim=24,
        depths=[1, 1], num_heads=[2, 4], window_size=4, upscale=2,
    ),
    "segformer": image("SegformerForSemanticSegmentation", 64, labels="maps", **PYRAMID, decoder_hidden_size=32),
    "dpt": image(
        "DPTForSemanticSegmentation", 32, 2, labels="maps", patch_size=8, num_hidden_layers=4, fusion_hidden_size=16,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 16, 32, 32], is_hybrid=False,
    ),
    "glpn": image("GLPNForDepthEstimation", 64, 2, labels="depths", hidden_sizes=[16, 32, 40, 64], depths=[1] * 4, decoder_hidden_size=16),
    "video_mae": given(
        "VideoMAEForVideoClassification",
        lambda: {"pixel_values": _noise(2, 4, 3, 32, 32), "labels": classes(2)}, image_size=32, patch_size=8, num_frames=4,
    ),
    "timesformer": given(
        "TimesformerForVideoClassification",
        lambda: {"pixel_values": _noise(2, 4, 3, 32, 32), "labels": classes(2)}, image_size=32, patch_size=8, num_frames=4,
    ),
    # sound, series, pairs
    "wav2vec2": speech("Wav2Vec2ForSequenceClassification"),
    "hubert": speech("HubertForSequenceClassification"),
    "sew": speech("SEWForSequenceClassification", squeeze_factor=2),
    "unispeech_sat": speech("UniSpeechSatForSequenceClassification"),
    "ast": given(
        "ASTForAudioClassification", lambda: {"input_values": _noise(4, 64, 32), "labels": classes(4)}, num_mel_bins=32,
        max_length=64, num_labels=2,
    ),
    "whisper": given(
        "WhisperForConditionalGeneration", lambda: {"input_features": _noise(4, 16, 80), "labels": ids()}, **TEXT, **TWO_SIDED,
        num_mel_bins=16, max_source_positions=40, max_target_positions=40,
    ),
    "speech_to_text": given(
        "Speech2TextForConditionalGeneration", lambda: {"input_features": _noise(4, 80, 16), "labels": ids()}, **TEXT,
        **TWO_SIDED, input_feat_per_channel=16, max_source_positions=80, max_target_positions=64, conv_channels=32,
        encoder_layerdrop=0.0, decoder_layerdrop=0.0,
    ),
    "univnet": given(
        "UnivNetModel", lambda: {"input_features": _noise(1, 10, 16), "noise_sequence": _noise(1, 10, 8)},
        model_hidden_channels=8, model_in_channels=8, num_mel_bins=16, kernel_predictor_hidden_channels=8,
    ),
    "patchtst": given(
        "PatchTSTForPrediction", lambda: {"past_values": _noise(4, 32, 3), "future_values": _noise(4, 8, 3)},
        num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, d_model=32, ffn_dim=64, prediction_length=8,
    ),
    "patchtsmixer": given(
        "PatchTSMixerForPrediction", lambda: {"past_values": _noise(4, 32, 3), "future_values": _noise(4, 8, 3)},
        num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, d_model=16, num_layers=2, prediction_length=8,
    ),
    "clip": pair("CLIPModel"),
    "siglip": pair("SiglipModel"),
    "altclip": pair("AltCLIPModel"),
    "blip": pair("BlipForImageTextRetrieval", image_text_hidden_size=16),
    "chinese_clip": pair("ChineseCLIPModel"),
}  # fmt: skip

# What stops them: `if` on a tensor's value, layers drawn by torch's random numbers, an autograd.Function of their own.
REFUSED: dict[str, Callable[[], Made]] = {
    "longformer": text("LongformerForMaskedLM", attention_window=8, max_position_embeddings=66),
    "nystromformer": text("NystromformerForMaskedLM", segment_means_seq_len=32, num_landmarks=8),
    "yoso": text("YosoForMaskedLM", use_expectation=True),
}  # fmt: skip
