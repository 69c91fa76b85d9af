from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resafe.errors import UserError
from resafe.model import hooks
from resafe.model.hooks import (
    block_input,
    block_output,
    capture,
    capture_neurons,
    input_of,
    output_of,
    patch,
    scale,
    silence,
)
from resafe.model.layout import read_layout

from . import tiny

IDS = torch.tensor([[1, 4, 9, 11, 12, 5], [1, 4, 20, 21, 22, 5]])


def part(layer: int) -> str:
    return f"model.layers.{layer}.mlp"


def mask(*index: int) -> Tensor:
    return torch.zeros(tiny.WIDTH, dtype=torch.bool).index_fill(
        0, torch.tensor(index, dtype=torch.long), True
    )


def factors(index: Sequence[int], factor: float | Tensor) -> Tensor:
    row = torch.ones(tiny.WIDTH)
    row[list(index)] = factor
    return row


INDEX = {0: [0, 5, 23], 2: [7]}
CHOSEN = {part(layer): mask(*index) for layer, index in INDEX.items()}
EDITS: dict[str, Callable[[nn.Module], AbstractContextManager[object]]] = {
    "silence": lambda model: silence(model, CHOSEN),
    "scale": lambda model: scale(model, {part(0): factors([1, 2], 0.5)}),
    "patch": lambda model: patch(model, {part(1): mask(3)}, {part(1): torch.full((tiny.WIDTH,), 2.0)}),
    "capture": lambda model: capture(model, {block_output(0): lambda value: None}),
    "capture neurons": lambda model: capture_neurons(model, [(part(0), "gate")], lambda seen: None),
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
    for layer, index in INDEX.items():
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
    for layer, index in INDEX.items():
        merged.model.layers[layer].mlp.down_proj.weight[:, index] = 0
    torch.testing.assert_close(hooked, logits(merged), rtol=1e-4, atol=1e-4)


def test_scaling_equals_scaling_columns_of_down() -> None:
    model = tiny.build()
    three = torch.tensor([0.5, -1.0, 3.0])
    with scale(model, {part(0): factors(INDEX[0], three), part(2): factors(INDEX[2], 1.7)}):
        hooked = logits(model)
    model.model.layers[0].mlp.down_proj.weight[:, INDEX[0]] *= three
    model.model.layers[2].mlp.down_proj.weight[:, INDEX[2]] *= 1.7
    torch.testing.assert_close(hooked, logits(model), rtol=0, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    st.sets(st.integers(0, tiny.WIDTH - 1), min_size=1),
    st.integers(0, tiny.LAYERS - 1),
    st.sampled_from([0.25, 0.5, 2.0, 4.0]),
)
def test_the_algebra_of_scaling(neurons: set[int], layer: int, factor: float) -> None:
    model = tiny.build()
    index, name = sorted(neurons), part(layer)
    plain = logits(model)
    with scale(model, {name: factors(index, factor)}), scale(model, {name: factors(index, 1 / factor)}):
        assert torch.equal(logits(model), plain)  # powers of two are exact
    with scale(model, {name: factors(index, 0.0)}):
        scaled = logits(model)
    with silence(model, {name: mask(*index)}):
        assert torch.equal(logits(model), scaled)
    with patch(model, {name: mask(*index)}, {name: torch.zeros(tiny.WIDTH)}):
        assert torch.equal(logits(model), scaled)


def test_patching_in_a_neurons_own_values_changes_nothing_and_other_values_do() -> None:
    model = tiny.build()
    plain, seen = logits(model), []
    name, index = part(1), [3, 9]
    with capture_neurons(model, [(name, "ffn")], lambda s: seen.append(s.values.clone())):
        logits(model)
    with patch(model, {name: mask(*index)}, {name: seen[0]}):
        assert torch.equal(logits(model), plain)
    new = factors(index, torch.tensor([1.5, -2.0]))
    with (
        patch(model, {name: mask(*index)}, {name: new}),
        capture_neurons(model, [(name, "ffn")], lambda s: seen.append(s.values.clone())),
    ):
        assert not torch.allclose(logits(model), plain)
    assert torch.equal(seen[1][..., index], torch.tensor([1.5, -2.0]).expand(2, 6, 2))
    others = [i for i in range(tiny.WIDTH) if i not in index]
    assert torch.equal(seen[1][..., others], seen[0][..., others])


@pytest.mark.parametrize("wrap", [False, True])
def test_what_is_seen_of_a_part_is_what_its_maps_compute(wrap: bool) -> None:
    model = tiny.adapt(tiny.build()) if wrap else tiny.build()
    seen: dict[str, Tensor] = {}
    places = [(part(1), where) for where in ("input", "gate", "up", "ffn")]
    with capture_neurons(model, places, lambda s: seen.__setitem__(s.where, s.values)), torch.no_grad():
        model(IDS)
    mlp = (model.get_base_model() if wrap else model).model.layers[1].mlp
    with torch.no_grad():
        torch.testing.assert_close(seen["gate"], mlp.gate_proj(seen["input"]))
        torch.testing.assert_close(seen["up"], mlp.up_proj(seen["input"]))
    torch.testing.assert_close(seen["ffn"], mlp.act_fn(seen["gate"]) * seen["up"])


def test_what_enters_a_block_is_what_the_one_before_it_left() -> None:
    model, seen = tiny.build(), {}
    sites = {
        site: lambda v, site=site: seen.__setitem__(site, v) for site in (block_output(0), block_input(1))
    }
    with capture(model, sites):
        logits(model)
    assert torch.equal(seen[block_output(0)], seen[block_input(1)])


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
    with capture_neurons(model, [(part(0), "ffn")], lambda s: seen.append(s.values)):
        loss = model(IDS).logits.sum()
    (gradient,) = torch.autograd.grad(loss, seen)
    assert gradient.abs().sum() > 0


def test_a_module_that_returns_a_tuple_is_seen_by_its_first_part() -> None:
    module, seen = nn.GRU(4, 3), []
    handle = hooks._after(module, seen.append)
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
        with silence(model, {part(1): torch.ones(tiny.WIDTH, dtype=torch.bool)}):
            assert not torch.allclose(logits(model), outer)
        assert torch.equal(logits(model), outer)
    assert torch.equal(logits(model), plain)
    assert count_hooks(model) == 0


@pytest.mark.parametrize(
    ("name", "operand", "error", "words"),
    [
        ("model.layers.9.mlp", mask(0), UserError, r"no feed-forward part.*did you mean 'model\.layers"),
        (part(0), torch.ones(tiny.WIDTH + 1, dtype=torch.bool), UserError, r"shape \(24,\), not \(25,\)"),
        (part(0), torch.ones(tiny.WIDTH), ValueError, "mask"),
    ],
)
def test_neurons_that_are_not_there_are_refused(
    name: str, operand: Tensor, error: type[Exception], words: str
) -> None:
    model = tiny.build()
    with pytest.raises(error, match=words), silence(model, {part(1): mask(0), name: operand}):
        pass
    assert count_hooks(model) == 0


def test_a_misspelt_site_is_answered_with_the_nearest() -> None:
    with (
        pytest.raises(UserError, match=r"did you mean 'model\.layers\.1\.mlp\.down_proj\.weight'"),
        capture(tiny.build(), {input_of("model.layers.1.mlp.down_prj.weight"): lambda value: None}),
    ):
        pass


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="shape"), scale(tiny.build(), {part(0): torch.ones(3)}):
        pass
    with (
        pytest.raises(UserError, match="shape"),
        patch(tiny.build(), {part(0): mask(1)}, {part(0): torch.ones(3)}),
    ):
        pass


def test_silencing_nobody_changes_nothing() -> None:
    model = tiny.build()
    plain = logits(model)
    with silence(model, {part(0): mask()}):
        assert torch.equal(logits(model), plain)
