"""SafeMERGE against the outputs of its authors' code, which merges by PEFT's linear combination."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file

from resafe.registry import get
from resafe.repairing.base import Job, blend
from resafe.repairing.engine import plan_edit
from resafe.repairing.safemerge import SafeMERGE
from resafe.repairing.space import FactorSpace
from resafe.weights.adapter import Adapter
from resafe.weights.checkpoint import Checkpoint

from .conftest import GOLDEN

FOLDER = GOLDEN / "safemerge"
DESCRIPTION = json.loads((FOLDER / "description.json").read_text()) if FOLDER.is_dir() else {"runs": {}}
RUNS = sorted(DESCRIPTION["runs"])
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no SafeMERGE golden outputs at {FOLDER}")


def adapters() -> list[str]:
    """Return the folders of the tuned and of the safety adapter."""
    return re.findall(r"(?:finetuned|safe) = (\w+)", DESCRIPTION["inputs"])


def in_module_order(name: str) -> tuple[int, int]:
    parts = name.split(".")
    return int(parts[2]), PARTS.index(parts[-2])


@pytest.mark.parametrize("arch", RUNS)
def test_the_merged_adapter_is_the_authors(arch: str) -> None:
    record, models = DESCRIPTION["runs"][arch], GOLDEN / "inputs" / arch
    expected = load_file(FOLDER / f"{arch}.merged_adapter.safetensors")
    tuned, safety = (Adapter.open(models / name) for name in adapters())
    job = Job(tuned, Checkpoint.open(models / "aligned"), Checkpoint.open(models / "base"))
    parameters = {
        "safety": str(safety.folder),
        "tau": record["threshold"],
        "weight": record["weights"][1],
        "merge": record["combination_type"],
    }
    edit = plan_edit(get("safemerge", "repair"), parameters, job)
    assert isinstance(edit.repair, SafeMERGE)
    assert isinstance(edit.space, FactorSpace)
    rho = [edit.plan.details["matrices"][name]["rho"] for name in sorted(edit.units, key=in_module_order)]
    assert rho == pytest.approx(record["cos_in_module_order"], abs=2e-5)
    assert edit.plan.units == {f"{module}.weight" for module in record["merged_modules"]}
    root = math.sqrt(tuned.scale(edit.units[0]) / record["new_adapter"]["scaling"])  # theirs is folded in
    assert len(expected) == 2 * len(edit.units)
    for name in edit.units:
        unit = edit.space.unit(name)
        new = dict(unit.tuned)
        if name in edit.plan.units:
            new = {
                k: blend(new[k], t, 1.0)
                for k, t in edit.repair.edit(unit, edit.plan, edit.statistics).items()
            }
        for key, tensor in new.items():
            torch.testing.assert_close(root * tensor, expected[key], rtol=0, atol=1e-6)


def test_the_folder_is_the_one_described(golden: object) -> None:
    assert DESCRIPTION["method"] == "SafeMERGE"
    assert RUNS
