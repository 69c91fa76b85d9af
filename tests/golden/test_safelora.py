"""SafeLoRA against the outputs of its authors' code."""

import json

import pytest
import torch
from safetensors.torch import load_file

from resafe.registry import get
from resafe.repairing.base import Job, blend
from resafe.repairing.engine import Edit, plan_edit
from resafe.repairing.safelora import SafeLoRA
from resafe.repairing.space import RowSpace
from resafe.weights.adapter import Adapter
from resafe.weights.checkpoint import Checkpoint

from .conftest import GOLDEN

FOLDER = GOLDEN / "safelora"
DESCRIPTION = json.loads((FOLDER / "description.json").read_text()) if FOLDER.is_dir() else {"runs": {}}
RUNS = sorted(DESCRIPTION["runs"])
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no SafeLoRA golden outputs at {FOLDER}")


def name_of(key: str) -> str:
    return key.removeprefix("base_model.model.").removesuffix(".lora_B.weight") + ".weight"


def edited(run: str, **more: object) -> Edit:
    models = GOLDEN / "inputs" / run.split(".")[0]
    tuned = Adapter.open(models / DESCRIPTION["adapter"].split()[0])
    job = Job(tuned, Checkpoint.open(models / "aligned"), Checkpoint.open(models / "base"), **more)
    config = DESCRIPTION["runs"][run]["config"]
    parameters = {
        "select": config["select_layers_type"],
        "number": config.get("num_proj_layers", 10),
        "threshold": config.get("threshold", 0.5),
    }
    return plan_edit(get("safelora", "repair"), parameters, job)


@pytest.mark.parametrize("run", RUNS)
def test_the_adapter_is_the_authors(run: str) -> None:
    record, expected = DESCRIPTION["runs"][run], load_file(FOLDER / f"{run}.safetensors")
    edit = edited(run)
    assert isinstance(edit.repair, SafeLoRA)
    assert isinstance(edit.space, RowSpace)
    order = [name_of(key) for key in record["module_order"]]
    matrices = edit.plan.details["matrices"]
    assert set(order) == set(matrices)
    assert [matrices[name]["rho"] for name in order] == pytest.approx(record["rho_rounded_5"], abs=2e-5)
    assert [matrices[name]["projected"] for name in order] == record["projected"]
    assert edit.plan.details["threshold"] == pytest.approx(record["effective_threshold"], abs=2e-5)
    assert len(expected) == len(order)
    for key, theirs in expected.items():
        unit = edit.space.unit(name_of(key))
        new = unit.tuned[key]
        if unit.name in edit.plan.units:
            new = blend(new, edit.repair.edit(unit, edit.plan, edit.statistics)[key], 1.0)
        torch.testing.assert_close(new, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("run", RUNS)
def test_whole_matrices_tell_the_same(run: str) -> None:
    """ρ from (r, r) traces is ρ of the products."""
    factors, whole = edited(run), edited(run, dense_output=True)
    one, other = (edit.plan.details["matrices"] for edit in (factors, whole))
    for name in factors.units:
        assert one[name]["rho"] == pytest.approx(other[name]["rho"], abs=3e-5)
        assert one[name]["kept"] == pytest.approx(other[name]["kept"], rel=1e-3)


def test_the_folder_is_the_one_described(golden: object) -> None:
    assert DESCRIPTION["method"] == "SafeLoRA"
    assert RUNS
