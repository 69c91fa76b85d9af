"""FLAP's metrics, which SSAH's score builds on, against the outputs of its authors' code."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from resafe.locating.observe import TokenSums
from resafe.locating.ssah import flap

from .conftest import GOLDEN
from .reading import SPREADS, bench, look, texts_of

FOLDER = GOLDEN / "flap"
DESCRIPTION = json.loads((FOLDER / "description.json").read_text()) if FOLDER.is_dir() else {"tolerance": ""}
CASES = [
    (file, match[1], match[2])
    for file in sorted(FOLDER.glob("*.safetensors"))
    if (match := re.fullmatch(r"(\w+)\.channel_metrics\.(\w+)", file.stem))
]
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no FLAP golden outputs at {FOLDER}")


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("file", "arch", "group"), CASES)
def test_channel_metrics(
    file: Path, arch: str, group: str, spread: tuple[int, int], calibration: dict, tmp_path: Path
) -> None:
    rtol = float(re.search(r"rtol ([\de.-]+)", DESCRIPTION["tolerance"])[1])
    expected = load_file(file)
    on = bench(GOLDEN / "inputs" / arch / "aligned")
    found = look(on, texts_of(calibration), (TokenSums("linear", "all"),), tmp_path, spread)
    modules = {key.rpartition(".")[0] for key in expected}
    assert len(modules) == 2 * len(on.layout)
    for module in modules:
        entry = found.entry(TokenSums("linear", "all"), group, f"{module}.weight")
        weight = on.loaded.model.get_submodule(module).weight
        for metric, ours in flap(entry, weight).items():
            torch.testing.assert_close(
                ours.float(),
                expected[f"{module}.{metric}"],
                rtol=rtol,
                atol=1e-6 if metric == "baseline_inp" else 0,
            )


def test_the_folder_is_the_one_described(golden: Path) -> None:
    assert CASES
