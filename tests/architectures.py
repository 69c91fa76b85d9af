"""Tiny random models of every architecture: real classes with small sizes, no weight left at zero."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
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

from resafe.errors import UserError
from resafe.model.hooks import Seen, capture_neurons, silence
from resafe.model.layout import Layout, read_layout
from resafe.model.names import Place, Places, places
from resafe.model.parts import FeedForward, Matrix, held
from resafe.weights.checkpoint import Checkpoint

CAUSAL = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VISION = tuple(name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in CAUSAL)
VOCABULARY = 96

_NAMES = {
    32: "hidden_size n_embd d_model dim_model embedding_size emb_dim embedding_dim attention_hidden_size "
    "word_embed_proj_dim lru_width input_embedding_size output_embedding_size kv_lora_rank q_lora_rank "
    "moe_hidden_size mamba_d_ssm",
    24: "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim n_inner dff d_inner dim_ff d_ff feed_forward_size "
    "ffn_hidden_size expert_ffn_hidden_size dense_intermediate_size intermediate_size_mlp",
    20: "moe_intermediate_size",
    12: "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size",
    2: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_layers_per_stack depth num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k "
    "n_group topk_group "
    "linear_num_key_heads",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts num_expert_group index_n_heads linear_num_value_heads mamba_n_heads mamba_num_heads "
    "linear_num_heads swa_num_attention_heads",
    1: "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads n_shared_experts num_shared_experts "
    "moe_num_shared_experts first_k_dense_replace num_dense_layers mamba_n_groups n_groups",
    8: "head_dim rotary_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim swa_head_dim dim_head d_head "
    "attention_head_size kv_channels linear_key_head_dim linear_value_head_dim d_kv linear_head_dim state_size "
    "ssm_state_size mamba_d_state index_topk mamba_d_head",
    16: "max_source_positions",
    64: "max_position_embeddings n_positions max_seq_len n_ctx context_length model_max_length max_target_positions",
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
_HEADS = {"num_key_value_heads": 4}  # latent attention has as many key heads as query heads
_LATENT = """axk1 axk2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 youtu
dots3_note_text"""
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_MIXED = {"mlp_layer_types": ["dense", "sparse"]}
_COMPASS = {"rope_parameters": {"full_attention": None, "sliding_attention": _ROPE["rope_parameters"]}}
_HYBRID = {"num_hidden_layers": 4}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_THREE_ROPES = "qwen2_vl qwen2_5_vl glm4v paddleocr_vl qwen2_5_omni_thinker"
_HALF_ROPES = "glm4v_moe glm46v glm_ocr glmga"
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_LATENT.split(), _HEADS),
    "dots3_note": {
        "text_config": {
            **_HEADS,
            "per_layer_config": {},
            "layer_types": ["indexed_attention", "indexed_attention"],
        }
    },
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), {**_HYBRID, "num_expert_group": 2}),
    "blt": {
        "encoder_config": {"hidden_size_global": 64, "num_key_value_heads": 4},
        "decoder_config": {"hidden_size_global": 64, "num_key_value_heads": 4},
        "global_config": {"hidden_size": 64, "num_key_value_heads": 4, "head_dim": ...},
        "patcher_config": {"num_key_value_heads": 4},
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3, 4],
    },
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 32}},
    "deepseek_v2": {**_HEADS, "num_experts_per_tok": 2, "n_routed_experts": 4, "first_k_dense_replace": 1},
    **dict.fromkeys(_THREE_ROPES.split(), {"text_config": _SECTIONS}),
    **dict.fromkeys(_HALF_ROPES.split(), {"text_config": {**_SECTIONS, "partial_rotary_factor": 1.0}}),
    **dict.fromkeys(("kimi_k25", "mistral_large4"), {"text_config": _HEADS}),
    "hunyuan_vl": {"text_config": {"head_dim": 8, **_ROPE}},
    "beam": _MIXED,
    "flint": {"mlp_only_layers": [0]},
    "muse_spark": {
        "audio_config": {"num_hidden_layers": 4, "out_hidden_size": 32},
        "vision_config": {"out_hidden_size": 32},
    },
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "glm5_next": {"text_config": {**_HEADS, "index_topk": 16, "qk_rope_head_dim": 0, **_MIXED}},
    "step3p7": {"text_config": {"sliding_window": 8, **_MIXED}},
    "granite_docling": {"vision_config": {"out_hidden_size": 32}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "cosmos3_edge": {"text_config": _SECTIONS},
    "cohere_compass": {"text_config": _COMPASS},
    "bamba": {"mamba_d_head": 16},
    "diffllama": {"num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8},
    "granitemoehybrid": {"mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 8, **_ROPE}),
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "jamba": _HYBRID,
    "longcat_flash": {**_HEADS, "zero_expert_num": 2},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "hash_seed": 1,
        "attn_layers": ["local", "local"],
    },
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "head_dim": ...,
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {
        "attention_hidden_size": ...,
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid"] * 2 + ["linear_attention"],
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 20,
        "shape_vocab_size": 20,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
}


def config(model_type: str, settings: Mapping[str, Any] = MappingProxyType({})) -> PreTrainedConfig:
    """Return a small config: the default one of its class with every size that is known made small."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_merged(_merged(_small(kind()), OVERRIDES.get(model_type, {})), settings))


def tiny(
    model_type: str, seed: int = 0, settings: Mapping[str, Any] = MappingProxyType({})
) -> PreTrainedModel:
    """Build a random float32 model in evaluation mode whose biases and norms are random too."""
    made = config(model_type, settings)
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
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0  # some models do so when they are loaded
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


class NotChecked(Exception):
    """What transformers itself does stands in the way of a comparison."""


_NORM = "zeroed rows are another edit: a norm over all neurons stands before down"
UP_IS_CURVED = ("inkling2", "inkling2_text")  # it goes through a tanh, too
ROWS_DIFFER = {"bitnet": _NORM, "kosmos-2.5": _NORM}


@dataclass(frozen=True)
class Row:
    """What became of one architecture: it works, is refused, has no feed-forward block, or could not be built."""

    architecture: str
    state: Literal["works", "refused", "none", "not built", "fails"]
    parts: str = ""
    reason: str = ""


IDS = torch.tensor([[40, 41, 42, 43, 44, 45, 46, 47], [50, 51, 52, 40, 41, 42, 60, 61]])


def examine(model_type: str, folder: Path, settings: Mapping[str, Any] = MappingProxyType({})) -> Row:
    """Build, read, ablate by hook and by weight on disk, and compare; nothing is caught but what is reported."""
    try:
        model = tiny(model_type, settings=settings)
        before = logits(model)
    except Exception as error:  # noqa: BLE001  transformers' own troubles are written into the table
        return Row(model_type, "not built", reason=f"{type(error).__name__}: {first_line(error)}")
    try:
        layout = read_layout(model)
    except UserError as error:
        state: Literal["none", "refused"] = "none" if "no feed-forward block" in str(error) else "refused"
        return Row(model_type, state, reason=str(error))
    kinds = ", ".join(dict.fromkeys(kind(part) for part in layout.parts))
    try:
        return Row(model_type, "works", kinds, compare(model, layout, before, folder))
    except NotChecked as error:
        return Row(model_type, "not built", kinds, str(error))
    except (AssertionError, UserError) as error:
        return Row(model_type, "fails", kinds, str(error))


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:100]


def compare(model: PreTrainedModel, layout: Layout, before: Tensor, folder: Path) -> str:
    """Assert that a neuron of every part (and every expert) is ablated alike in all ways; return remarks."""
    close = 1e-5 * max(1.0, float(before.abs().max()))
    everywhere = [(p.name, where) for p in layout.parts for where in ("input", "up", "ffn")]
    loudest = {part.name: torch.full((part.experts or 1,), -1) for part in layout.parts}

    def see(seen: Seen) -> None:
        if seen.where == "ffn":
            loudest[seen.part.name][seen.expert or 0] = seen.values.abs().flatten(0, -2).sum(0).argmax()

    with capture_neurons(model, everywhere, see):
        far(logits(model), before, close, "looking changes the logits")
    silent = [name for name, neurons in loudest.items() if (neurons < 0).all()]
    assert not silent, f"never ran: {silent}"
    masks = {part.name: mask(part, loudest[part.name]) for part in layout.parts}
    for name in masks:
        with silence(model, {name: masks[name]}):
            assert (logits(model) - before).abs().max() > close, f"silencing in {name} changes nothing"
    for part in layout.parts:
        if part.gate is not None and model.config.model_type not in ROWS_DIFFER:
            curved = model.config.model_type in UP_IS_CURVED
            assert straight(model, part, part.up) != curved, f"{part.name} is not linear in what is called up"
            assert not straight(model, part, part.gate), f"{part.name} is linear in what is called its gate"
    with silence(model, masks):
        hooked = logits(model)
    model.save_pretrained(folder)
    found = places(model, Checkpoint.open(folder))
    again = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    if float((logits(again) - before).abs().max()) > close:
        raise NotChecked("transformers does not load what it saved")
    assert places(again).shares == found.shares, "a loaded model names its neurons in another way"
    file = folder / "model.safetensors"
    stored = load_file(file)
    for roles in (("down",), ("gate", "up", "gate bias", "up bias")):
        edited = {name: tensor.clone() for name, tensor in stored.items()}
        for place in chosen_places(found, masks):
            if place.role in roles:
                edited[place.key][place.slices] = 0
        save_file(edited, file, metadata={"format": "pt"})
        reloaded = type(model).from_pretrained(folder, dtype=torch.float32).eval()
        same = roles == ("down",) or model.config.model_type not in ROWS_DIFFER
        assert same == bool((logits(reloaded) - hooked).abs().max() <= close), f"zeroed {roles[0]} on disk"
    return ROWS_DIFFER.get(model.config.model_type, "")


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, use_cache=False).logits
    assert torch.isfinite(out).all()
    return out


def straight(model: PreTrainedModel, part: FeedForward, matrix: Matrix) -> bool:
    """Whether the neurons lie on a line when all of a map's weights are multiplied by -1/4, 1/4 and 3/4.

    They do for up, whatever multiplies it, and for a gate under any activation function they do not. (Small
    factors, which no clamp minds.)
    """
    one, two, three = (first_neurons(model, part, matrix, factor) for factor in (-0.25, 0.25, 0.75))
    return torch.allclose(three - two, two - one, rtol=1e-3, atol=1e-5 * float(two.abs().max()))


def first_neurons(model: PreTrainedModel, part: FeedForward, matrix: Matrix, factor: float) -> Tensor:
    """Return a part's neurons the first time that it runs, with one of its maps multiplied by a factor."""
    shares = [matrix.neurons_last(held(matrix.module, matrix.attribute))]
    if matrix.bias is not None:
        shares.append(held(matrix.module, matrix.bias.rpartition(".")[2])[..., matrix.neurons])
    seen: list[Tensor] = []
    kept = [share.clone() for share in shares]
    for share in shares:
        share.mul_(factor)
    with capture_neurons(model, [(part.name, "ffn")], lambda s: seen.append(s.values)):
        logits(model)
    for share, before in zip(shares, kept, strict=True):
        share.copy_(before)
    return seen[0].double()


def far(one: Tensor, other: Tensor, close: float, words: str) -> None:
    distance = float((one - other).abs().max())
    assert distance <= close, f"{words} (by {distance:.1e})"


def mask(part: FeedForward, neurons: Tensor) -> Tensor:
    """Mark one neuron of each expert; of an expert that no token has reached, none."""
    chosen = torch.zeros(part.experts or 1, part.width, dtype=torch.bool)
    reached = neurons >= 0
    chosen[reached, neurons[reached]] = True
    return chosen.reshape(part.shape)


def chosen_places(found: Places, masks: Mapping[str, Tensor]) -> Iterator[Place]:
    for name, chosen in masks.items():
        for index in chosen.nonzero().tolist():
            yield from found.of(name, None if len(index) == 1 else index[0], index[-1])


def kind(part: FeedForward) -> str:
    shape = "gated" if part.gated else "plain"
    fused = " fused" if part.gate is not None and part.gate.weight == part.up.weight else ""
    return f"{shape}{fused}{'' if part.experts is None else ' experts'}"
