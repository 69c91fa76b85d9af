"""NLSR against the outputs of its authors' code."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from resafe.locating.lowrank import Calibration, get_weight, set_weight
from resafe.model.load import LoadedModel
from resafe.repairing.base import blend
from resafe.repairing.nlsr import NLSR, Regions, _module_order
from resafe.repairing.space import FactorSpace
from resafe.weights.adapter import Adapter

from .conftest import GOLDEN

FOLDER = GOLDEN / "nlsr"
DESCRIPTION = json.loads((FOLDER / "description.json").read_text()) if FOLDER.is_dir() else {"runs": {}}
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no NLSR golden outputs at {FOLDER}")


def files(pattern: str) -> list[tuple[str, ...]]:
    names = (re.fullmatch(pattern, file.name) for file in sorted(FOLDER.glob("*.safetensors")))
    return [match.groups() for match in names if match]


def adapter(arch: str, name: str) -> Adapter:
    return Adapter.open(GOLDEN / "inputs" / arch / name)


def alpha(arch: str) -> float:
    return DESCRIPTION["runs"][f"{arch}.amplify"]["alpha"]


def published(arch: str, **parameters: object) -> NLSR:
    return NLSR(**{**NLSR.PRESETS["reference"], "beta": alpha(arch), **parameters})


def name_of(key: str) -> tuple[str, str]:
    """Return the weight name and the factor of any of the three ways that keys are written."""
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.(?:weight|default(?:\.weight)?)", key)
    assert match
    return match[1] + ".weight", match[2]


@pytest.mark.parametrize("arch", [arch for (arch,) in files(r"(\w+)\.amplified_adapter\.safetensors")])
def test_amplification(arch: str) -> None:
    expected = load_file(FOLDER / f"{arch}.amplified_adapter.safetensors")
    aligned = adapter(arch, "aligned_adapter")
    seen = 0
    for name in aligned.modules:
        ours = published(arch).amplified(aligned.factors(name))
        for which, tensor in (("A", ours.a), ("B", ours.b)):
            torch.testing.assert_close(tensor, expected[aligned.key(name, which)], rtol=3e-7, atol=0)
            seen += 1
    assert seen == len(expected)


def projected(arch: str, sparsity: float, calibration: dict) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    aligned = adapter(arch, "aligned_adapter")
    method = published(arch, sparsity=sparsity)
    factors = {name: method.amplified(aligned.factors(name)) for name in aligned.modules}
    model = AutoModelForCausalLM.from_pretrained(aligned.base.folder, dtype=torch.float32).eval()
    loaded = LoadedModel(model, Padding(), arch)
    for name, pair in factors.items():
        set_weight(loaded, name, get_weight(loaded, name) + pair.delta())
    records = calibration["harmful"]
    text = Calibration(
        [r["prompt_ids"] + r["response_ids"] for r in records], [len(r["prompt_ids"]) for r in records]
    )
    found = method.project_all(loaded, text, factors)
    return {name: (pair, tuple(method.largest(p) for p in pair)) for name, pair in found.items()}


class Padding:
    """All that reading given token ids needs of a tokenizer."""

    pad_token_id = 0


@pytest.mark.parametrize(("arch", "sparsity"), files(r"(\w+)\.mask\.sr([\d.]+)\.exactsvd\.safetensors"))
def test_regions(arch: str, sparsity: str, calibration: dict) -> None:
    low = load_file(FOLDER / f"{arch}.lowrank_projected.sr{sparsity}.exactsvd.safetensors")
    masks = load_file(FOLDER / f"{arch}.mask.sr{sparsity}.exactsvd.safetensors")
    ours = projected(arch, float(sparsity), calibration)
    assert len(low) == len(masks) == 2 * len(ours)
    for key, expected in low.items():
        name, which = name_of(key)
        torch.testing.assert_close(ours[name][0]["AB".index(which)], expected, rtol=0, atol=5e-5)
    for key, expected in masks.items():
        name, which = name_of(key)
        mask = ours[name][1]["AB".index(which)]
        assert int(mask.sum()) == int(expected.sum())
        assert int((mask & expected).sum()) / int((mask | expected).sum()) >= 0.995


def regions(arch: str) -> tuple[FactorSpace, Regions]:
    tuned, amplified = adapter(arch, "tuned_adapter"), adapter(arch, "aligned_adapter")
    stored = load_file(FOLDER / f"{arch}.mask.sr0.8.exactsvd.safetensors")
    masks = {tuned.key(*name_of(key)): mask for key, mask in stored.items()}
    return FactorSpace(tuned, amplified), Regions(masks=masks)


RUNS = files(r"(\w+)\.realigned\.bernoulli_seed(\d+)\.safetensors")


@pytest.mark.parametrize(("arch", "seed"), RUNS)
def test_selection_and_transplant(arch: str, seed: str) -> None:
    run = DESCRIPTION["runs"][f"{arch}.realign.bernoulli_seed{seed}"]
    space, found = regions(arch)
    method = published(arch, share=run["prune_rate"], spread=run["epsilon"], seed=run["seed"])
    order = [name_of(key)[0] for key in run["modules"]]
    assert order == sorted(space.matrices(), key=_module_order)
    measured = {name: method.measure(space.unit(name), found) for name in space.matrices()}
    assert [measured[name] for name in order] == pytest.approx(run["similarity"], abs=1e-5)
    chance, drawn = method.choose([measured[name] for name in order])
    assert chance == pytest.approx(run["prob_modified"], abs=1e-6)
    assert drawn == [bool(draw) for draw in run["bernoulli_draw"]]
    plan = method.decide(measured, found)
    assert plan.units == {name_of(key)[0] for key in run["modified"]}
    compare(arch, f"bernoulli_seed{seed}", space, method, found, plan.units)


def compare(
    arch: str, case: str, space: FactorSpace, method: NLSR, found: Regions, chosen: frozenset
) -> None:
    expected = load_file(FOLDER / f"{arch}.realigned.{case}.safetensors")
    plan = method.decide(dict.fromkeys(space.matrices(), 0.5), found)
    for name in space.matrices():
        unit = space.unit(name)
        new = dict(unit.tuned)
        if name in chosen:
            new = {k: blend(unit.tuned[k], t, 1.0) for k, t in method.edit(unit, plan, found).items()}
        for key, tensor in new.items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("arch", [arch for (arch,) in files(r"(\w+)\.realigned\.all\.safetensors")])
def test_every_module(arch: str) -> None:
    space, found = regions(arch)
    method = published(arch, selection="lowest", share=1.0)
    compare(arch, "all", space, method, found, frozenset(space.matrices()))


@pytest.mark.parametrize("arch", [arch for (arch,) in files(r"(\w+)\.realigned\.mask_replace\.safetensors")])
def test_threshold(arch: str) -> None:
    run = DESCRIPTION["runs"][f"{arch}.realign.mask_replace"]
    space, found = regions(arch)
    method = published(arch, selection="threshold", tau=run["tau"])
    plan = method.decide({n: method.measure(space.unit(n), found) for n in space.matrices()}, found)
    assert plan.units == {name_of(key)[0] for key, _ in run["modified_[module, similarity]"]}
    compare(arch, "mask_replace", space, method, found, plan.units)


def test_the_folder_is_the_one_described(golden: Path) -> None:
    assert DESCRIPTION["method"] == "NLSR"
    assert RUNS
