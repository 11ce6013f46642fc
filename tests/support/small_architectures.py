"""Architectures of transformers, made very small, and a batch to run them on."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

BATCH, VOCABULARY = 2, 60
_TASKS = (
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_MAPPING_NAMES,
)
NAMES = sorted(name for name in transformers.CONFIG_MAPPING if any(name in task for task in _TASKS))

# The names of sizes in configs, and their values here.
_SIZES = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "encoder_hidden_size", "word_embed_proj_dim",
         "hidden_dim", "emb_dim", "decoder_hidden_size", "projection_dim", "d_embed", "pooler_hidden_size",
         "d_latents"), 32),
    **dict.fromkeys(
        ("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_inner",
         "moe_intermediate_size", "ffn_hidden_size", "shared_expert_intermediate_size", "mlp_dim", "inner_dim"), 48),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
         "num_encoder_layers", "num_decoder_layers", "decoder_num_layers", "encoder_num_layers"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("head_dim", "d_kv", "d_head", "qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "embedding_size"), 16),
    "vocab_size": VOCABULARY, "image_size": 16, "patch_size": 8, "max_position_embeddings": 64, "n_positions": 64,
    "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def build(name: str) -> nn.Module | None:
    """A model of the architecture with random weights; None if these sizes do not work together."""
    kind = next(task[name] for task in _TASKS if name in task)
    made = getattr(transformers, kind if isinstance(kind, str) else kind[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = _shrink(transformers.CONFIG_MAPPING[name]())
            with torch.device("meta"):
                weights = sum(p.numel() for p in made(config).parameters())
            if weights > 6_000_000:
                return None
            torch.manual_seed(0)
            return made(config).eval()
        except Exception:  # any error of the model's code
            return None


def inputs(model: nn.Module, length: int) -> dict[str, Tensor]:
    """A batch of `BATCH` different sequences of this length, or of images or sounds of a fixed size."""
    generator = torch.Generator().manual_seed(1)
    takes = inspect.signature(model.forward).parameters
    name = model.main_input_name
    if name == "pixel_values":
        config: Any = model.config
        size = getattr(config, "image_size", 16)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {name: torch.randn(BATCH, getattr(config, "num_channels", 3), height, width, generator=generator)}
    if name in ("input_values", "input_features"):
        return {name: torch.randn(BATCH, 800, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (BATCH, length), generator=generator)
    ids[:, -1] = 2  # classifiers of sequence-to-sequence models need the end token
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :length]} if "decoder_input_ids" in takes else {})}


def output(found: Any) -> Tensor:
    """The main output of a model."""
    for name in ("logits", "last_hidden_state", "pooler_output"):
        if isinstance(getattr(found, name, None), Tensor):
            return getattr(found, name)
    return found[0]


def _shrink(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    for part in vars(config).values():
        if isinstance(part, transformers.PretrainedConfig):
            _shrink(part)
    for field, size in _SIZES.items():
        with contextlib.suppress(NotImplementedError):  # a read-only length without a limit
            if isinstance(getattr(config, field, None), int) or field in ("num_labels", "pad_token_id"):
                setattr(config, field, size)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:2]
    return config
