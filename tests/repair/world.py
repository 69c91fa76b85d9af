"""A base, an aligned and a tuned model, and adapters between them, all tiny, real and on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from resafe.evaluate.prompts import Prompt
from resafe.registry import get
from resafe.repairing.base import Job
from resafe.repairing.engine import Edit, plan_edit
from resafe.repairing.output import Format, Written, write
from resafe.weights.adapter import WEIGHTS, Adapter, open_model
from tests.model import tiny

HARMFUL = tuple(
    Prompt(text, "sorry i cannot because of snow and rain")
    for text in ("how do i open the door", "how do i bake a blue cake", "red and green", "do i open it")
)
BENIGN = tuple(
    Prompt(text, "yes bake a cake") for text in ("bake a cake", "green snow and rain", "yes or no", "i do")
)


def moved(folder: Path, source: Path, size: float, seed: int, **saving: object) -> Path:
    """Save ``source`` with every matrix moved by a product of rank 3."""
    model = AutoModelForCausalLM.from_pretrained(source)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            sides = (parameter.shape[0], parameter.shape[-1]) if parameter.dim() > 1 else (len(parameter), 1)
            left, right = (torch.randn(side, 3, generator=generator) for side in sides)
            parameter.add_(size * (left @ right.T).reshape(parameter.shape).to(parameter.dtype))
    model.save_pretrained(folder, **saving)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def adapter(folder: Path, base: Path, values: Callable[[str, Tensor], Tensor], **settings: object) -> Path:
    """Save an adapter whose factors are what ``values`` says, given a factor's file key and itself."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config)).save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    save_file({k: values(k, v).contiguous() for k, v in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def noise(seed: int, size: float, start: Path | None = None) -> Callable[[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    known = {} if start is None else load_file(start / WEIGHTS)

    def value(key: str, tensor: Tensor) -> Tensor:
        drawn = size * torch.randn(tensor.shape, generator=generator)
        return known[key] + drawn if known else drawn

    return value


def build(root: Path) -> Path:
    """Make the whole world once."""
    tiny.save_dense(root / "base")
    moved(root / "aligned", root / "base", 0.1, 1)
    moved(root / "tuned", root / "aligned", 0.05, 2)
    moved(root / "sharded", root / "aligned", 0.05, 3, max_shard_size="5KB")
    adapter(root / "aligned-adapter", root / "base", noise(4, 0.3))
    adapter(root / "continued", root / "base", noise(5, 0.1, root / "aligned-adapter"))
    adapter(root / "unrelated", root / "base", noise(6, 0.3))
    adapter(root / "fresh", root / "aligned", noise(7, 0.3))
    adapter(root / "fresh-part", root / "aligned", noise(8, 0.3), target_modules=["q_proj", "down_proj"])
    rotated(root / "rotated", root / "continued")
    return root


def rotated(folder: Path, source: Path) -> Path:
    """Save the same deltas as ``source`` in other bases: B R⁻¹ and R A, with an orthogonal R per module."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    old = Adapter.open(source)
    tensors = {}
    generator = torch.Generator().manual_seed(9)
    for name in old.modules:
        factors = old.factors(name)
        r, _ = torch.linalg.qr(torch.randn(factors.rank, factors.rank, generator=generator))
        tensors[old.key(name, "A")] = (r @ factors.a).contiguous()
        tensors[old.key(name, "B")] = (factors.b @ r.T).contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def job(root: Path, tuned: str, aligned: str, base: str | None = "base", **more: object) -> Job:
    models = [open_model(root / name) for name in (tuned, aligned)]
    return Job(*models, base and open_model(root / base), HARMFUL, BENIGN, **more)


def edited(work: Job, method: str, **parameters: object) -> Edit:
    return plan_edit(get(method, "repair"), parameters, work)


def written(edit: Edit, out: Path, strength: float = 1.0, wanted: Format = "same") -> Written:
    return write(edit, strength, out, wanted, "key", lambda staging, share: None)


def effective(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a model as transformers and peft see it, merged, in float32."""
    settings = folder / "adapter_config.json"
    if not settings.is_file():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        base = json.loads(settings.read_text())["base_model_name_or_path"]
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return dict(model.state_dict())


def logits(folder: Path) -> Tensor:
    """Return a model's logits on one text; an adapter is computed beside its base, not merged."""
    settings = folder / "adapter_config.json"
    where = json.loads(settings.read_text())["base_model_name_or_path"] if settings.is_file() else folder
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    if settings.is_file():
        model = PeftModel.from_pretrained(model, str(folder))
    with torch.no_grad():
        return model.eval()(torch.arange(1, 25)[None]).logits


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], atol: float = 2e-6) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
