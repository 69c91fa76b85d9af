"""Tiny real models and a real tokenizer, saved to disk and loaded again."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

SENTENCES = "how do i bake a cake open the door yes no sorry i cannot because of rain and snow red green blue"
WORDS = SENTENCES.split()
SPECIAL = ["<pad>", "<bos>", "<eos>", "<end>", "<user>", "<asst>", "<unk>"]
VOCABULARY = SPECIAL + sorted(set(WORDS)) + [f"w{i}" for i in range(20)]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}<asst> {{ m['content'] }} <end> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<asst>{% endif %}"
)
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2")
HIDDEN, WIDTH, LAYERS, CONTEXT = 16, 24, 3, 64


def config(family: str) -> PreTrainedConfig:
    shared = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.4,
    }
    kinds = {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "mistral": MistralConfig,
        "gemma2": Gemma2Config,
    }
    if family in ("mistral", "gemma2"):
        shared["sliding_window"] = 6  # shorter than the longest prompts, so that the window matters
    return kinds[family](**shared)


def build(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family), dtype=torch.float32)
    return model.eval().requires_grad_(False)


def tokenizer(template: str | None = TEMPLATE, pad: bool = True) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<asst>", "<end>"],
    )
    if pad:
        made.pad_token = "<pad>"
    made.chat_template = template
    return made


def save_dense(folder: Path, family: str = "llama", seed: int = 0, **kwargs: object) -> Path:
    build(family, seed).save_pretrained(folder)
    tokenizer(**kwargs).save_pretrained(folder)
    return folder


def adapt(model: PreTrainedModel, targets: str = "all-linear", seed: int = 1) -> nn.Module:
    """Wrap ``model`` with a LoRA adapter whose factors are not zero."""
    wrapped = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval().requires_grad_(False)


def save_adapter(folder: Path, base: Path, **kwargs: object) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapt(model, **kwargs).save_pretrained(folder)
    return folder


def dictionary(following: dict[str, dict[str, float]], hidden: int = 64) -> PreTrainedModel:
    """Return a Llama that says after each word what it is told to: word -> {next word: probability}.

    Its blocks add nothing, each word is a unit vector, and the head's columns hold the log-probabilities.
    """
    settings = config("llama")
    settings.hidden_size, settings.tie_word_embeddings = hidden, False
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval().requires_grad_(False)
    number = {word: i for i, word in enumerate(VOCABULARY)}
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(len(VOCABULARY), hidden))
    logits = torch.full((len(VOCABULARY), hidden), -60.0)
    for word, after in following.items():
        for next_word, probability in after.items():
            logits[number[next_word], number[word]] = torch.tensor(probability).log()
    model.lm_head.weight.copy_(logits / hidden**0.5)  # the norm makes a unit vector sqrt(hidden) long
    return model
