"""Who is who: found in cards and configs, checked by names, shapes and weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resafe import organism
from resafe.errors import UserError
from resafe.roles import assign, find_parent
from resafe.weights.adapter import Adapter, open_model
from tests.model import tiny
from tests.repair import world


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.build(tmp_path_factory.mktemp("world"))


def copied(source: Path, target: Path, card: str | None = None, **config: object) -> Path:
    shutil.copytree(source, target)
    (target / "README.md").unlink(missing_ok=True)
    if card is not None:
        (target / "README.md").write_text(card)
    file = target / "config.json"
    if config:
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return target


CARDS = {
    "plain": "---\nbase_model: PARENT\nlicense: mit\n---\n# Mine\n",
    "quoted": '---\nlicense: mit\nbase_model: "PARENT"\n---\n',
    "list": "---\nbase_model:\n- PARENT\ntags: [a]\n---\n",
    "indented list": "---\nbase_model:\n  - 'PARENT'\n---\n",
}


@pytest.mark.parametrize("case", CARDS)
@pytest.mark.parametrize("relative", [True, False])
def test_the_parent_in_the_card(root: Path, tmp_path: Path, case: str, relative: bool) -> None:
    (tmp_path / "aligned").symlink_to(root / "aligned")
    named = "../aligned" if relative else str(root / "aligned")
    tuned = copied(root / "tuned", tmp_path / "tuned", CARDS[case].replace("PARENT", named))
    roles = assign(tuned)
    assert roles.aligned is not None
    assert roles.aligned.folder.resolve() == root / "aligned"
    assert roles.found == "from its model card"


@pytest.mark.parametrize(
    "card",
    ["base_model: /nowhere\n", "# x\n---\nbase_model: /nowhere\n---\n", "---\nother_base_model: /x\n---\n"],
)
def test_only_the_front_of_a_card_is_read(root: Path, tmp_path: Path, card: str) -> None:
    assert find_parent(open_model(copied(root / "tuned", tmp_path / "tuned", card))) == (None, "not found")


def test_the_parent_in_the_config(root: Path, tmp_path: Path) -> None:
    tuned = copied(root / "tuned", tmp_path / "tuned", _name_or_path=str(root / "aligned"))
    assert assign(tuned).found == "from config.json"


def test_the_parent_of_an_adapter_is_its_base(root: Path, tmp_path: Path) -> None:
    fresh = copied(root / "fresh", tmp_path / "fresh")
    roles = assign(fresh)
    assert roles.found == "from adapter_config.json"
    assert roles.folders["aligned"] == root / "aligned"


def test_a_parent_that_is_named_must_be_there(root: Path, tmp_path: Path) -> None:
    tuned = copied(root / "tuned", tmp_path / "tuned", "---\nbase_model: /nowhere/at/all\n---\n")
    with pytest.raises(UserError, match="/nowhere/at/all"):
        assign(tuned)


def test_the_base_below_an_aligned_adapter(root: Path) -> None:
    roles = assign(root / "continued", root / "aligned-adapter")
    assert roles.base is not None
    assert roles.base.folder == root / "base"
    assert set(roles.folders) == {"tuned", "aligned", "base"}


def test_the_base_in_the_card_of_the_aligned_model(root: Path, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(root / "base")
    aligned = copied(root / "aligned", tmp_path / "aligned", "---\nbase_model: ../base\n---\n")
    roles = assign(root / "tuned", aligned)
    assert roles.base is not None
    assert roles.base.folder.resolve() == root / "base"


def test_a_model_without_a_parent(root: Path) -> None:
    roles = assign(root / "tuned")
    assert (roles.aligned, roles.base, roles.found) == (None, None, "not found")


def test_strangers_are_refused(root: Path, tmp_path: Path) -> None:
    tiny.save_dense(tmp_path / "stranger", seed=99)
    for tuned in ("tuned", "fresh"):
        with pytest.raises(UserError, match="plainly not the model"):
            assign(root / tuned, tmp_path / "stranger")
    tiny.save_adapter(tmp_path / "far", tmp_path / "stranger")
    with pytest.raises(UserError, match="different base models"):
        assign(root / "continued", tmp_path / "far")


def test_the_same_base_in_two_places_is_one_base(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "base", tmp_path / "copy")
    world.adapter(tmp_path / "adapter", tmp_path / "copy", world.noise(1, 0.1, root / "aligned-adapter"))
    assert assign(tmp_path / "adapter", root / "aligned-adapter").aligned is not None


def test_other_shapes_and_families_are_refused(root: Path, tmp_path: Path) -> None:
    tiny.save_dense(tmp_path / "qwen3", "qwen3")
    with pytest.raises(UserError, match=r"not of one shape: .*(q_norm|k_norm).* absent"):
        assign(root / "tuned", tmp_path / "qwen3")
    settings = tiny.config("llama")
    settings.intermediate_size = 32
    type(tiny.build())(settings).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"down_proj.* 16x24 and 16x32"):
        assign(root / "tuned", tmp_path / "wide")
    with pytest.raises(UserError, match="not of one shape"):
        assign(root / "tuned", root / "aligned", tmp_path / "wide")


def test_a_base_is_dense(root: Path) -> None:
    with pytest.raises(UserError, match="must be a dense model"):
        assign(root / "continued", root / "aligned-adapter", root / "unrelated")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["tuned", "aligned"])
def test_weights_that_are_not_finite_are_named(root: Path, tmp_path: Path, role: str, bad: float) -> None:
    for name in ("tuned", "aligned"):
        copied(root / name, tmp_path / name)
    file = tmp_path / role / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = bad
    save_file(tensors, file)
    with pytest.raises(UserError, match=rf"down_proj\.weight in .*{role} holds NaN or infinity"):
        assign(tmp_path / "tuned", tmp_path / "aligned")


def test_the_organism_knows_its_parents() -> None:
    path = organism.path
    roles = assign(path("tuned-lora"), path("aligned-adapter"))
    assert roles.base is not None
    assert roles.base.folder.samefile(path("base"))
    fresh = assign(path("tuned-fresh-lora"))
    assert fresh.aligned is not None
    assert fresh.aligned.folder.samefile(path("aligned"))
    assert isinstance(roles.tuned, Adapter)
    full = assign(path("tuned-full"), path("aligned"))
    assert full.aligned is not None
    late = assign(path("late-tuned"), path("late-aligned"))
    assert late.aligned is not None
    with pytest.raises(UserError, match="not of one shape"):
        assign(path("tuned-full"), path("late-aligned"))


def test_bf16_and_float32_of_one_model_are_parent_and_child(root: Path, tmp_path: Path) -> None:
    copied(root / "aligned", tmp_path / "aligned")
    file = tmp_path / "aligned" / "model.safetensors"
    save_file({n: t.to(torch.bfloat16) for n, t in load_file(file).items()}, file)
    assert assign(root / "tuned", tmp_path / "aligned").aligned is not None


def test_a_repaired_adapter_still_finds_its_base_when_its_card_has_travelled(tmp_path: Path) -> None:
    tuned = copied(
        organism.path("tuned-fresh-lora"), tmp_path / "tuned", "---\nbase_model: ../aligned\n---\n"
    )
    settings = json.loads((tuned / "adapter_config.json").read_text())
    base = str(organism.path("aligned"))
    (tuned / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    roles = assign(tuned)
    assert roles.aligned is not None
    assert roles.aligned.folder.samefile(base)
    assert roles.found == "from adapter_config.json"
