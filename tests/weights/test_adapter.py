import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from resafe.errors import UserError
from resafe.weights.adapter import WEIGHTS, Adapter, open_model
from resafe.weights.checkpoint import ADAPTER_CONFIG, Checkpoint
from tests.model import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    settings = tiny.config("llama")
    settings.tie_word_embeddings = False
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder, max_shard_size="8KB")
    return folder


def trained(folder: Path, base: Path, config: LoraConfig) -> Path:
    """Save an adapter of which no parameter is zero."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def lora(**settings: object) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    )


PLAIN = {
    "plain": {},
    "alpha is not a multiple of r": {"r": 3, "lora_alpha": 7},
    "rank-stabilised": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}},
    "alpha pattern": {"alpha_pattern": {"down_proj": 3, "model.layers.2.self_attn.o_proj": 1}},
    "patterns with regexes": {
        "rank_pattern": {r"layers\.(0|2)\.mlp\.\w+": 3, "^model.layers.1.self_attn.k_proj": 1},
        "alpha_pattern": {r".*\.v_proj": 5},
        "use_rslora": True,
    },
    "the first of two patterns": {"rank_pattern": {"mlp.up_proj": 2, "up_proj": 5}},
    "a pattern matches whole names": {"rank_pattern": {"proj": 2, "p_proj": 3}, "alpha_pattern": {"proj": 1}},
    "some modules only": {"target_modules": ["q_proj", "down_proj"]},
    "some layers only": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "whole modules saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", PLAIN)
def test_the_view_equals_what_peft_merges(tmp_path: Path, base: Path, case: str) -> None:
    folder = trained(tmp_path / "adapter", base, lora(**PLAIN[case]))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload().state_dict()
    dense = Checkpoint.open(base)
    view = open_model(folder)
    assert isinstance(view, Adapter)
    assert view.names == dense.names
    assert set(view.names) == set(merged)
    changed = {name for name in dense.names if not torch.equal(dense.tensor(name), merged[name])}
    assert changed == {*view.modules, *view.replaced}
    for name in view.names:
        torch.testing.assert_close(view.tensor(name), merged[name], rtol=0, atol=1e-6)


def test_transposed_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "gpt2")
    config = lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    folder = trained(tmp_path / "adapter", tmp_path / "gpt2", config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload().state_dict()
    view = Adapter.open(folder)
    assert len(view.modules) == 2
    for name in view.modules:
        torch.testing.assert_close(view.tensor(name), merged[name], rtol=0, atol=1e-6)


REFUSED = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "bias": ({"bias": "lora_only"}, "trains biases"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "pissa"),
    "OLoRA": ({"init_lora_weights": "olora"}, "olora"),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, "lora_embedding"),
    "parameters": (
        {"target_modules": ["q_proj"], "target_parameters": ["o_proj.weight"]},
        "target_parameters",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_relatives_of_lora_are_refused_by_name(tmp_path: Path, base: Path, case: str) -> None:
    settings, words = REFUSED[case]
    folder = trained(tmp_path / "adapter", base, lora(**settings))
    with pytest.raises(UserError, match=words):
        Adapter.open(folder)


def test_another_kind_of_adapter_is_refused_by_name(tmp_path: Path, base: Path) -> None:
    config = VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="is a VERA adapter"):
        Adapter.open(trained(tmp_path / "adapter", base, config))


@pytest.mark.parametrize("setting", ["loftq", "corda", "lora_ga", "PiSSA_niter_4"])
def test_starts_that_move_the_base_are_refused(tmp_path: Path, base: Path, setting: str) -> None:
    folder = trained(tmp_path / "adapter", base, lora())
    change(folder, init_lora_weights=setting)
    with pytest.raises(UserError, match=setting.lower()):
        Adapter.open(folder)


@pytest.mark.parametrize("setting", [True, "gaussian", "eva", "orthogonal", False])
def test_starts_that_leave_the_base_alone_are_not(tmp_path: Path, base: Path, setting: object) -> None:
    folder = trained(tmp_path / "adapter", base, lora())
    change(folder, init_lora_weights=setting)
    assert Adapter.open(folder).modules


def change(folder: Path, **settings: object) -> None:
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def rewrite(folder: Path, edit: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = next(k for k in tensors if k.endswith("up_proj.lora_B.weight"))
    if edit == "half":
        del tensors[key]
    elif edit == "rank":
        tensors[key] = tensors[key][:, :-1].contiguous()
    elif edit == "shape":
        tensors[key] = tensors[key][:-1].contiguous()
    elif edit == "stranger":
        tensors = {k.replace("up_proj", "sideways_proj"): v for k, v in tensors.items()}
    elif edit == "nothing":
        tensors = {"base_model.model.lm_head.weight": torch.ones(2)}
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ("half", "only one of the two factors of model.layers.0.mlp.up_proj"),
        ("rank", "differ in rank"),
        ("shape", "another shape"),
        ("stranger", "does not have"),
        ("nothing", "no LoRA factor"),
    ],
)
def test_factors_that_do_not_fit(tmp_path: Path, base: Path, edit: str, words: str) -> None:
    folder = trained(tmp_path / "adapter", base, lora())
    rewrite(folder, edit)
    with pytest.raises(UserError, match=words):
        assert Adapter.open(folder).base


@pytest.mark.parametrize(
    "settings", [{"r": 5}, {"r": None}, {"lora_alpha": None}, {"rank_pattern": {"(": 2}}]
)
def test_settings_that_contradict_the_factors(tmp_path: Path, base: Path, settings: dict) -> None:
    folder = trained(tmp_path / "adapter", base, lora())
    change(folder, **settings)
    adapter = Adapter.open(folder)
    with pytest.raises(UserError, match="adapter"):
        adapter.scale(adapter.modules[0])


def test_a_pickled_adapter_is_refused(tmp_path: Path, base: Path) -> None:
    folder = trained(tmp_path / "adapter", base, lora())
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled"):
        Adapter.open(folder)


def test_a_base_beside_the_adapter_is_found(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "llama").symlink_to(base)
    folder = trained(tmp_path / "models" / "adapter", base, lora())
    change(folder, base_model_name_or_path="../llama")
    monkeypatch.chdir(tmp_path / "models" / "adapter")
    assert Adapter.open(Path()).base.folder == base.resolve()
    monkeypatch.chdir("/")
    assert Adapter.open(folder).base.folder == base.resolve()


def test_a_missing_base_is_named(tmp_path: Path, base: Path) -> None:
    folder = trained(tmp_path / "adapter", base, lora())
    change(folder, base_model_name_or_path="/nowhere/llama")
    with pytest.raises(UserError, match="the base model '/nowhere/llama' of the adapter"):
        assert Adapter.open(folder).base
