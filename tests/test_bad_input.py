"""Whatever the user gets wrong: one sentence on stderr, exit code 2, no traceback, nothing written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Ended, contents, fresh
from tests.model import tiny
from tests.repair import world

Command = Callable[..., Ended]
RESET = ("--method", "reset", "--strength", "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def root(models: Path, tmp_path: Path) -> Path:
    """Copies that a test may damage, and some that it may not."""
    for name in ("tuned", "aligned", "sharded", "fresh"):
        shutil.copytree(models / name, tmp_path / name)
        (tmp_path / name / "README.md").unlink(missing_ok=True)
    for name in ("base", "continued", "aligned-adapter"):
        (tmp_path / name).symlink_to(models / name)
    return tmp_path


def refused(ended: Ended, words: str) -> None:
    """Check that a command ended with one sentence that holds ``words``."""
    lines = ended.err.splitlines()
    assert ended.code == 2, ended.err
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("resafe: ")
    assert re.search(words, lines[0]), lines[0]
    assert ended.out == ""


def check(command: Command, root: Path, words: str, *arguments: object) -> None:
    """Check that ``repair`` refuses, and that not a file more or less is there afterwards."""
    before = everything(root)
    refused(command("repair", *arguments, cwd=root), words)
    assert everything(root) == before


def everything(root: Path) -> dict[str, object]:
    return {**contents(root), **{str(path): path.is_dir() for path in root.rglob("*")}}


def damage(file: Path, name: str, value: float) -> None:
    tensors = load_file(file)
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, {"format": "pt"})


def test_folders_that_hold_no_model(command: Command, root: Path) -> None:
    (root / "empty").mkdir()
    (root / "note.txt").write_text("x")
    (root / "other").mkdir()
    (root / "other" / "note.txt").write_text("x")
    check(command, root, "not a folder", "./missing")
    check(command, root, "is empty", "./empty")
    check(command, root, "is a file", "./note.txt")
    check(command, root, "holds neither model.safetensors", "./other")
    check(command, root, "not a folder", "./tuned", "--aligned", "./missing")
    check(command, root, "is empty", "./tuned", "--aligned", "./aligned", "--base", "./empty", *RESET)
    check(command, root, "no folder here|neither a folder here", "nobody/at-all")


def test_a_fresh_interpreter_says_it_the_same_way(root: Path) -> None:
    refused(fresh(["repair", "./missing"], root), "not a folder")


def test_pickles(command: Command, root: Path) -> None:
    (root / "tuned" / "model.safetensors").unlink()
    torch.save({"w": torch.ones(2)}, root / "tuned" / "pytorch_model.bin")
    check(command, root, "only pickled weights", "tuned", "--aligned", "aligned", *RESET)
    (root / "fresh" / "adapter_model.safetensors").rename(root / "fresh" / "adapter_model.bin")
    check(command, root, "only a pickled adapter", "fresh", *RESET)


def test_damaged_files(command: Command, root: Path) -> None:
    shards = sorted((root / "sharded").glob("*.safetensors"))
    whole = shards[1].read_bytes()
    arguments = ("sharded", "--aligned", "aligned", *RESET)
    shards[1].write_bytes(whole[:-5])
    check(command, root, rf"{shards[1].name} is truncated", *arguments)
    shards[1].write_bytes(whole[:30])
    check(command, root, "truncated inside its header", *arguments)
    shards[1].unlink()
    check(command, root, f"lacks the shard {shards[1].name}", *arguments)
    shards[1].write_bytes(whole)
    index = root / "sharded" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    bad = {name: f"../sharded/{file}" for name, file in good["weight_map"].items()}
    index.write_text(json.dumps({**good, "weight_map": bad}))
    check(command, root, "outside its folder", *arguments)
    index.write_text("{")
    check(command, root, "not valid JSON", *arguments)
    (root / "tuned" / "config.json").write_text("[]")
    check(command, root, "JSON object", "tuned", "--aligned", "aligned", *RESET)


def test_models_that_do_not_belong_together(command: Command, root: Path) -> None:
    tiny.save_dense(root / "qwen3", "qwen3")
    tiny.save_dense(root / "stranger", seed=77)
    settings = tiny.config("llama")
    settings.intermediate_size = 40
    type(tiny.build())(settings).save_pretrained(root / "wide")
    check(command, root, "not of one shape", "tuned", "--aligned", "qwen3", *RESET)
    check(command, root, "16x24 and 16x40", "tuned", "--aligned", "wide", *RESET)
    check(command, root, "plainly not the model", "tuned", "--aligned", "stranger", *RESET)
    check(command, root, "plainly not the model", "fresh", "--aligned", "stranger", *RESET)
    check(command, root, "needs --aligned", "tuned", *RESET)
    check(
        command, root, "needs --base", "tuned", "--aligned", "aligned", "--method", "fgsn", "--strength", "1"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("role", ["tuned", "aligned"])
def test_weights_that_are_not_finite(
    command: Command, root: Path, role: str, name: str, value: float
) -> None:
    """In an edited tensor and in one that is copied; where the reference is not read, it is not looked at."""
    damage(root / role / "model.safetensors", name, value)
    arguments = ("tuned", "--aligned", "aligned", "--out", "new/out", *RESET)
    if role == "aligned" and name == "model.norm.weight":
        arguments = ("tuned", "--aligned", "aligned", "--method", "interpolate", "--strength", "0.5")
    check(command, root, rf"{name}.* (NaN|infinit)", *arguments)


def test_an_adapter_that_is_not_finite(command: Command, root: Path) -> None:
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    damage(root / "fresh" / "adapter_model.safetensors", key, float("nan"))
    check(command, root, "up_proj.* NaN", "fresh", *RESET)
    check(command, root, "up_proj.* NaN", "fresh", "--format", "merged", *RESET)


def test_an_adapter_whose_base_is_missing(command: Command, root: Path) -> None:
    file = root / "fresh" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "/no/where"}))
    check(command, root, "base model '/no/where' of the adapter", "fresh", *RESET)
    file.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    check(command, root, "names no base model", "fresh", *RESET)
    file.write_text(json.dumps({**config, "peft_type": "IA3"}))
    check(command, root, "IA3 adapter", "fresh", *RESET)
    file.write_text(json.dumps({**config, "use_dora": True}))
    check(command, root, "use_dora", "fresh", *RESET)


def test_prompt_files(command: Command, root: Path) -> None:
    arguments = ("tuned", "--aligned", "aligned", *RESET, "--harmful")
    (root / "empty.jsonl").write_text("\n\n")
    (root / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (root / "few.jsonl").write_text('{"prompt": "a"}\n' * 50)
    (root / "bad.csv").write_text("prompt,response\na,b\nc,d,e\n")
    (root / "bad.txt").write_bytes(b"\xff\xfe\x00")
    check(command, root, "empty.jsonl holds no prompt", *arguments, "empty.jsonl")
    check(command, root, "bad.jsonl, line 2 ", *arguments, "bad.jsonl")
    check(command, root, "few.jsonl holds 1 distinct", *arguments, "few.jsonl")
    check(command, root, "bad.csv, line 3 ", *arguments, "bad.csv")
    check(command, root, "bad.txt is not UTF-8", *arguments, "bad.txt")
    check(command, root, "missing.txt does not exist", *arguments, "missing.txt")
    refused(command("measure", "tuned", cwd=root), "no prompts")
    refused(command("measure", "tuned", "--harmful", "bad.jsonl", cwd=root), "line 2")


def test_methods_and_parameters(command: Command, root: Path) -> None:
    given = ("tuned", "--aligned", "aligned", "--strength", "1")
    check(command, root, r"no repair method 'nslr' \(did you mean 'nlsr'\?\)", *given, "--method", "nslr")
    nlsr = (*given, "--method", "nlsr", "-p")
    check(command, root, r"no parameter 'sharee' \(did you mean 'share'\?\)", *nlsr, "sharee=1")
    check(command, root, "share cannot be 'much'; it takes a number", *nlsr, "share=much")
    check(command, root, "scope cannot be 'column'; it takes 'matrix' or 'row'", *nlsr, "scope=column")
    check(command, root, "propagate cannot be 'perhaps'", *nlsr, "propagate=perhaps")
    check(command, root, "seed cannot be '1.5'; it takes a whole number", *nlsr, "seed=1.5")
    check(command, root, "share must be above 0", *nlsr, "share=0")
    check(command, root, "share must be above 0", *nlsr, "share=nan")
    check(command, root, "not of the form key=value", *nlsr, "share")
    check(command, root, "no preset 'papr'", *nlsr, "preset=papr")
    check(command, root, "name it with --method", *given)
    check(command, root, "name it with --method", "tuned", "--aligned", "aligned", "-p", "share=1")
    check(command, root, "band", *given, "--method", "reset", "-p", "layers=7-2")
    check(command, root, "choosing needs prompts", "tuned", "--aligned", "aligned")
    check(
        command, root, "strength", "tuned", "--aligned", "aligned", "--method", "reset", "--strength", "nan"
    )
    check(command, root, "no repair method", *given, "--method", "")
    refused(command("methods", "fsgn"), r"did you mean 'fgsn'\?")
    refused(command("organism", "path", "tuned-lroa"), r"did you mean 'tuned-lora'\?")


def test_an_output_that_holds_something(command: Command, root: Path) -> None:
    for out in ("base", "tuned", "tuned/config.json"):
        check(command, root, "already holds something", "tuned", "--aligned", "aligned", *RESET, "--out", out)
    (root / "tuned-repaired").mkdir()
    (root / "tuned-repaired" / "precious").write_text("x")
    check(command, root, "already holds something", "tuned", "--aligned", "aligned", *RESET)
    check(
        command, root, "cannot write", "tuned", "--aligned", "aligned", *RESET, "--out", "tuned/config.json/x"
    )


def test_a_format_that_cannot_be(command: Command, root: Path) -> None:
    whole = ("--method", "interpolate", "--strength", "0.5")
    check(
        command, root, "use --format merged", "tuned", "--aligned", "aligned", *whole, "--format", "adapter"
    )
    adapter = ("continued", "--aligned", "aligned", *RESET, "--format", "patch")
    check(command, root, "no patch leads to it", *adapter)


def test_neuron_files(command: Command, root: Path) -> None:
    (root / "bad.safetensors").write_bytes(b"nonsense")
    given = ("continued", "--aligned", "aligned-adapter", "--method", "nlsr", "--strength", "1", "--neurons")
    check(command, root, "not a readable safetensors", *given, "bad.safetensors")
    check(command, root, "does not exist", *given, "none.safetensors")
    check(command, root, "is not a resafe neuron set", *given, "tuned/model.safetensors")
    check(command, root, "nlsr needs --harmful", *given[:-1])


def test_nothing_to_change(command: Command, root: Path) -> None:
    check(command, root, "changed nothing", "tuned", "--aligned", "tuned", *RESET)


def test_a_full_disk(command: Command, root: Path, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes((2 << 20) + (3 << 18)))
    arguments = ("tuned", "--aligned", "aligned", *RESET, "--out", small_disk / "out")
    check(command, root, "are needed and .* are free", *arguments)
    assert [file.name for file in small_disk.iterdir()] == ["other"]
