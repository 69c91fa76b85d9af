"""Directions taken out of the residual stream by hooks and by weights, and added to it."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from resafe.errors import UserError
from resafe.model.directions import ablate_direction, add_direction, orthogonalize
from resafe.model.hooks import block_input, block_output, capture
from resafe.model.layout import read_layout
from tests.architectures import tiny
from tests.model.tiny import adapt

IDS = torch.tensor([[1, 4, 9, 11, 12, 5], [1, 4, 20, 21, 22, 5]])
UNTIED = (
    "llama",
    "qwen3",
    "phi3",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_next",
)
TIED = ("gpt2", "opt", "falcon", "cohere")
POST_NORM = ("gemma2", "gemma3_text", "gemma4_text", "olmo2", "glm4", "exaone4", "afmoe")


def direction() -> Tensor:
    return 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


def along(model: nn.Module, r: Tensor, stack: ExitStack) -> list[float]:
    """Return how much of what enters and leaves the blocks lies along a direction, in a list that fills."""
    found: list[float] = []

    def see(x: Tensor) -> None:
        found.append(float((x @ r).abs().max() / (r.norm() * x.norm(dim=-1).max())))

    layers = range(len(read_layout(model)))
    stack.enter_context(
        capture(model, {site(i): see for i in layers for site in (block_input, block_output)})
    )
    return found


@pytest.mark.parametrize("kind", [*UNTIED, *TIED, *POST_NORM])
def test_an_ablated_direction_is_gone(kind: str) -> None:
    model, r = tiny(kind), direction()
    plain = logits(model)
    with ExitStack() as stack:
        before = along(model, r, stack)
        logits(model)
    with ablate_direction(model, r), ExitStack() as stack:
        after = along(model, r, stack)
        ablated = logits(model)
    assert max(before) > 0.05
    assert max(after) < 1e-5
    assert (ablated - plain).abs().max() > 1e-2
    assert torch.equal(logits(model), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", [*UNTIED, *TIED])
def test_orthogonal_weights_do_the_same(kind: str) -> None:
    model, r = tiny(kind), direction()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ablate_direction(model, r):
        hooked = logits(model)
    undo = orthogonalize(model, r)
    if kind in TIED:  # the head reads from the embeddings without the direction, too
        assert (logits(model) - hooked).abs().max() > 1e-4
    else:
        torch.testing.assert_close(logits(model), hooked, rtol=0, atol=1e-5)
    undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2"])
def test_half_precision_is_no_unknown_writing(kind: str) -> None:
    model, r = tiny(kind).to(torch.bfloat16), direction()
    with ablate_direction(model, r), ExitStack() as stack:
        left = along(model, r.bfloat16(), stack)
        logits(model)
    assert max(left) < 0.05
    if kind != "gemma2":
        orthogonalize(model, r)()


@pytest.mark.parametrize("kind", POST_NORM)
def test_weights_behind_a_norm_are_refused_and_left_alone(kind: str) -> None:
    model = tiny(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="still writes along the direction"):
        orthogonalize(model, direction())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_block_that_writes_in_an_unknown_way_is_refused() -> None:
    model = tiny("bert")  # a norm over the sum, so that no part's output is what is added
    with pytest.raises(UserError, match="still writes along"), ablate_direction(model, direction()):
        logits(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_adapter_is_ablated_beside_its_base_and_not_orthogonalised() -> None:
    wrapped, r = adapt(tiny("llama")), direction()
    with ablate_direction(wrapped, r):
        beside = logits(wrapped)
    with pytest.raises(UserError, match="merge=True"):
        orthogonalize(wrapped, r)
    merged = wrapped.merge_and_unload()
    with ablate_direction(merged, r):
        torch.testing.assert_close(logits(merged), beside, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
def test_an_added_direction_enters_its_block(kind: str) -> None:
    model, r = tiny(kind), direction()
    seen: list[Tensor] = []
    for context in (ExitStack(), add_direction(model, r, 1, -0.5)):
        with context, capture(model, {block_input(1): seen.append}):
            changed = logits(model)
    torch.testing.assert_close(seen[1] - seen[0], (-0.5 * r).expand_as(seen[0]), rtol=0, atol=1e-5)
    with add_direction(model, r, 1, -0.5), add_direction(model, r, 1, 0.5):
        torch.testing.assert_close(logits(model), logits_without(model), rtol=0, atol=1e-4)
    assert (changed - logits(model)).abs().max() > 1e-2


def logits_without(model: nn.Module) -> Tensor:
    return logits(tiny(model.config.model_type))


def test_a_direction_of_no_length_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(UserError, match="has 31 numbers"), ablate_direction(model, torch.ones(31)):
        logits(model)
    with pytest.raises(UserError, match="zero"), ablate_direction(tiny("llama"), torch.zeros(32)):
        pass
