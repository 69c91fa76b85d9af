import json
import math
from collections.abc import Callable
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
from resafe.neurons import NeuronScores, NeuronSet, Per, Site, expert_of, layer_of, load_neurons, shuffled

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
    whole = made(
        found, site=site, method="fgsn", model="abc", parameters={"q": 0.3, "band": None}, prompts="p"
    )
    whole.save(file)
    again = NeuronSet.load(file)
    assert members(again) == members(whole)
    assert (again.site, again.method, again.model, again.prompts) == (site, "fgsn", "abc", "p")
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


def test_a_set_saved_before_prompts_were_noted_is_read(tmp_path: Path) -> None:
    tensors, metadata = saved(tmp_path / "a")
    del metadata["prompts"]
    save_file(tensors, tmp_path / "b", metadata)
    assert len(NeuronSet.load(tmp_path / "b")) == 15
    assert NeuronSet.load(tmp_path / "b").prompts == ""


def test_combining_says_what_was_combined() -> None:
    a, b, c = (
        made({}, method=name, prompts=prompts) for name, prompts in (("a", "p"), ("b", "p"), ("c", "q"))
    )
    found = (a | b) - c
    assert (found.method, found.prompts) == ("(a | b) - c", "p,q")


def test_tensors_of_one_name_and_two_shapes_do_not_mix() -> None:
    """Torch would stretch the row over the matrix."""
    with pytest.raises(UserError, match="different shapes"):
        made({NAMES[0]: torch.ones(1, 3, dtype=torch.bool)}) | made(
            {NAMES[0]: torch.ones(7, 3, dtype=torch.bool)}
        )


PARTS = {
    "model.layers.10.mlp": (9,),
    "model.layers.2.mlp.experts": (3, 4),
    "model.layers.2.mlp.shared_expert": (5,),
}
FEW = st.sampled_from([float("nan"), -math.inf, -1.0, 0.0, -0.0, 0.5, 2.0, math.inf])  # many ties
ANY = st.floats(width=32)


@st.composite
def scores(draw: st.DrawFn) -> NeuronScores:
    element = draw(st.sampled_from([FEW, ANY]))
    values = {
        name: torch.from_numpy(draw(arrays(np.float32, shape, elements=element)).copy())
        for name, shape in PARTS.items()
    }
    return NeuronScores(Site.FFN, values, "m", "x", {"a": 1}, "p", {"layer": 3})


def listed(found: NeuronScores, per: Per) -> dict[object, list[tuple[float, int, str, int]]]:
    """Return the scores with evidence, group by group, best first, and of equal ones the first."""
    groups: dict[object, list[tuple[float, int, str, int]]] = {}
    for name, values in found.values.items():
        key = {"global": 0, "layer": layer_of(name), "tensor": name}[per]
        rows = groups.setdefault(key, [])
        rows += [(-v, layer_of(name), name, i) for i, v in enumerate(values.flatten().tolist()) if v == v]
    return {key: sorted(rows) for key, rows in groups.items()}


def size_of(found: NeuronScores, per: Per, key: object) -> int:
    inside = {"global": lambda n: 0, "layer": layer_of, "tensor": str}[per]
    return sum(v.numel() for name, v in found.values.items() if inside(name) == key)


@given(scores(), st.floats(0.01, 1.0), st.sampled_from(["global", "layer", "tensor"]))
@settings(max_examples=150, deadline=None)
def test_the_highest_scores_are_chosen(found: NeuronScores, share: float, per: Per) -> None:
    expected = {
        (name, i)
        for key, rows in listed(found, per).items()
        for _, _, name, i in rows[: math.floor(share * size_of(found, per, key) + 1e-9)]
    }
    if not expected:
        with pytest.raises(UserError, match="larger share"):
            found.top(share=share, per=per)
        return
    chosen = found.top(share=share, per=per)
    assert members(chosen) == expected
    assert chosen.total == found.total == 26
    assert (chosen.site, chosen.method, chosen.model, chosen.prompts) == (Site.FFN, "m", "x", "p")
    assert chosen.parameters == {"a": 1, "chosen": {"share": share, "per": per}}


@given(scores(), st.integers(1, 9), st.sampled_from(["global", "layer", "tensor"]))
@settings(max_examples=100, deadline=None)
def test_a_count_is_exact_or_refused(found: NeuronScores, count: int, per: Per) -> None:
    groups = listed(found, per)
    if any(len(rows) < count for rows in groups.values()):
        with pytest.raises(UserError, match=f"{count} neurons were asked for"):
            found.top(count=count, per=per)
    else:
        expected = {(name, i) for rows in groups.values() for _, _, name, i in rows[:count]}
        assert members(found.top(count=count, per=per)) == expected


@given(scores(), st.floats(0.04, 1.0), st.floats(0.04, 1.0))
@settings(max_examples=60, deadline=None)
def test_a_larger_share_holds_the_smaller(found: NeuronScores, one: float, other: float) -> None:
    if found.unreached == found.total:
        return
    small, large = (found.top(share=share) for share in sorted((one, other)))
    assert members(small) <= members(large)
    rest = found.total - len(large) - found.unreached
    if rest:
        after = found.top(count=rest, exclude=large)
        assert not members(after) & members(large)
        assert len(after | large) == found.total - found.unreached


@given(scores(), ANY)
@settings(max_examples=60, deadline=None)
def test_above_a_threshold(found: NeuronScores, threshold: float) -> None:
    flat = {(n, i): v for n, t in found.values.items() for i, v in enumerate(t.flatten().tolist())}
    assert members(found.above(threshold)) == {key for key, v in flat.items() if v > threshold}


@pytest.mark.parametrize("how", [{"share": 0.0}, {"share": 1.01}, {"share": math.nan}, {"count": 0}, {}])
def test_choosing_nothing_is_refused(how: dict[str, float]) -> None:
    found = NeuronScores(Site.FFN, {"layers.0.mlp": torch.ones(5)}, "m", "x")
    with pytest.raises(UserError, match="give"):
        found.top(**how)
    with pytest.raises(UserError, match="give either"):
        found.top(share=0.5, count=1)
    with pytest.raises(UserError, match="per global, layer, tensor"):
        found.top(share=0.5, per="head")


def test_scores_are_float32_and_directions_hold_no_neurons() -> None:
    with pytest.raises(ValueError, match="float32"):
        NeuronScores(Site.FFN, {"layers.0.mlp": torch.ones(5, dtype=torch.float64)}, "m", "x")
    direction = NeuronScores(Site.RESIDUAL, {"layer.3": torch.ones(8)}, "refusal direction", "x")
    for choose in (lambda: direction.top(share=0.5), lambda: direction.above(0.0)):
        with pytest.raises(UserError, match="hold no neurons"):
            choose()


@given(scores(), st.sampled_from(Site))
@settings(max_examples=40, deadline=None)
def test_scores_come_back_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, found: NeuronScores, site: Site
) -> None:
    folder = tmp_path_factory.mktemp("scores")
    whole = NeuronScores(site, found.values, "m", "x", {"q": [1, None]}, "p", {"layer": 3})
    whole.save(folder / "a")
    again = NeuronScores.load(folder / "a")
    again.save(folder / "b")
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    for name, values in found.values.items():
        assert again.values[name].numpy().tobytes() == values.numpy().tobytes()
    told = (again.site, again.method, again.model, again.parameters, again.prompts, again.details)
    assert told == (site, "m", "x", {"q": [1, None]}, "p", {"layer": 3})


def test_scores_and_sets_are_told_apart(tmp_path: Path) -> None:
    found = NeuronScores(Site.FFN, {"layers.0.mlp": torch.arange(5.0)}, "m", "x")
    found.save(tmp_path / "deep" / "scores")
    found.top(count=2).save(tmp_path / "set")
    assert isinstance(load_neurons(tmp_path / "deep" / "scores"), NeuronScores)
    with pytest.raises(UserError, match="none are chosen yet"):
        NeuronSet.load(tmp_path / "deep" / "scores")
    with pytest.raises(UserError, match="holds a neuron set"):
        NeuronScores.load(tmp_path / "set")
    with pytest.raises(UserError, match="cannot be written"):
        found.save(tmp_path)


SCORE_DAMAGE = {
    "half floats": lambda t, m: t.update({"layers.0.mlp": t["layers.0.mlp"].half()}),
    "no details": lambda t, m: m.pop("details"),
    "details that are no object": lambda t, m: m.update(details="[3]"),
    "an unknown site": lambda t, m: m.update(site="kitchen"),
    "called a set": lambda t, m: m.update(resafe="resafe neuron set 1"),
}


@pytest.mark.parametrize("case", SCORE_DAMAGE)
def test_a_malformed_score_file_is_refused(tmp_path: Path, case: str) -> None:
    file = tmp_path / "scores.safetensors"
    NeuronScores(Site.FFN, {"layers.0.mlp": torch.arange(5.0)}, "m", "x").save(file)
    tensors = load_file(file)
    with safe_open(file, "pt") as stream:
        metadata = stream.metadata()
    SCORE_DAMAGE[case](tensors, metadata)
    save_file(tensors, file, metadata)
    with pytest.raises(UserError, match=r"scores\.safetensors is a damaged"):
        load_neurons(file)


def naive_rank(values: list[float]) -> np.ndarray:
    return np.array([sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values])


@given(scores(), scores())
@settings(max_examples=60, deadline=None)
def test_rank_correlation(one: NeuronScores, other: NeuronScores) -> None:
    flat = [torch.cat([s.values[n].flatten() for n in PARTS]).tolist() for s in (one, other)]
    both = [(a, b) for a, b in zip(*flat, strict=True) if a == a and b == b]
    ranks = [naive_rank(list(column)) for column in zip(*both, strict=True)] or [np.zeros(0)] * 2
    found = one.rank_correlation(other)
    if min(len({*r.tolist()}) for r in ranks) < 2:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)


def test_chance_is_what_random_neurons_give() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0.mlp": (400,), "layers.1.mlp.experts": (4, 150)}
    a, b = (
        made({n: torch.rand(s, generator=generator) < p for n, s in shapes.items()}, site=Site.FFN)
        for p in (0.1, 0.3)
    )
    drawn = [a.random_like(i).jaccard(b.random_like(1000 + i)) for i in range(400)]
    error = np.std(drawn) / math.sqrt(len(drawn))
    assert a.chance_jaccard(b) == pytest.approx(np.mean(drawn), abs=4 * error)
    uneven = made({n: m & (n == "layers.0.mlp") for n, m in a.masks.items()}, site=Site.FFN)
    opposite = made({n: m & (n != "layers.0.mlp") for n, m in a.masks.items()}, site=Site.FFN)
    assert uneven.chance_jaccard(opposite) == 0.0  # other layers than the other's: chance cannot meet


def test_neurons_by_layer_and_expert() -> None:
    routed = torch.zeros(3, 4, dtype=torch.bool)
    routed[0, 1] = routed[2, 0] = routed[2, 3] = True
    dense = torch.tensor([False, True])
    found = made({"layers.1.mlp.experts": routed, "layers.1.mlp.shared_expert": dense}, site=Site.UP)
    assert found.neurons() == [(1, 0, 1), (1, 2, 0), (1, 2, 3), (1, None, 1)]
    assert found.per_expert() == {(1, 0): 1, (1, 1): 0, (1, 2): 2}
    assert found.per_tensor() == {"layers.1.mlp.experts": 3, "layers.1.mlp.shared_expert": 1}
    assert (found.per_layer(), found.layer_sizes()) == ({1: 4}, {1: 14})
    rows = made({"layers.1.mlp.experts.7.up_proj.weight": dense}, site=Site.ROW)
    assert (rows.neurons(), rows.per_expert()) == ([(1, 7, 1)], {(1, 7): 1})
    entries = made({"layers.1.mlp.up_proj.weight": routed})
    assert entries.neurons() == [(1, None, 1), (1, None, 8), (1, None, 11)]


def test_gate_up_and_rows_are_feed_forward_neurons() -> None:
    one, other = torch.tensor([True, False, False]), torch.tensor([False, False, True])
    rows = made({"layers.1.mlp.gate_proj.weight": one, "layers.1.mlp.up_proj.weight": other}, site=Site.ROW)
    gate = made({"layers.1.mlp": one | other}, site=Site.GATE)
    assert members(rows.as_ffn()) == members(gate.as_ffn())
    assert rows.as_ffn().jaccard(gate.as_ffn()) == 1.0
    for name, site in (
        ("layers.1.self_attn.q_proj.weight", Site.ROW),
        ("layers.1.mlp.down_proj.weight", Site.ROW),
        ("layers.1.mlp.experts.7.up_proj.weight", Site.ROW),
        ("layers.1.mlp.up_proj.weight", Site.ENTRY),
    ):
        with pytest.raises(UserError, match="cannot be mapped"):
            made({name: one}, site=site).as_ffn()
    assert NeuronScores(Site.UP, {"layers.1.mlp": torch.ones(3)}, "m", "x").as_ffn().site is Site.FFN
    with pytest.raises(UserError, match="cannot be mapped"):
        NeuronScores(Site.ROW, {"layers.1.mlp.up_proj.weight": torch.ones(3)}, "m", "x").as_ffn()


@pytest.mark.parametrize(
    "make",
    [lambda m: made({}, model=m), lambda m: NeuronScores(Site.FFN, {}, "m", m)],
    ids=["set", "scores"],
)
def test_another_model_is_refused_by_name(make: Callable[[str], NeuronSet | NeuronScores]) -> None:
    make("abc").check("abc", "./mine")
    with pytest.raises(UserError, match=r"found in the model abc, but \./mine is the model def"):
        make("abc").check("def", "./mine")


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
