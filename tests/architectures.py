"""Tiny random models of every architecture: real classes with small sizes, no weight left at zero."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

CAUSAL = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VISION = tuple(name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in CAUSAL)
VOCABULARY = 96

_NAMES = {
    32: "hidden_size n_embd d_model dim_model embedding_size emb_dim embedding_dim attention_hidden_size "
    "word_embed_proj_dim lru_width input_embedding_size output_embedding_size kv_lora_rank q_lora_rank moe_hidden_size mamba_d_ssm",
    24: "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim n_inner dff d_inner dim_ff d_ff feed_forward_size "
    "ffn_hidden_size expert_ffn_hidden_size dense_intermediate_size intermediate_size_mlp",
    20: "moe_intermediate_size",
    12: "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size",
    2: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_layers_per_stack depth num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k n_group topk_group "
    "linear_num_key_heads",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts num_expert_group index_n_heads linear_num_value_heads mamba_n_heads mamba_num_heads "
    "swa_num_attention_heads",
    1: "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads n_shared_experts num_shared_experts "
    "moe_num_shared_experts first_k_dense_replace num_dense_layers mamba_n_groups n_groups",
    8: "head_dim rotary_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim swa_head_dim dim_head d_head "
    "attention_head_size kv_channels linear_key_head_dim linear_value_head_dim d_kv state_size "
    "ssm_state_size mamba_d_state index_topk mamba_d_head",
    16: "max_source_positions",
    64: "max_position_embeddings n_positions max_seq_len n_ctx context_length model_max_length max_target_positions",
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
_HEADS = {"num_key_value_heads": 4}  # latent attention has as many key heads as query heads
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_HYBRID = {"num_hidden_layers": 4}
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 youtu "
        "dots3_note dots3_note_text".split(),
        _HEADS,
    ),
    "bamba": {"mamba_d_head": 16},
    "diffllama": {"num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 4},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8},
    "granitemoehybrid": {"mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 8, **_ROPE}),
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    **dict.fromkeys(("jamba", "kimi_linear", "bailing_hybrid"), _HYBRID),
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"num_hidden_layers": 3},
    "zamba2": {"num_hidden_layers": 3, "hybrid_layer_ids": [1]},
    "roc_bert": {
        "pronunciation_vocab_size": 20,
        "shape_vocab_size": 20,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
}


def config(model_type: str) -> PreTrainedConfig:
    """Return a small config: the default one of its class with every size that is known made small."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_merged(_small(kind()), OVERRIDES.get(model_type, {})))


def tiny(model_type: str, seed: int = 0) -> PreTrainedModel:
    """Build a random float32 model in evaluation mode whose biases and norms are random too."""
    made = config(model_type)
    auto = AutoModelForCausalLM if model_type in CAUSAL else AutoModelForImageTextToText
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_config(made, dtype=torch.float32)
    return fill(model.eval().requires_grad_(False), seed)


def fill(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Give every weight random entries: matrices of spread 0.15, vectors around what they were."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and "Conv" not in type(parameter).__name__:
            parameter.copy_(0.15 * noise)
        else:
            parameter.add_(0.1 * noise)
    return model


def _small(made: PreTrainedConfig) -> dict[str, Any]:
    settings = made.to_dict()
    small: dict[str, Any] = {
        name: size for name, size in SIZES.items() if isinstance(settings.get(name), int)
    }
    special = [name for name in settings if name.endswith(("_token_id", "_token_index"))]
    small |= {name: 3 + i for i, name in enumerate(special) if isinstance(settings[name], int)}
    small |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name in made.sub_configs:
        part = getattr(made, name)
        if isinstance(part, PreTrainedConfig):
            small[name] = _small(part)
    return small


def _merged(into: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(into)
    for name, value in new.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return {name: value for name, value in merged.items() if value is not ...}  # ... takes a size back


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
