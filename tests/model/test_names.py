"""From a neuron to its checkpoint entries: each exactly once, whichever way the checkpoint stores them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resafe.errors import UserError
from resafe.model.layout import read_layout
from resafe.model.names import Place, Places, places
from resafe.weights.checkpoint import Checkpoint
from tests.architectures import tiny

from . import tiny as dense


def saved(architecture: str, folder: Path, **how: bool) -> Checkpoint:
    tiny(architecture).save_pretrained(folder, **how)
    return Checkpoint.open(folder)


def value(view: Checkpoint, place: Place) -> torch.Tensor:
    return view.tensor(place.key)[place.slices]


def test_places_of_a_dense_neuron() -> None:
    assert set(places(dense.build()).of("model.layers.2.mlp", None, 7)) == {
        Place("model.layers.2.mlp.gate_proj.weight", "gate", (7, None)),
        Place("model.layers.2.mlp.up_proj.weight", "up", (7, None)),
        Place("model.layers.2.mlp.down_proj.weight", "down", (None, 7)),
    }


def test_an_adapter_changes_no_places() -> None:
    assert places(dense.adapt(dense.build())).shares == places(dense.build()).shares


def test_a_neuron_of_an_interleaved_expert_has_two_columns_and_two_biases() -> None:
    found = places(tiny("gpt_oss")).of("model.layers.1.mlp.experts", 2, 5)
    at = {(place.role, place.key.rpartition(".")[2]): place.at for place in found}
    assert at == {
        ("gate", "gate_up_proj"): (2, None, 10),
        ("up", "gate_up_proj"): (2, None, 11),
        ("gate bias", "gate_up_proj_bias"): (2, 10),
        ("up bias", "gate_up_proj_bias"): (2, 11),
        ("down", "down_proj"): (2, 5, None),
    }


@pytest.mark.parametrize(
    "architecture", ["mixtral", "deepseek_v3", "gpt_oss", "dbrx", "phi3", "gpt2", "bloom"]
)
def test_every_entry_of_every_tensor_with_neurons_belongs_to_one_neuron(
    architecture: str, tmp_path: Path
) -> None:
    view = saved(architecture, tmp_path)
    found = places(tiny(architecture), view)
    counts = {key: torch.zeros(view.info(key).shape, dtype=torch.long) for key in found.tensors}
    for part in found.parts.values():
        for expert in (None,) if part.experts is None else range(part.experts):
            for neuron in range(part.width):
                for place in found.of(part.name, expert, neuron):
                    counts[place.key][place.slices] += 1
    assert all(bool((count == 1).all()) for count in counts.values())
    matrices = {matrix.weight for part in found.parts.values() for matrix in part.matrices}
    assert len(found.tensors) >= len(matrices)


def test_places_hold_the_models_own_weights(tmp_path: Path) -> None:
    model, view = tiny("mixtral"), saved("mixtral", tmp_path)
    part = read_layout(model).parts[1]
    for expert, neuron in ((0, 0), (3, 23)):
        for place in places(model, view).of(part.name, expert, neuron):
            matrix = {"gate": part.gate, "up": part.up, "down": part.down}[place.role]
            assert torch.equal(value(view, place), matrix.vectors()[expert, neuron])


def test_a_checkpoint_of_fused_experts_is_read_by_its_own_names(tmp_path: Path) -> None:
    model = tiny("mixtral")
    split = places(model, saved("mixtral", tmp_path / "split"))
    fused = places(model, saved("mixtral", tmp_path / "fused", save_original_format=False))
    assert not set(split.tensors) & set(fused.tensors)
    assert fused.tensors[0].endswith(".experts.down_proj")
    for name in ("split", "fused"):
        view = Checkpoint.open(tmp_path / name)
        found = places(model, view).of("model.layers.0.mlp.experts", 1, 4)
        down = next(place for place in found if place.role == "down")
        assert torch.equal(value(view, down), model.model.layers[0].mlp.experts.down_proj[1, :, 4])


def test_a_checkpoint_that_is_turned_on_loading_is_read_as_it_lies(tmp_path: Path) -> None:
    model, view = tiny("qwen3_vl_moe"), saved("qwen3_vl_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    turned = {n: t.mT.contiguous() if ".experts." in n else t for n, t in load_file(file).items()}
    straight = places(model, view)
    save_file(turned, file, metadata={"format": "pt"})
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    part = read_layout(model).parts[0]
    experts = part.module.down_proj
    assert torch.equal(read_layout(again).parts[0].module.down_proj, experts)  # transformers turned it back
    lying = Checkpoint.open(tmp_path)
    for found, where in ((straight, (1, None, 3)), (places(again, lying), (1, 3, None))):
        (down,) = [place for place in found.of(part.name, 1, 3) if place.role == "down"]
        assert down.at == where
    assert torch.equal(value(lying, down), experts[1, :, 3])


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    view = saved("llama", tmp_path)
    with pytest.raises(UserError, match="does not hold the tensors in which MixtralForCausalLM keeps"):
        places(tiny("mixtral"), view)


@pytest.mark.parametrize(
    ("part", "expert", "neuron", "words"),
    [
        ("model.layers.9.mlp", None, 0, "no feed-forward part"),
        ("model.layers.0.mlp", None, 24, "neurons 0 to 23, not 24"),
        ("model.layers.0.mlp", None, -1, "not -1"),
        ("model.layers.0.mlp", 0, 0, "no experts"),
    ],
)
def test_a_neuron_that_is_not_there_is_refused(
    part: str, expert: int | None, neuron: int, words: str
) -> None:
    found: Places = places(dense.build())
    with pytest.raises(UserError, match=words):
        found.of(part, expert, neuron)


@pytest.mark.parametrize("expert", [None, -1, 4])
def test_an_expert_that_is_not_there_is_refused(expert: int | None) -> None:
    with pytest.raises(UserError, match="has 4 experts"):
        places(tiny("mixtral")).of("model.layers.0.mlp.experts", expert, 0)
