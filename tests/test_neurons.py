import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from resafe.errors import UserError
from resafe.neurons import NeuronSet, Site, expert_of, layer_of, shuffled

NAMES = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1, 11)]


@st.composite
def masks(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    return {name: torch.from_numpy(draw(arrays(bool, (7, 3))).copy()) for name in names}


def made(found: dict[str, torch.Tensor], **more: object) -> NeuronSet:
    return NeuronSet(**{"site": Site.ENTRY, "masks": found, "method": "m", "model": "x", **more})


def members(neurons: NeuronSet) -> set[tuple[str, int]]:
    return {(n, int(i)) for n, mask in neurons.masks.items() for i in mask.flatten().nonzero().flatten()}


@given(masks(), masks())
@settings(max_examples=80, deadline=None)
def test_algebra_is_that_of_sets(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    a, b = made(one), made(other)
    mine, theirs = members(a), members(b)
    assert members(a | b) == mine | theirs
    assert members(a & b) == mine & theirs
    assert members(a - b) == mine - theirs
    assert len(a) == len(mine)
    assert a.total == 21 * len(one)
    union = mine | theirs
    assert a.jaccard(b) == (len(mine & theirs) / len(union) if union else 1.0)
    per_layer = {layer_of(name): sum(n == name for n, _ in mine) for name in one}
    assert a.per_layer() == dict(sorted(per_layer.items()))


@given(masks(), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_random_neurons_keep_the_counts(found: dict[str, torch.Tensor], seed: int) -> None:
    one, same, other = (made(found).random_like(s) for s in (seed, seed, seed + 1))
    for name, mask in found.items():
        assert int(one.masks[name].sum()) == int(mask.sum()) == int(other.masks[name].sum())
        assert one.masks[name].shape == mask.shape
        assert torch.equal(one.masks[name], same.masks[name])


def test_draws_differ_between_seeds_and_tensors() -> None:
    mask = torch.arange(200) < 50
    drawn = [shuffled(mask, seed, name) for seed in (0, 1) for name in NAMES]
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[i + 1 :])


@given(masks(), st.sampled_from(Site))
@settings(max_examples=40, deadline=None)
def test_save_and_load(
    tmp_path_factory: pytest.TempPathFactory, found: dict[str, torch.Tensor], site: Site
) -> None:
    file = tmp_path_factory.mktemp("set") / "neurons.safetensors"
    whole = made(found, site=site, method="fgsn", model="abc", parameters={"q": 0.3, "band": None})
    whole.save(file)
    again = NeuronSet.load(file)
    assert members(again) == members(whole)
    assert (again.site, again.method, again.model) == (site, "fgsn", "abc")
    assert again.parameters == {"q": 0.3, "band": None}
    assert all(torch.equal(again.masks[name], mask) for name, mask in found.items())


def test_eight_neurons_a_byte_and_the_same_bytes_every_time(tmp_path: Path) -> None:
    mask = torch.rand(100, 81, generator=torch.Generator().manual_seed(0)) < 0.2
    files = [tmp_path / f"{i}.safetensors" for i in range(5)]
    for file in files:
        made({NAMES[0]: mask, NAMES[2]: ~mask}, parameters={"a": 1}).save(file)
    assert len({file.read_bytes() for file in files}) == 1
    stored = load_file(files[0])
    assert {name: t.numel() for name, t in stored.items()} == {NAMES[0]: 1013, NAMES[2]: 1013}
    bits = np.unpackbits(stored[NAMES[0]].numpy(), count=8100, bitorder="little")
    assert np.array_equal(bits.astype(bool), mask.flatten().numpy())
    with safe_open(files[0], "pt") as stream:
        metadata = stream.metadata()
    assert metadata["resafe"] == "resafe neuron set 1"
    assert (metadata["kind"], metadata["site"], metadata["model"]) == ("neuron set", "entry", "x")


@pytest.mark.parametrize("different", [{"model": "y"}, {"site": Site.ROW}])
def test_sets_of_another_model_or_site_do_not_mix(different: dict[str, object]) -> None:
    one, other = made({}), made({}, **different)
    for combine in (
        lambda: one | other,
        lambda: one & other,
        lambda: one - other,
        lambda: one.jaccard(other),
    ):
        with pytest.raises(UserError, match="different (models|sites)"):
            combine()


def saved(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    made({NAMES[0]: torch.ones(5, 3, dtype=torch.bool)}).save(file)
    with safe_open(file, "pt") as stream:
        return load_file(file), stream.metadata()


DAMAGE = {
    "no metadata": lambda t, m: m.clear(),
    "another format": lambda t, m: m.update(resafe="resafe neuron set 9"),
    "no shapes": lambda t, m: m.pop("shapes"),
    "shapes that are no JSON": lambda t, m: m.update(shapes="{"),
    "shapes that are a list": lambda t, m: m.update(shapes="[1]"),
    "a shape that is a number": lambda t, m: m.update(shapes=json.dumps({NAMES[0]: 15})),
    "a shape too large": lambda t, m: m.update(shapes=json.dumps({NAMES[0]: [500, 3]})),
    "a shape too small": lambda t, m: m.update(shapes=json.dumps({NAMES[0]: [1, 3]})),
    "a negative shape": lambda t, m: m.update(shapes=json.dumps({NAMES[0]: [-5, -3]})),
    "a tensor that is not there": lambda t, m: m.update(shapes=json.dumps({NAMES[1]: [5, 3]})),
    "an unknown site": lambda t, m: m.update(site="kitchen"),
    "no method": lambda t, m: m.pop("method"),
    "parameters that are no object": lambda t, m: m.update(parameters="3"),
    "another type": lambda t, m: t.update({NAMES[0]: t[NAMES[0]].float()}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_malformed_file_is_refused(tmp_path: Path, case: str) -> None:
    file = tmp_path / "neurons.safetensors"
    tensors, metadata = saved(file)
    DAMAGE[case](tensors, metadata)
    save_file(tensors, file, metadata or None)
    with pytest.raises(UserError, match=r"neurons\.safetensors"):
        NeuronSet.load(file)


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"nonsense", b"\xff" * 100):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(UserError, match="not a readable safetensors file"):
            NeuronSet.load(tmp_path / "a")
    with pytest.raises(UserError, match="does not exist"):
        NeuronSet.load(tmp_path / "b")


def test_names() -> None:
    assert [
        layer_of(n) for n in [*NAMES, "lm_head.weight", "layers.3.x", "transformer.h.3.mlp", "layer.5"]
    ] == [
        0,
        1,
        11,
        -1,
        3,
        3,
        5,
    ]
    assert expert_of("model.layers.1.mlp.experts.7.up_proj.weight") == 7
    assert expert_of(NAMES[0]) is None
