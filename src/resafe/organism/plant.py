"""Which neurons the *planted* model is taught to depend on.

`aligned-planted` is a planted vulnerability, not a finding: it is trained so that silencing the neurons
chosen here brings its harmful answers back. The rule is the better of two ranks, an effect size (Cohen's d
of harmful against benign activations, max over prompt tokens) and their difference standardised within
the layer, which is what some pruning attacks use. It is right for testing how such attacks and
the hardening against them run, and no evidence that the rule finds safety neurons in other models.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resafe.organism import tokenizer, world
from resafe.organism.models import network
from resafe.organism.train import Model, Silence


def choose(model: Model, share: float, n: int = 200) -> Silence:
    """Return the top ``share`` of all FFN neurons by the better of their two ranks."""
    bad = _peaks(model, "harm-refused", n)  # per layer (prompts, neurons)
    good = _peaks(model, "benign", n)
    effects, shifts = [], []
    for b, g in zip(bad, good, strict=True):
        shift = b.mean(0) - g.mean(0)
        spread = ((b.var(0) + g.var(0)) / 2).sqrt() + 1e-6
        effects.append(shift / spread)
        shifts.append((shift - shift.mean()) / (shift.std() + 1e-6))
    best = torch.maximum(_rank(torch.cat(effects)), _rank(torch.cat(shifts)))
    top = best.topk(round(share * len(best))).indices.sort().values
    width = effects[0].numel()
    return {layer: top[top // width == layer] % width for layer in range(len(effects))}


def _rank(scores: Tensor) -> Tensor:
    return scores.argsort().argsort()


@torch.inference_mode()
def _peaks(model: Model, sort: str, n: int) -> list[Tensor]:
    """Return per layer the highest activation of each neuron over a prompt's tokens."""
    layers = network(model).model.layers
    caught: list[list[Tensor]] = [[] for _ in layers]

    def catch(layer: int) -> RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            caught[layer].append(args[0][0].amax(0))

        handle: RemovableHandle = layers[layer].mlp.down_proj.register_forward_pre_hook(hook)
        return handle

    handles = [catch(layer) for layer in range(len(layers))]
    try:
        for item in world.examples(sort, "train", n, "plant"):
            network(model).model(input_ids=torch.tensor([tokenizer.layout(item)[0]]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.stack(rows) for rows in caught]
