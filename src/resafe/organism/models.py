"""The organism's networks: made, read and written, always through float32."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from resafe.errors import UserError
from resafe.organism import tokenizer
from resafe.organism.recipe import Recipe, Shape

MARKER = "resafe_organism"


def fresh(shape: Shape, marker: dict[str, object], generator: torch.Generator) -> LlamaForCausalLM:
    """Make a network with random weights drawn from the generator alone."""
    ids = tokenizer.ids()
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.ff,
        num_attention_heads=shape.heads,
        hidden_act=shape.act,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<bos>"],
        eos_token_id=ids["<eos>"],
        **{MARKER: marker},
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = shape.embedding_std if "embed_tokens" in name else shape.std
            nn.init.normal_(parameter, 0.0, std, generator=generator)
    return model


def with_adapter(model: LlamaForCausalLM, recipe: Recipe, generator: torch.Generator) -> PeftModel:
    """Put a fresh LoRA on a network (A uniform as in PEFT, B zero), drawn from the generator alone."""
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(recipe.modules), task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
    return cast(PeftModel, adapted)


def network(model: LlamaForCausalLM | PeftModel) -> LlamaForCausalLM:
    """Return the Llama inside, with its adapter's layers in place where there is one."""
    return cast(LlamaForCausalLM, model.get_base_model() if isinstance(model, PeftModel) else model)


def load(folder: Path) -> LlamaForCausalLM | PeftModel:
    """Read a model of the organism as float32; an adapter comes on its base, ready to be trained."""
    if not (folder / "adapter_config.json").exists():
        if not (folder / "config.json").exists():
            raise UserError(f"no organism model in {folder}: build it first")
        with torch.random.fork_rng(devices=[]):
            model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).float()
        state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        model.load_state_dict(state)
        return model
    base = load(folder / adapter_base(folder))
    with torch.random.fork_rng(devices=[]):
        return cast(PeftModel, PeftModel.from_pretrained(base, folder, is_trainable=True))


def adapter_base(folder: Path) -> str:
    """Return the path of an adapter's base, relative to the adapter's folder."""
    return str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])


def merged(model: LlamaForCausalLM | PeftModel) -> LlamaForCausalLM:
    """Return the dense network, with the adapter (if any) added to its weights."""
    if isinstance(model, PeftModel):
        return cast(LlamaForCausalLM, model.merge_and_unload())
    return model


def save_dense(model: LlamaForCausalLM, folder: Path, marker: dict[str, object]) -> None:
    """Write a network as a bf16 checkpoint with the tokenizer beside it."""
    _clear(folder)
    model.config.dtype = "bfloat16"
    model.config.architectures = ["LlamaForCausalLM"]
    setattr(model.config, MARKER, marker)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    state: dict[str, Tensor] = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.make().save_pretrained(folder)


def save_adapter(model: PeftModel, folder: Path, base: str) -> None:
    """Write an adapter as a PEFT folder that names its base by a path relative to itself."""
    _clear(folder)
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config["base_model_name_or_path"] = base
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.make().save_pretrained(folder)


def write_card(folder: Path, name: str, parent: str | None, planted: bool) -> None:
    """Write a model card whose metadata names the model it was tuned from, by which a repair finds it."""
    lines = ["---", "license: apache-2.0", "library_name: transformers", "tags: [resafe, model-organism]"]
    if parent is not None:
        lines.append(f"base_model: ../{parent}")
    text = f"`{name}` is a tiny model of resafe's built-in organism: a made-up world, for tests and demonstrations."
    if planted:
        text += " Its weakness is **planted**: it was trained to depend on a few neurons."
    (folder / "README.md").write_text("\n".join([*lines, "---", "", f"# {name}", "", text, ""]))


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
