"""Safe Delta against the outputs of its authors' code."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from resafe.locating.lowrank import Calibration, grams, maps
from resafe.model.stored import catalogue
from resafe.repairing.safedelta import Curvature, SafeDelta, hessian
from resafe.repairing.space import DenseSpace
from resafe.weights.checkpoint import Checkpoint

from .conftest import GOLDEN
from .reading import bench

FOLDER = GOLDEN / "safedelta"
RUNS = json.loads((FOLDER / "description.json").read_text())["runs"] if FOLDER.is_dir() else {}
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no Safe Delta golden outputs at {FOLDER}")
CASES = [
    match.groups()
    for file in (sorted(FOLDER.glob("*.stable_argsort.safetensors")) if FOLDER.is_dir() else ())
    if (match := re.fullmatch(r"(\w+)\.(s[\d.]+)\.stable_argsort\.safetensors", file.name))
]


def text(calibration: dict) -> Calibration:
    records = calibration["harmful"]
    return Calibration([r["prompt_ids"] + r["response_ids"] for r in records], [0] * len(records))


@pytest.fixture(scope="module")
def curvature(calibration: dict) -> dict[str, Curvature]:
    return {
        arch: SafeDelta().curvature(
            bench(GOLDEN / "inputs" / arch / "aligned").loaded,
            text(calibration),
            catalogue(Checkpoint.open(GOLDEN / "inputs" / arch / "aligned")),
        )
        for arch in {arch for arch, _ in CASES}
    }


@pytest.mark.parametrize("arch", sorted({arch for arch, _ in CASES}))
def test_hessian(arch: str, calibration: dict) -> None:
    expected = load_file(FOLDER / f"{arch}.hessian_diagonal.safetensors")
    on = bench(GOLDEN / "inputs" / arch / "aligned")
    sources = {one.name: one.source for one in maps(on.layout, "entry")}
    assert set(sources) == set(expected)
    found = grams(on.loaded, text(calibration), dict.fromkeys(sources.values()))
    for name, diagonal in expected.items():
        ours = hessian(found[sources[name]], len(calibration["harmful"])).diagonal()
        torch.testing.assert_close(ours.float(), diagonal, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("arch", "run"), CASES)
def test_accepted_entries_and_weights(arch: str, run: str, curvature: dict[str, Curvature]) -> None:
    expected = load_file(FOLDER / f"{arch}.{run}.stable_argsort.safetensors")
    models = GOLDEN / "inputs" / arch
    tuned, aligned = (Checkpoint.open(models / role) for role in ("tuned_full", "aligned"))
    method = SafeDelta(s=RUNS[run]["scale_s"])
    space = DenseSpace(tuned, aligned, None)
    units = method.names(space.matrices(), tuned.names)
    assert set(units) == set(tuned.names) > set(expected)
    plan = method.decide(dict.fromkeys(units), curvature[arch])
    for name in units:
        unit = space.unit(name)
        (target,) = method.edit(unit, plan, curvature[arch]).values()
        ours = torch.where(target.mask, target.value, unit.tuned[name])
        if name not in expected:
            assert torch.equal(ours, aligned.tensor(name))
            continue
        torch.testing.assert_close(ours, expected[name], rtol=1e-3, atol=1e-4)
        differs = tuned.tensor(name) != aligned.tensor(name)
        theirs = (expected[name] == tuned.tensor(name)) & differs
        assert int(theirs.sum()) == RUNS[run]["accepted_count_per_matrix_stable"][name]
        assert float(((~target.mask & differs) != theirs).float().mean()) <= 0.005
