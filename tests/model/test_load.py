from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from resafe.errors import UserError
from resafe.model import load as loading
from resafe.model.chat import encode
from resafe.model.generate import generate
from resafe.model.layout import read_layout
from tests import architectures

from . import tiny

load = partial(loading.load, device="cpu")  # also where there is an accelerator

IDS = torch.tensor([[1, 4, 9, 11, 12, 5]])


def copy(folders: Path, tmp_path: Path, name: str = "llama") -> Path:
    return Path(shutil.copytree(folders / name, tmp_path / name))


def change_json(file: Path, **settings: object) -> None:
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | settings))


def change_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_dense_folder_gives_the_saved_model(folders: Path, family: str) -> None:
    loaded = load(folders / family)
    assert torch.equal(loaded.model(IDS).logits, tiny.build(family)(IDS).logits)
    assert loaded.source == str(folders / family)
    assert loaded.device == torch.device("cpu")
    assert loaded.chat_template == "chat"
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_an_adapter_is_wrapped_or_merged_and_says_the_same(folders: Path) -> None:
    base = load(folders / "llama").model(IDS).logits
    beside, merged = load(folders / "adapter"), load(folders / "adapter", merge=True)
    assert isinstance(beside.model, PeftModel)
    assert not isinstance(merged.model, PeftModel)
    assert not beside.model.training
    assert not any(parameter.requires_grad for parameter in beside.model.parameters())
    wanted = tiny.adapt(tiny.build())(IDS).logits
    assert (wanted - base).abs().max() > 0.1
    assert torch.equal(beside.model(IDS).logits, wanted)
    torch.testing.assert_close(merged.model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_merging_is_done_in_float32_whatever_the_type_wanted(folders: Path) -> None:
    half = load(folders / "adapter", merge=True, dtype="bfloat16").model
    full = load(folders / "adapter", merge=True).model
    assert half.dtype == torch.bfloat16
    for name, weight in full.state_dict().items():
        assert torch.equal(half.state_dict()[name], weight.bfloat16()), name


def test_the_type_is_float32_on_the_cpu_unless_named(folders: Path, tmp_path: Path) -> None:
    tiny.build().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tiny.tokenizer().save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half").model.dtype == torch.float32
    assert load(tmp_path / "half", dtype="bfloat16").model.dtype == torch.bfloat16
    assert load(folders / "llama", dtype="float16").model.dtype == torch.float16


def test_the_adapters_own_tokenizer_counts_before_the_bases(folders: Path, tmp_path: Path) -> None:
    folder = copy(folders, tmp_path, "adapter")
    assert load(folder).chat_template == "chat"
    tiny.tokenizer(template=None).save_pretrained(folder)
    assert load(folder).chat_template == "none"


def test_a_pad_token_is_always_there(folders: Path, tmp_path: Path) -> None:
    folder = copy(folders, tmp_path)
    for file in folder.glob("*token*"):
        file.unlink()
    tiny.tokenizer(pad=False).save_pretrained(folder)
    tokenizer = load(folder).tokenizer
    assert tokenizer.pad_token == "<eos>"
    assert tokenizer.pad_token_id == 2


def test_a_type_or_device_that_does_not_exist_is_refused(folders: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'float32'"):
        load(folders / "llama", dtype="flaot32")
    with pytest.raises(UserError, match="no device 'gpu'"):
        load(folders / "llama", device="gpu")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}},
            "code that comes with the checkpoint",
        ),
        ({"model_type": "mine"}, "'mine', which the installed transformers does not know"),
        ({"model_type": "t5"}, "no causal language model"),
    ],
)
def test_a_config_that_cannot_be_loaded_as_it_is_is_refused(
    folders: Path, tmp_path: Path, settings: dict[str, object], words: str
) -> None:
    folder = copy(folders, tmp_path)
    change_json(folder / "config.json", **settings)
    with pytest.raises(UserError, match=words):
        load(folder)


def test_foreign_code_is_never_run(folders: Path, tmp_path: Path) -> None:
    folder = copy(folders, tmp_path)
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change_json(
        folder / "config.json", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}
    )
    load(folder)  # a model that transformers knows itself is loaded by its own code
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_config_tokenizer_or_weights_is_refused(folders: Path, tmp_path: Path) -> None:
    folder = copy(folders, tmp_path)
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load(folder)


def test_a_weight_that_is_missing_is_not_made_up(folders: Path, tmp_path: Path) -> None:
    folder = copy(folders, tmp_path)
    gone = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder / "model.safetensors", lambda tensors: tensors.pop(gone))
    with pytest.raises(UserError, match=rf"1 missing keys, first {gone}"):
        load(folder)


def test_a_weight_of_another_shape_is_refused(folders: Path, tmp_path: Path) -> None:
    folder = copy(folders, tmp_path)
    change_json(folder / "config.json", intermediate_size=tiny.WIDTH + 8)
    with pytest.raises(UserError, match="does not fit its own config"):
        load(folder)


def test_a_weight_that_nothing_uses_is_refused(folders: Path, tmp_path: Path) -> None:
    folder = copy(folders, tmp_path)
    extra = {"model.layers.9.mlp.up_proj.weight": torch.ones(tiny.WIDTH, tiny.HIDDEN)}
    change_weights(folder / "model.safetensors", lambda tensors: tensors.update(extra))
    with pytest.raises(UserError, match=r"1 unexpected keys, first model\.layers\.9"):
        load(folder)


def test_an_adapter_whose_tensors_have_no_place_is_refused(folders: Path, tmp_path: Path) -> None:
    folder = copy(folders, tmp_path, "adapter")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1.mlp.up_proj." in name]:
            tensors[name.replace(".layers.1.", ".layers.8.")] = tensors.pop(name)

    change_weights(folder / "adapter_model.safetensors", rename)
    with pytest.raises(UserError, match=r"2 of its \d+ tensors have no place and 2 are absent.*layers\.8"):
        load(folder)


def test_an_adapter_of_another_width_is_refused(folders: Path, tmp_path: Path) -> None:
    settings = tiny.config("llama")
    settings.intermediate_size = tiny.WIDTH + 8
    base = tmp_path / "wide"
    type(tiny.build())(settings).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    folder = copy(folders, tmp_path, "adapter")
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    with pytest.raises(UserError, match="does not fit its base"):
        load(folder)


def test_an_adapter_without_its_base_is_refused(folders: Path, tmp_path: Path) -> None:
    folder = copy(folders, tmp_path, "adapter")
    change_json(folder / "adapter_config.json", base_model_name_or_path="./gone")
    with pytest.raises(UserError, match="gone"):
        load(folder)


@pytest.mark.parametrize("shown", [True, False])
def test_loading_is_silent_and_leaves_the_progress_bars_as_they_were(
    folders: Path, capfd: pytest.CaptureFixture[str], shown: bool
) -> None:
    before = transformers_logging.is_progress_bar_enabled()
    (transformers_logging.enable_progress_bar if shown else transformers_logging.disable_progress_bar)()
    try:
        capfd.readouterr()
        load(folders / "llama")
        assert "Loading weights" not in capfd.readouterr().err
        assert transformers_logging.is_progress_bar_enabled() == shown
    finally:
        (transformers_logging.enable_progress_bar if before else transformers_logging.disable_progress_bar)()


@pytest.mark.parametrize("name", [*tiny.FAMILIES, "adapter"])
def test_the_tokenizer_is_the_saved_one(folders: Path, name: str) -> None:
    loaded, text = load(folders / name).tokenizer, "how do i bake a cake w1 strange"
    assert loaded(text)["input_ids"] == tiny.tokenizer()(text)["input_ids"]


def test_a_tokenizer_that_needs_foreign_code_is_refused(folders: Path, tmp_path: Path) -> None:
    folder = copy(folders, tmp_path)
    (folder / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="needs code that comes with it"):
        load(folder)


@pytest.mark.parametrize("architecture", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_vision_language_model_answers_text(architecture: str, tmp_path: Path) -> None:
    architectures.tiny(architecture).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype="float32")
    prompts = ["how do i bake a cake", "yes", "open the door w1 w2 w3 rain"]
    for prompt, answer in zip(prompts, generate(loaded, prompts, 5), strict=True):
        ids = encode(loaded.tokenizer, [prompt])[0]
        for token in answer.token_ids:
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert int(logits.argmax()) == token
            ids.append(token)
    assert {part.layer for part in read_layout(loaded.model).parts} == {0, 1}
