import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from resafe.errors import UserError
from resafe.weights.checkpoint import INDEX, Checkpoint, fingerprint, resolve, travelling_files
from tests.model import tiny


@pytest.fixture(scope="module", params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model as one file and as many."""
    root = tmp_path_factory.mktemp("pair")
    model = tiny.build("qwen2").to(request.param)
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="6KB")
    return root / "single", root / "sharded"


def test_sharded_equals_single_file(pair: tuple[Path, Path]) -> None:
    single, sharded = (Checkpoint.open(folder) for folder in pair)
    assert len(single.shards) == 1
    assert len(sharded.shards) >= 3
    assert set(single.names) == set(sharded.names)
    truth = AutoModelForCausalLM.from_pretrained(pair[0]).state_dict()
    for name in single.names:
        one, other = single.tensor(name), sharded.tensor(name)
        assert one.dtype is other.dtype is truth[name].dtype
        assert torch.equal(one, other)
        assert torch.equal(one, truth[name])
    assert single.parameters == sharded.parameters
    assert fingerprint(single.files) != fingerprint(sharded.files)


def test_rows_come_in_the_order_asked(pair: tuple[Path, Path]) -> None:
    view = Checkpoint.open(pair[1])
    name = "model.layers.1.mlp.up_proj.weight"
    whole = view.tensor(name)
    assert torch.equal(view.rows(name, [5, 0, 5, tiny.WIDTH - 1]), whole[[5, 0, 5, tiny.WIDTH - 1]])
    assert view.rows(name, []).shape == (0, tiny.HIDDEN)
    for outside in (-1, tiny.WIDTH):
        with pytest.raises(IndexError):
            view.rows(name, [outside])


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_count_once(tmp_path: Path, tied: bool) -> None:
    settings = tiny.config("llama")
    settings.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(settings)
    model.save_pretrained(tmp_path / "m")
    view = Checkpoint.open(tmp_path / "m")
    assert view.tied is tied
    assert view.parameters == sum(p.numel() for p in model.parameters())


def test_a_tied_head_that_is_stored_too_counts_once(tmp_path: Path) -> None:
    settings = tiny.config("llama")
    settings.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(settings)
    model.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "lm_head.weight" in state
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint.open(tmp_path).parameters == sum(p.numel() for p in model.parameters())


def test_an_unknown_tensor_is_named(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="no tensor 'nonsense'"):
        Checkpoint.open(pair[0]).tensor("nonsense")


def damaged(folder: Path, change: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    names = list(index["weight_map"])
    if change == "outside":
        index["weight_map"][names[0]] = "../" + index["weight_map"][names[0]]
    elif change == "absolute":
        index["weight_map"][names[0]] = "/etc/hostname"
    elif change == "lacking shard":
        (folder / index["weight_map"][names[0]]).unlink()
    elif change == "invented tensor":
        index["weight_map"]["nonsense"] = index["weight_map"][names[0]]
    elif change == "forgotten tensor":
        del index["weight_map"]["model.norm.weight"]
    elif change == "no map":
        index = {"metadata": {}}
    (folder / INDEX).write_text("[1]" if change == "a list" else json.dumps(index))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("outside", "outside its folder"),
        ("absolute", "outside its folder"),
        ("lacking shard", "lacks the shard"),
        ("invented tensor", "disagree about 'nonsense'"),
        ("forgotten tensor", "disagree about"),
        ("no map", "no weight_map"),
        ("a list", "JSON object"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, change: str, words: str) -> None:
    tiny.build().save_pretrained(tmp_path, max_shard_size="6KB")
    damaged(tmp_path, change)
    with pytest.raises(UserError, match=words):
        Checkpoint.open(tmp_path)


def test_what_travels_with_the_weights(tmp_path: Path) -> None:
    keep = ["config.json", "tokenizer.json", "LICENSE", "deep/prompt.txt"]
    leave = ["model.safetensors", INDEX, "pytorch_model.bin", "x.gguf", ".git/config", "resafe.json"]
    for name in [*keep, *leave]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x")
    assert {str(f.relative_to(tmp_path)) for f in travelling_files(tmp_path)} == set(keep)


def test_a_pickle_index_does_not_travel(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    assert list(travelling_files(tmp_path)) == []


@pytest.mark.parametrize("ref", ["./nothing", "/nothing/here", "nothing", "a/b/c", "~nobody"])
def test_no_folder(ref: str) -> None:
    with pytest.raises(UserError, match="not a folder"):
        resolve(ref)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        resolve(tmp_path / "a")
