"""FGSN's projection with the Frobenius divisor, on all rows, against the outputs of SafeLoRA's code."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from resafe.repairing.base import Unit, blend
from resafe.repairing.fgsn import FGSN, Activity
from resafe.repairing.space import RowSpace
from resafe.weights.adapter import Adapter
from resafe.weights.checkpoint import Checkpoint

from .conftest import GOLDEN

FOLDER = GOLDEN / "safelora"
DESCRIPTION = json.loads((FOLDER / "description.json").read_text()) if FOLDER.is_dir() else {"runs": {}}
RUNS = sorted(DESCRIPTION["runs"])
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no SafeLoRA golden outputs at {FOLDER}")


def space(run: str) -> RowSpace:
    models = GOLDEN / "inputs" / run.split(".")[0]
    tuned = Adapter.open(models / DESCRIPTION["adapter"].split()[0])
    return RowSpace(tuned, None, Checkpoint.open(models / "base"))


def name_of(key: str) -> str:
    return key.removeprefix("base_model.model.").removesuffix(".lora_B.weight") + ".weight"


def everything(found: RowSpace) -> Activity:
    rows = {name: torch.ones(found.tuned.info(name).shape[0], dtype=torch.bool) for name in found.matrices()}
    return Activity({}, {}, range(0), (), rows, {}, "")


def likeness(found: RowSpace, unit: Unit) -> float:
    """Return cos(C B A, B A), the number that SafeLoRA's code compares with its threshold."""
    a = found.parts(unit.name).a.double()
    projected = FGSN(dim="fro").project(unit.alignment(), unit.delta())
    moved, old = projected.double() @ a, unit.delta().double() @ a
    return float((moved * old).sum() / (moved.norm() * old.norm()))


@pytest.mark.parametrize("run", RUNS)
def test_projection(run: str) -> None:
    expected = load_file(FOLDER / f"{run}.safetensors")
    record = DESCRIPTION["runs"][run]
    found = space(run)
    method, statistics = FGSN(dim="fro"), everything(found)
    order = [name_of(key) for key in record["module_order"]]
    assert sorted(order) == sorted(found.matrices())
    plan = method.decide({name: method.measure(found.unit(name), statistics) for name in order}, statistics)
    assert plan.units == set(order)
    rho = dict(zip(order, record["rho_rounded_5"], strict=True))
    flags: Mapping[str, bool] = dict(zip(order, record["projected"], strict=True))
    assert any(flags.values())
    for key, theirs in expected.items():
        unit = found.unit(name_of(key))
        ours = likeness(found, unit)
        assert ours == pytest.approx(rho[unit.name], abs=2e-5)
        assert (round(ours, 5) <= record["effective_threshold"]) is flags[unit.name]
        targets = method.edit(unit, plan, statistics)
        new = blend(unit.tuned[key], targets[key], 1.0) if flags[unit.name] else unit.tuned[key]
        torch.testing.assert_close(new, theirs, rtol=1e-5, atol=1e-7)


def test_the_folder_is_the_one_described(golden: Path) -> None:
    assert DESCRIPTION["method"] == "SafeLoRA"
    assert RUNS
