from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resafe.errors import UserError
from resafe.model import hooks
from resafe.model.hooks import Recorder, block_output, capture, input_of, output_of, patch, scale, silence
from resafe.model.layout import read_layout

from . import tiny

IDS = torch.tensor([[1, 4, 9, 11, 12, 5], [1, 4, 20, 21, 22, 5]])
CHOSEN = {0: torch.tensor([0, 5, 23]), 2: torch.tensor([7])}
EDITS: dict[str, Callable[[nn.Module], AbstractContextManager[object]]] = {
    "silence": lambda model: silence(model, CHOSEN),
    "scale": lambda model: scale(model, {0: (torch.tensor([1, 2]), 0.5)}),
    "patch": lambda model: patch(model, {1: (torch.tensor([3]), 2.0)}),
    "capture": lambda model: capture(model, {block_output(0): lambda value: None}),
}


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_silencing_equals_zeroing_the_neurons_weights(family: str) -> None:
    model = tiny.build(family)
    plain = logits(model)
    with silence(model, CHOSEN):
        hooked = logits(model)
    assert (hooked - plain).abs().max() > 1e-2
    for layer, index in CHOSEN.items():
        mlp = model.model.layers[layer].mlp
        mlp.gate_proj.weight[index] = 0
        mlp.up_proj.weight[index] = 0
        mlp.down_proj.weight[:, index] = 0
    torch.testing.assert_close(hooked, logits(model), rtol=0, atol=1e-5)


def test_silencing_beside_an_adapter_equals_zeroing_in_the_merged_model() -> None:
    wrapped = tiny.adapt(tiny.build())
    with silence(wrapped, CHOSEN):
        hooked = logits(wrapped)
    merged = wrapped.merge_and_unload()
    for layer, index in CHOSEN.items():
        merged.model.layers[layer].mlp.down_proj.weight[:, index] = 0
    torch.testing.assert_close(hooked, logits(merged), rtol=1e-4, atol=1e-4)


def test_scaling_equals_scaling_columns_of_down() -> None:
    model = tiny.build()
    factors = torch.tensor([0.5, -1.0, 3.0])
    with scale(model, {0: (CHOSEN[0], factors), 2: (CHOSEN[2], 1.7)}):
        hooked = logits(model)
    model.model.layers[0].mlp.down_proj.weight[:, CHOSEN[0]] *= factors
    model.model.layers[2].mlp.down_proj.weight[:, CHOSEN[2]] *= 1.7
    torch.testing.assert_close(hooked, logits(model), rtol=0, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    st.sets(st.integers(0, tiny.WIDTH - 1), min_size=1),
    st.integers(0, tiny.LAYERS - 1),
    st.sampled_from([0.25, 0.5, 2.0, 4.0]),
)
def test_the_algebra_of_scaling(neurons: set[int], layer: int, factor: float) -> None:
    model = tiny.build()
    index = torch.tensor(sorted(neurons))
    plain = logits(model)
    with scale(model, {layer: (index, factor)}), scale(model, {layer: (index, 1 / factor)}):
        assert torch.equal(logits(model), plain)  # powers of two are exact
    with scale(model, {layer: (index, 0.0)}):
        scaled = logits(model)
    with silence(model, {layer: index}):
        assert torch.equal(logits(model), scaled)
    with patch(model, {layer: (index, 0.0)}):
        assert torch.equal(logits(model), scaled)


def test_patching_in_a_neurons_own_values_changes_nothing_and_other_values_do() -> None:
    model = tiny.build()
    plain, seen = logits(model), []
    down = "model.layers.1.mlp.down_proj.weight"
    index = torch.tensor([3, 9])
    with capture(model, {input_of(down): lambda value: seen.append(value.clone())}):
        logits(model)
    with patch(model, {1: (index, seen[0][..., index])}):
        assert torch.equal(logits(model), plain)
    with (
        patch(model, {1: (index, torch.tensor([1.5, -2.0]))}),
        capture(model, {input_of(down): lambda value: seen.append(value.clone())}),
    ):
        assert not torch.allclose(logits(model), plain)
    assert torch.equal(seen[1][..., index], torch.tensor([1.5, -2.0]).expand(2, 6, 2))
    others = [i for i in range(tiny.WIDTH) if i not in (3, 9)]
    assert torch.equal(seen[1][..., others], seen[0][..., others])


@pytest.mark.parametrize("wrap", [False, True])
def test_captured_inputs_and_outputs_are_those_of_the_map(wrap: bool) -> None:
    model = tiny.build()
    model = tiny.adapt(model, targets=["q_proj"]) if wrap else model
    seen: dict[str, Tensor] = {}
    names = list(read_layout(model).linears)
    sites = {}
    for name in names:
        sites[input_of(name)] = lambda value, name=name: seen.__setitem__(f"in {name}", value)
        sites[output_of(name)] = lambda value, name=name: seen.__setitem__(f"out {name}", value)
    with capture(model, sites) as recorder:
        logits(model)
    assert set(recorder.calls.values()) == {1}
    assert recorder.silent == ()
    for name, linear in read_layout(model).linears.items():
        with torch.no_grad():
            torch.testing.assert_close(seen[f"out {name}"], linear.module(seen[f"in {name}"]))


def test_captured_block_outputs_are_the_residual_stream() -> None:
    model = tiny.build()
    seen: dict[int, Tensor] = {}
    sites = {block_output(i): lambda value, i=i: seen.__setitem__(i, value) for i in range(tiny.LAYERS)}
    with capture(model, sites), torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
    for layer in range(tiny.LAYERS - 1):
        assert torch.equal(seen[layer], hidden[layer + 1])
    torch.testing.assert_close(model.model.norm(seen[tiny.LAYERS - 1]), hidden[-1])


def test_a_site_that_never_ran_is_known() -> None:
    model = tiny.build()
    with capture(model, {block_output(0): lambda value: None}) as recorder:
        pass
    assert recorder.silent == (block_output(0),)


def test_captured_activations_carry_gradients() -> None:
    model = tiny.build().requires_grad_(True)
    seen: list[Tensor] = []
    with capture(model, {input_of("model.layers.0.mlp.down_proj.weight"): seen.append}):
        loss = model(IDS).logits.sum()
    (gradient,) = torch.autograd.grad(loss, seen)
    assert gradient.abs().sum() > 0


def test_a_module_that_returns_a_tuple_is_seen_by_its_first_part() -> None:
    module, site, seen = nn.GRU(4, 3), block_output(0), []
    handle = hooks._observe(module, site, seen.append, Recorder({site: 0}))
    output, _ = module(torch.ones(2, 1, 4))
    handle.remove()
    assert torch.equal(seen[0], output)


@pytest.mark.parametrize("name", EDITS)
def test_hooks_come_off(name: str) -> None:
    model = tiny.build()
    plain = logits(model)
    with EDITS[name](model):
        assert count_hooks(model) > 0
    assert count_hooks(model) == 0
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", EDITS)
def test_hooks_come_off_after_an_error(name: str) -> None:
    model = tiny.build()
    with pytest.raises(ZeroDivisionError), EDITS[name](model):
        raise ZeroDivisionError
    assert count_hooks(model) == 0


def test_an_error_in_a_callback_passes_through_and_leaves_nothing() -> None:
    model = tiny.build()

    def fail(value: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), capture(model, {block_output(1): fail}):
        logits(model)
    assert count_hooks(model) == 0


def test_nested_edits_come_off_one_by_one() -> None:
    model = tiny.build()
    plain = logits(model)
    with silence(model, CHOSEN):
        outer = logits(model)
        with silence(model, {1: torch.arange(tiny.WIDTH)}):
            assert not torch.allclose(logits(model), outer)
        assert torch.equal(logits(model), outer)
    assert torch.equal(logits(model), plain)
    assert count_hooks(model) == 0


@pytest.mark.parametrize(
    ("neurons", "error", "words"),
    [
        ({9: torch.tensor([0])}, UserError, "no layer 9"),
        ({0: torch.tensor([tiny.WIDTH])}, UserError, "neurons 0 to 23, not 24"),
        ({0: torch.tensor([-1])}, UserError, "not -1"),
        ({0: torch.tensor([1, 1])}, ValueError, "twice"),
        ({0: torch.tensor([1.0])}, ValueError, "integer"),
        ({0: torch.tensor([True])}, ValueError, "integer"),
        ({0: torch.tensor([[1]])}, ValueError, "flat"),
    ],
)
def test_neurons_that_are_not_there_are_refused(
    neurons: dict[int, Tensor], error: type[Exception], words: str
) -> None:
    model = tiny.build()
    with pytest.raises(error, match=words), silence(model, {1: torch.tensor([0]), **neurons}):
        pass
    assert count_hooks(model) == 0


def test_a_misspelt_site_is_answered_with_the_nearest() -> None:
    with (
        pytest.raises(UserError, match=r"did you mean 'model\.layers\.1\.mlp\.down_proj\.weight'"),
        capture(tiny.build(), {input_of("model.layers.1.mlp.down_prj.weight"): lambda value: None}),
    ):
        pass


@pytest.mark.parametrize("edit", [scale, patch])
def test_values_that_do_not_fit_are_refused(edit: Callable[..., AbstractContextManager[None]]) -> None:
    with pytest.raises(ValueError), edit(tiny.build(), {0: (torch.tensor([1, 2]), torch.ones(3))}):
        pass


def test_silencing_nobody_changes_nothing() -> None:
    model = tiny.build()
    plain = logits(model)
    with silence(model, {0: torch.tensor([])}):
        assert torch.equal(logits(model), plain)
