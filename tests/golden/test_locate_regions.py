"""ActSVD and NLSR's low-rank regions against the outputs of their authors' code."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from resafe.locating.actsvd import ActSVD
from resafe.locating.base import Found
from resafe.locating.nlsr import LocateNLSR
from resafe.locating.observe import Bench
from resafe.model.load import LoadedModel
from resafe.neurons import NeuronScores

from .conftest import GOLDEN
from .reading import SPREADS, Padding, bench, look, texts_of

WEI, NLSR = GOLDEN / "wei", GOLDEN / "nlsr"
KINDS = {
    r"(?P<arch>\w+)\.actsvd\.top_rank(?P<rank>\d+)\.exactsvd": "top",
    r"(?P<arch>\w+)\.actsvd\.bottom_rank(?P<rank>\d+)\.exactsvd": "bottom",
    r"(?P<arch>\w+)\.actsvd_orthogonal\.rank_pos(?P<leave_utility>\d+)_rank_neg(?P<leave_safety>\d+)\.exactsvd": (
        "orthogonal"
    ),
}
CASES = [
    (file, mode, match.groupdict())
    for file in sorted(WEI.glob("*.safetensors"))
    for pattern, mode in KINDS.items()
    if (match := re.fullmatch(pattern, file.stem))
]
REGIONS = [
    (file, *match.groups())
    for file in sorted(NLSR.glob("*.safetensors"))
    if (match := re.fullmatch(r"(\w+)\.mask\.sr([\d.]+)\.exactsvd", file.stem))
]
pytestmark = pytest.mark.skipif(
    not (WEI.is_dir() and NLSR.is_dir()), reason=f"no Wei and NLSR golden outputs at {GOLDEN}"
)


@pytest.mark.parametrize(("file", "mode", "settings"), CASES, ids=[case[0].stem for case in CASES])
def test_actsvd(file: Path, mode: str, settings: dict[str, str], calibration: dict) -> None:
    numbers = {key: float(value) for key, value in settings.items() if key != "arch"}
    on = bench(GOLDEN / "inputs" / settings["arch"] / "aligned")
    before = {name: tensor.clone() for name, tensor in on.loaded.model.state_dict().items()}
    expected = load_file(file)
    seen = 0
    for one, removed in ActSVD(mode=mode, **numbers).removed(on, texts_of(calibration)):
        edit = before[one.name].double() - expected[one.name].double()
        assert (removed - edit).norm() <= 1e-3 * edit.norm(), one.name
        seen += 1
    assert seen == len(expected) == len(on.layout.linears)
    after = on.loaded.model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def amplified(arch: str) -> Bench:
    """Return the base with the amplified aligned adapter beside it."""
    inputs, amplify = GOLDEN / "inputs" / arch, json.loads((NLSR / "description.json").read_text())["runs"]
    model = AutoModelForCausalLM.from_pretrained(inputs / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(inputs / "aligned_adapter")).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter *= 2 * amplify[f"{arch}.amplify"]["alpha"]
    return Bench.of(LoadedModel(model, Padding(), arch))


@pytest.mark.parametrize(("file", "arch", "sparsity"), REGIONS, ids=[case[0].stem for case in REGIONS])
def test_regions_of_an_adapter(
    file: Path, arch: str, sparsity: str, calibration: dict, tmp_path: Path
) -> None:
    low = load_file(NLSR / file.name.replace(".mask.", ".lowrank_projected."))
    masks = load_file(file)
    on, texts = amplified(arch), texts_of(calibration)
    locate = LocateNLSR(sparsity=float(sparsity), keep_rank="reference", propagate=True)
    found = look(on, texts, locate.observers(), tmp_path, SPREADS[1])
    before = {name: tensor.clone() for name, tensor in on.loaded.model.state_dict().items()}
    scores = NeuronScores(locate.place(), locate.scores(found), "nlsr", "model")
    chosen = locate.choose(scores)
    assert all(torch.equal(t, before[name]) for name, t in on.loaded.model.state_dict().items())
    assert len(low) == len(masks) == len(scores.values)
    for key, expected in low.items():
        torch.testing.assert_close(scores.values[stored(key)], expected.abs(), rtol=0, atol=5e-5)
    for key, mask in masks.items():
        ours = chosen.masks[stored(key)]
        assert int(ours.sum()) == int(mask.sum())
        assert int((ours & mask).sum()) / int((ours | mask).sum()) >= 0.995


def stored(key: str) -> str:
    """Return the key of an adapter's file for any of the ways that the goldens write it."""
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.(?:weight|default(?:\.weight)?)", key)
    assert match
    return f"base_model.model.{match[1]}.lora_{match[2]}.weight"


def test_found_needs_no_folds(calibration: dict, tmp_path: Path) -> None:
    """Each of these methods runs the model itself: how the texts were dealt changes nothing."""
    arch = CASES[0][2]["arch"]
    on, texts, locate = bench(GOLDEN / "inputs" / arch / "aligned"), texts_of(calibration), ActSVD()
    values = [
        locate.scores(Found(on, look(on, texts, locate.observers(), tmp_path, spread).folds, texts))
        for spread in SPREADS[:2]
    ]
    for name in values[0]:
        torch.testing.assert_close(values[0][name], values[1][name], rtol=0, atol=1e-6)


def test_the_folders_are_the_ones_described(golden: Path) -> None:
    assert len({mode for _, mode, _ in CASES}) == len(KINDS)
    assert REGIONS
