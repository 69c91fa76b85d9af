"""Where the authors' outputs are: RESAFE_GOLDEN, by default beside the checkout."""

import json
import os
from pathlib import Path

import pytest

GOLDEN = Path(os.environ.get("RESAFE_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))


@pytest.fixture(scope="session")
def golden() -> Path:
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden outputs at {GOLDEN}; set RESAFE_GOLDEN to run these tests")
    return GOLDEN


@pytest.fixture(scope="session")
def calibration(golden: Path) -> dict[str, list[dict[str, list[int]]]]:
    return json.loads((golden / "inputs" / "calibration.json").read_text())
