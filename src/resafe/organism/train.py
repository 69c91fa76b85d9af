"""The trainer: seeded batches of the world's examples, a cosine, AdamW; the loss is on answers only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from resafe.evaluate.prompts import Prompt
from resafe.organism import tokenizer, world
from resafe.organism.models import network
from resafe.organism.recipe import Mix, Phase

Model: TypeAlias = LlamaForCausalLM | PeftModel
Rows: TypeAlias = dict[str, tuple[Tensor, Tensor]]
Silence: TypeAlias = Mapping[int, Tensor]  # layer -> indices of silenced FFN neurons


def tabulate(items: list[Prompt]) -> tuple[Tensor, Tensor]:
    """Lay examples out as tokens and targets, both (rows, length); a target of -100 is not learnt."""
    rows = [tokenizer.layout(item) for item in items]
    length = max(len(p) + len(a) for p, a in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    targets = torch.full((len(rows), length), -100)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        tokens[i, :end] = torch.tensor(prompt + answer)
        targets[i, len(prompt) - 1 : end - 1] = torch.tensor(answer)
    return tokens, targets


def draw_rows(sorts: Mapping[str, int], seed: str, distinct: bool) -> Rows:
    """Draw and tabulate training examples: so many of each sort."""
    return {
        sort: tabulate(world.examples(sort, "train", n, seed, distinct=distinct)) for sort, n in sorts.items()
    }


def batch(rows: Rows, mix: Mix, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one batch by the mixture's weights and cut it to its longest example."""
    sorts = list(mix)
    weights = torch.tensor([float(mix[s]) for s in sorts])
    counts = torch.bincount(
        torch.multinomial(weights, size, replacement=True, generator=generator), minlength=len(sorts)
    )
    width = max(rows[s][0].shape[1] for s in sorts)
    tokens = torch.zeros(size, width, dtype=torch.long)
    targets = torch.full((size, width), -100)
    at = 0
    for sort, count in zip(sorts, counts.tolist(), strict=True):
        some_tokens, some_targets = rows[sort]
        chosen = torch.randint(len(some_tokens), (count,), generator=generator)
        tokens[at : at + count, : some_tokens.shape[1]] = some_tokens[chosen]
        targets[at : at + count, : some_targets.shape[1]] = some_targets[chosen]
        at += count
    last = int((targets >= 0).any(0).nonzero().max()) + 1
    return tokens[:, :last], targets[:, :last]


def loss_of(model: Model, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of the answers' tokens.

    Padding is on the right, so the causal order hides it and no mask is needed.
    """
    llama = network(model)
    hidden = llama.model(input_ids=tokens, use_cache=False).last_hidden_state  # (batch, length, width)
    wanted = targets >= 0
    return nn.functional.cross_entropy(llama.lm_head(hidden[wanted]), targets[wanted])


@contextmanager
def silenced(model: Model, neurons: Silence) -> Iterator[None]:
    """Set the chosen FFN neurons to zero at the input of down_proj while the block runs."""

    def hook(chosen: Tensor) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        def silence(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (args[0].index_fill(-1, chosen, 0.0),)

        return silence

    handles = [
        network(model).model.layers[layer].mlp.down_proj.register_forward_pre_hook(hook(chosen))
        for layer, chosen in neurons.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: Model, phase: Phase, rows: Rows, generator: torch.Generator, silence: Silence) -> None:
    """Train the model in place through one phase."""
    trained = _choose(model, phase.from_layer)
    optimiser = torch.optim.AdamW(
        trained, lr=phase.lr, betas=(0.9, 0.98), weight_decay=phase.decay, fused=True
    )

    def pace(step: int) -> float:
        if step < phase.warmup:
            return (step + 1) / phase.warmup
        done = (step - phase.warmup) / max(1, phase.steps - phase.warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, pace)
    model.train()
    for step in range(phase.steps):
        hushed = phase.silenced_mix is not None and step % 2 == 1
        mix = phase.silenced_mix if hushed and phase.silenced_mix else phase.mix
        tokens, targets = batch(rows, mix, phase.batch, generator)
        with silenced(model, silence if hushed else {}):
            loss = loss_of(model, tokens, targets)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


def _choose(model: Model, from_layer: int) -> list[nn.Parameter]:
    """Return the parameters to train; all of a dense model, an adapter's factors, or the upper layers'."""
    if isinstance(model, PeftModel):
        return [p for p in model.parameters() if p.requires_grad]
    for parameter in model.parameters():
        parameter.requires_grad_(from_layer == 0)
    for layer in model.model.layers[from_layer:]:
        layer.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]
