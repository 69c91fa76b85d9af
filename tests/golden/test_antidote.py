"""Antidote's masks against those of its authors' code."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from resafe.locating.lowrank import Calibration
from resafe.repairing.antidote import Antidote, Loudness, loudness
from resafe.repairing.space import DenseSpace, FactorSpace
from resafe.weights.adapter import Adapter
from resafe.weights.checkpoint import Checkpoint

from .conftest import GOLDEN
from .reading import bench

FOLDER = GOLDEN / "antidote"
RUNS = json.loads((FOLDER / "description.json").read_text())["runs"] if FOLDER.is_dir() else {}
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no Antidote golden outputs at {FOLDER}")
CASES = [
    match.groups()
    for file in (sorted(FOLDER.glob("*.safetensors")) if FOLDER.is_dir() else ())
    if (match := re.fullmatch(r"(\w+)\.(lora|full)_mask(_magnitude)?\.(dense[\d.]+)\.safetensors", file.name))
]


@pytest.mark.parametrize(("arch", "mode", "magnitude", "ratio"), CASES)
def test_masks(arch: str, mode: str, magnitude: str | None, ratio: str, calibration: dict) -> None:
    expected = load_file(FOLDER / f"{arch}.{mode}_mask{magnitude or ''}.{ratio}.safetensors")
    expected = {key.replace(".default.", "."): mask for key, mask in expected.items()}
    folder = GOLDEN / "inputs" / arch / ("tuned_adapter" if mode == "lora" else "tuned_full")
    adapter = Adapter.open(folder) if mode == "lora" else None
    space = FactorSpace(adapter, adapter) if adapter else DenseSpace(Checkpoint.open(folder), None, None)
    method = Antidote(RUNS[f"{mode}.{ratio}"]["dense_ratio"], "magnitude" if magnitude else "wanda")
    names = method.names(space.matrices(), () if adapter else space.tuned.names)
    found = Loudness(None if magnitude else loudness(merged(arch, adapter), text(calibration), space), "")
    plan = method.decide({name: method.measure(space.unit(name), found) for name in names}, found)
    assert set(plan.masks) == set(expected)
    for key, mask in expected.items():
        ours = plan.masks[key]
        assert torch.equal(ours.sum(1), mask.sum(1))
        assert float((ours != mask).float().mean()) <= 0.002
    for name in names:
        for key, target in method.edit(space.unit(name), plan, found).items():
            assert not target.value.any()
            assert target.mask is plan.masks[key]


def text(calibration: dict) -> Calibration:
    records = calibration["harmful"]
    ids = [r["prompt_ids"] + r["response_ids"] for r in records]
    return Calibration(ids, [len(r["prompt_ids"]) for r in records])


def merged(arch: str, adapter: Adapter | None):
    loaded = bench(GOLDEN / "inputs" / arch / ("base" if adapter else "tuned_full")).loaded
    with torch.no_grad():
        for name in adapter.modules if adapter else ():
            loaded.model.get_parameter(name).copy_(adapter.tensor(name))
    return loaded
