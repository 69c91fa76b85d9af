"""Inside routed experts: what is seen is what they compute, at the tokens routed to them, and nothing else moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from resafe.errors import UserError
from resafe.model import experts
from resafe.model.hooks import Seen, capture_neurons, patch, scale, silence
from resafe.model.layout import read_layout
from resafe.model.parts import FeedForward
from tests.architectures import IDS, logits, tiny

EVERY_LAYOUT = (
    "mixtral",  # (experts, 2 * width, hidden), gate above up
    "gpt_oss",  # transposed, interleaved, with biases
    "aria_text",  # transposed
    "nemotron_h",  # no gate
    "muse_spark",  # a norm after each expert
    "llama4_text",  # these declare nothing: a loop of their own each
    "longcat_flash",
    "step3p7",
    "jetmoe",
    "dbrx",
    "inkling_text",
)
FORWARDS = ("eager", "batched_mm", "grouped_mm")


def routed(model: PreTrainedModel) -> list[FeedForward]:
    return [part for part in read_layout(model).parts if part.experts is not None]


@pytest.mark.parametrize("architecture", EVERY_LAYOUT)
def test_the_loop_computes_what_the_experts_compute(architecture: str) -> None:
    model = tiny(architecture)
    part = routed(model)[0]
    given: list[tuple[object, ...]] = []
    handle = part.module.register_forward_pre_hook(lambda module, args: given.append(args))
    before = logits(model)
    handle.remove()
    with torch.no_grad():
        own = part.module(*given[0])
        with experts.opened(part, lambda *seen: None):
            ours = part.module(*given[0])
    assert own.abs().max() > 1e-3
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("forward", FORWARDS)
def test_any_way_of_computing_experts_is_seen_and_restored(forward: str) -> None:
    model = tiny("mixtral")
    model.set_experts_implementation(forward)
    before, part = logits(model), routed(model)[1]
    with capture_neurons(model, [(part.name, "ffn")], lambda seen: None):
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert model.config._experts_implementation == forward
    assert torch.equal(logits(model), before)


def test_values_are_those_of_the_tokens_routed_to_the_expert() -> None:
    model = tiny("mixtral")
    part = routed(model)[1]
    inputs: list[Tensor] = []
    routes: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])
        routes.append(args[1])

    handle = part.module.register_forward_pre_hook(watch)
    seen: dict[tuple[str, int | None], Seen] = {}
    wanted = [(part.name, where) for where in ("input", "gate", "up", "ffn")]
    with capture_neurons(model, wanted, lambda s: seen.__setitem__((s.where, s.expert), s)):
        logits(model)
    handle.remove()
    hidden, index = inputs[0], routes[0]  # (tokens, hidden), (tokens, top k)
    assert hidden.shape[0] == IDS.numel()
    assert sum(len(s.tokens) for (where, _), s in seen.items() if where == "ffn") == index.numel()
    for (where, expert), s in seen.items():
        assert s.part == part
        assert torch.equal(s.tokens, (index == expert).any(-1).nonzero().flatten())
        x = hidden[s.tokens]
        gate, up = functional.linear(x, part.module.gate_up_proj[expert]).chunk(2, dim=-1)
        truth = {"input": x, "gate": gate, "up": up, "ffn": functional.silu(gate) * up}
        torch.testing.assert_close(s.values, truth[where])


def test_the_stored_order_does_not_show() -> None:
    model = tiny("gpt_oss")
    part = routed(model)[0]
    seen: dict[str, Seen] = {}
    with capture_neurons(
        model, [(part.name, w) for w in ("input", "gate", "up")], lambda s: seen.setdefault(s.where, s)
    ):
        logits(model)
    expert = seen["gate"].expert
    both = seen["input"].values @ part.module.gate_up_proj[expert] + part.module.gate_up_proj_bias[expert]
    torch.testing.assert_close(seen["gate"].values, both[:, ::2])
    torch.testing.assert_close(seen["up"].values, both[:, 1::2])


@pytest.mark.parametrize("architecture", EVERY_LAYOUT)
def test_each_neurons_column_is_what_down_writes_for_it(architecture: str) -> None:
    for part in routed(tiny(architecture)):
        one = torch.eye(part.width)
        for expert in range(part.experts or 0):
            bias = part.down.of_expert(expert, torch.zeros(1, part.width))
            written = part.down.of_expert(expert, one) - bias
            torch.testing.assert_close(part.down_columns()[expert], written)
            torch.testing.assert_close(part.down_norms()[expert], written.norm(dim=-1))


def test_one_expert_is_edited_and_its_neighbours_are_not() -> None:
    model = tiny("mixtral")
    part = routed(model)[0]
    factors = torch.ones(part.shape)
    factors[2, 5] = -3.0
    with scale(model, {part.name: factors}):
        scaled = logits(model)
    assert not torch.allclose(scaled, logits(model))
    part.module.down_proj[2, :, 5] *= -3
    torch.testing.assert_close(scaled, logits(model), rtol=1e-5, atol=1e-5)


def test_patching_experts_with_zero_silences_them() -> None:
    model = tiny("jetmoe")
    part = routed(model)[0]
    mask = torch.rand(part.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    with silence(model, {part.name: mask}):
        silent = logits(model)
    with patch(model, {part.name: mask}, {part.name: torch.zeros(part.shape)}):
        assert torch.equal(logits(model), silent)


@pytest.mark.parametrize("architecture", ["mixtral", "llama4_text"])
def test_everything_is_put_back_after_an_error_and_from_inside(architecture: str) -> None:
    model = tiny(architecture)
    before, parts = logits(model), routed(model)
    masks = [{part.name: torch.ones(part.shape, dtype=torch.bool)} for part in parts]
    with silence(model, masks[0]):
        only_first = logits(model)
        with pytest.raises(ZeroDivisionError), silence(model, masks[-1]):
            raise ZeroDivisionError
        assert torch.equal(logits(model), only_first)
    assert not torch.allclose(only_first, before)
    assert torch.equal(logits(model), before)
    assert not experts._OPEN
    assert "forward" not in vars(parts[0].module)


def test_activations_carry_gradients() -> None:
    model = tiny("mixtral").requires_grad_(True)
    part = routed(model)[0]
    seen: list[Tensor] = []
    with capture_neurons(model, [(part.name, "ffn")], lambda s: seen.append(s.values)):
        loss = model(IDS).logits.square().sum()
    gradients = torch.autograd.grad(loss, seen)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_shared_experts_are_seen_by_position(tmp_path: Path) -> None:
    model = tiny("qwen2_moe")
    (shared,) = [part for part in read_layout(model).parts if part.name == "model.layers.1.mlp.shared_expert"]
    seen: list[Seen] = []
    with capture_neurons(model, [(shared.name, "up"), (shared.name, "ffn")], seen.append):
        logits(model)
    assert [s.values.shape for s in seen] == [(*IDS.shape, shared.width)] * 2
    assert {s.tokens for s in seen} == {None}


def test_experts_under_an_adapter_are_edited_as_if_it_were_merged() -> None:
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = LoraConfig(r=2, target_modules=[], target_parameters=names, lora_alpha=16)
    wrapped = get_peft_model(tiny("mixtral"), settings).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    plain = logits(tiny("mixtral"))
    assert not torch.allclose(logits(wrapped), plain)
    part = routed(wrapped)[0]
    mask = torch.zeros(part.shape, dtype=torch.bool)
    mask[:, 3] = True
    with silence(wrapped, {part.name: mask}):
        beside = logits(wrapped)
    with pytest.raises(UserError, match="merge=True"):
        part.down_norms()
    merged = wrapped.merge_and_unload()
    with silence(merged, {part.name: mask}):
        torch.testing.assert_close(logits(merged), beside, rtol=1e-4, atol=1e-4)
