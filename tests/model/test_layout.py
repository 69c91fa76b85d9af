from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, MixtralConfig, Phi3Config

from resafe.errors import UserError
from resafe.model.layout import linear_names, read_layout
from resafe.model.names import places
from resafe.weights.checkpoint import Checkpoint

from . import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_names_are_all_matrices_of_the_blocks_in_the_checkpoint(folders: Path, family: str) -> None:
    view = Checkpoint.open(folders / family)
    stored = {name: view.info(name).shape for name in view.names if ".layers." in name}
    matrices = {name: shape for name, shape in stored.items() if len(shape) == 2}
    layout = read_layout(tiny.build(family))
    assert {name: linear.shape for name, linear in layout.linears.items()} == matrices
    assert len(matrices) == 7 * tiny.LAYERS
    assert layout.coverage.to_dict() == {
        "layers": tiny.LAYERS,
        "parts": tiny.LAYERS,
        "experts": 0,
        "matrices": 3 * tiny.LAYERS,
        "neurons": tiny.LAYERS * tiny.WIDTH,
    }


def test_blocks_are_in_order_and_hold_their_modules() -> None:
    model = tiny.build()
    layout = read_layout(model)
    for index, block in enumerate(layout):
        assert block.index == index
        assert block.module is model.model.layers[index]
        (part,) = block.parts
        assert (part.name, part.layer, part.shape) == (f"model.layers.{index}.mlp", index, (tiny.WIDTH,))
        assert part.down.module is model.model.layers[index].mlp.down_proj
        assert part.gate is not None
        assert part.gate.weight == f"model.layers.{index}.mlp.gate_proj.weight"
    assert layout.parts == tuple(part for block in layout for part in block.parts)


@pytest.mark.parametrize("wrap", [False, True])
def test_a_neurons_column_is_what_down_writes_for_it_alone(wrap: bool) -> None:
    model = tiny.adapt(tiny.build()) if wrap else tiny.build()
    for part in read_layout(model).parts:
        with torch.no_grad():
            written = part.down.module(torch.eye(tiny.WIDTH))
        torch.testing.assert_close(part.down_columns(), written)
        torch.testing.assert_close(part.down_norms(), written.norm(dim=1))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["down_proj", "gate_proj"]])
def test_an_adapter_changes_modules_but_no_names(targets: str | list[str]) -> None:
    plain = linear_names(tiny.build())
    wrapped = linear_names(tiny.adapt(tiny.build(), targets=targets))
    assert list(wrapped) == list(plain)
    changed = {name for name in plain if type(wrapped[name]) is not type(plain[name])}
    wanted = plain if targets == "all-linear" else [n for n in plain if n.split(".")[-2] in targets]
    assert changed == set(wanted)


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="no layer 7.*layers 0 to 2"):
        read_layout(tiny.build())[7]


@pytest.mark.parametrize(("config", "named"), [(Phi3Config, "gate_up_proj"), (MixtralConfig, "mlp")])
def test_other_blocks_are_refused_by_name(config: type, named: str) -> None:
    sizes = {key: value for key, value in tiny.config("llama").to_dict().items() if key.endswith("_size")}
    settings = config(
        **sizes,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        num_local_experts=2,
    )
    model = AutoModelForCausalLM.from_config(settings)
    with pytest.raises(UserError, match=named):
        _ = read_layout(model).linears


def test_blocks_of_another_kind_have_no_llama_names() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    with pytest.raises(UserError, match="of GPT2LMHeadModel holds"):
        _ = read_layout(model).linears


def test_one_strange_matrix_in_one_block_is_refused() -> None:
    model = tiny.build()
    model.model.layers[1].mlp.extra = nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.extra"):
        read_layout(model)


def test_a_missing_matrix_is_refused() -> None:
    model = tiny.build()
    del model.model.layers[2].mlp.gate_proj
    with pytest.raises(UserError, match=r"model\.layers\.2 .*no mlp\.gate_proj"):
        _ = read_layout(model).linears


def test_a_known_name_on_a_module_of_another_kind_is_refused() -> None:
    model = tiny.build()
    model.model.layers[0].mlp.up_proj = nn.Embedding(tiny.WIDTH, tiny.HIDDEN)
    with pytest.raises(UserError, match=r"mlp\.up_proj"):
        read_layout(model)


def test_neurons_that_do_not_match_are_refused() -> None:
    model = tiny.build()
    model.model.layers[0].mlp.up_proj = nn.Linear(tiny.HIDDEN, tiny.WIDTH + 1, bias=False)
    with pytest.raises(UserError, match="do not share their neurons"):
        read_layout(model)


def test_a_block_matrix_that_an_adapter_replaces_whole_is_refused() -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    wrapped = get_peft_model(tiny.build(), settings)
    with pytest.raises(UserError, match="down_proj"):
        read_layout(wrapped)


def test_reading_a_layout_changes_nothing() -> None:
    model = tiny.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    read_layout(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_of_four_bits_are_read_as_numbers_and_have_no_places(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny.build()
    model.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, device_map={"": "cpu"}
    )
    for own, part in zip(read_layout(model).parts, read_layout(packed).parts, strict=True):
        assert part.shape == own.shape
        near, true = part.down_norms(), own.down_norms()
        assert 0 < (near - true).abs().max() < 0.2 * true.mean()
    with pytest.raises(UserError, match="not quantised"):
        places(packed)


def test_weights_whose_scales_are_elsewhere_are_refused() -> None:
    model = tiny.build().to(torch.float8_e4m3fn)
    with pytest.raises(UserError, match=r"mlp\.down_proj\.weight is stored as torch\.float8_e4m3fn"):
        read_layout(model).parts[0].down_norms()
