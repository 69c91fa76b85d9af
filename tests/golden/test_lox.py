"""LoX against the outputs of its authors' code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resafe.registry import get
from resafe.repairing.base import Job
from resafe.repairing.engine import Edit, plan_edit
from resafe.repairing.lox import LoX, retention
from resafe.weights.checkpoint import Checkpoint

from .conftest import GOLDEN

FOLDER = GOLDEN / "lox"
DESCRIPTION = (
    json.loads((FOLDER / "description.json").read_text())
    if FOLDER.is_dir()
    else {"runs": {}, "R_metrics": {}}
)
RUNS = sorted(DESCRIPTION["runs"])
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no LoX golden outputs at {FOLDER}")


def rounded(source: Path, folder: Path) -> Path:
    """Save a model in bfloat16, as the published code loads it."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    model = Checkpoint.open(source)
    tensors = {name: model.tensor(name).to(torch.bfloat16).contiguous() for name in model.names}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def edited(run: str, folder: Path) -> Edit:
    record, models = DESCRIPTION["runs"][run], GOLDEN / "inputs" / run.split(".")[0]
    released = record["dtype"] == "bf16"
    found = [rounded(models / n, folder / n) if released else models / n for n in ("aligned", "base")]
    aligned, base = (Checkpoint.open(f) for f in found)
    parameters = {
        "k": record["k"],
        "alpha": record["coef"],
        "subtract": "stored" if released else "float32",
    }
    return plan_edit(get("lox", "repair"), parameters, Job(aligned, None, base))


@pytest.mark.parametrize("run", RUNS)
def test_every_tensor_is_the_authors(run: str, tmp_path: Path) -> None:
    edit, expected = edited(run, tmp_path), load_file(FOLDER / f"{run}.safetensors")
    assert isinstance(edit.repair, LoX)
    released = DESCRIPTION["runs"][run]["dtype"] == "bf16"
    assert set(expected) <= set(edit.units)
    entries = off = 0
    for name, theirs in expected.items():
        unit = edit.space.unit(name)
        ours = unit.tuned[name]
        assert (name in edit.plan.units) is (ours.dim() > 1)
        if name in edit.plan.units:
            ours = edit.repair.edit(unit, edit.plan, edit.statistics)[name].value
        if not released:
            torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=2e-6)
            continue
        steps = (ours.to(torch.bfloat16).view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
        assert int(steps.max()) <= 1
        entries, off = entries + steps.numel(), off + int(steps.sum())
    assert off <= 1e-3 * entries


@pytest.mark.parametrize("case", sorted(DESCRIPTION["R_metrics"]))
def test_the_diagnostics_are_the_authors(case: str) -> None:
    arch, k = case.split(".k")
    models = [Checkpoint.open(GOLDEN / "inputs" / arch / n) for n in ("base", "aligned", "tuned_full")]
    for name, theirs in DESCRIPTION["R_metrics"][case]["per_linear_[R_ft,R_align]"].items():
        base, aligned, tuned = (model.tensor(f"{name}.weight").float() for model in models)
        assert retention(aligned - base, tuned - aligned, int(k)) == pytest.approx(tuple(theirs), abs=1e-5)


def test_the_folder_is_the_one_described(golden: Path) -> None:
    assert DESCRIPTION["method"] == "LoX"
    assert RUNS
    assert DESCRIPTION["R_metrics"]
