"""What every method of weight algebra owes its user, whatever it is given."""

from pathlib import Path

import pytest
import torch

from resafe.repairing import asft, lox, lssf, resta, safelora, safemerge
from resafe.repairing.output import output_kind
from resafe.repairing.space import DenseSpace, RowSpace
from resafe.weights.adapter import Adapter
from tests.conftest import contents

from .world import close, edited, effective, job, written

PAIRS = {
    "dense": ("tuned", "aligned"),
    "sharded": ("sharded", "aligned"),
    "adapter on aligned": ("fresh", "aligned"),
    "part adapter": ("fresh-part", "aligned"),
    "continued adapter": ("continued", "aligned-adapter"),
    "unrelated adapters": ("unrelated", "aligned-adapter"),
    "adapter against dense": ("continued", "aligned"),
}
METHODS = {
    "safelora": (safelora.SafeLoRA, {"number": 4}),
    "safemerge": (safemerge.SafeMERGE, {"tau": 1.0}),
    "asft-projector": (asft.AsFTProjector, {}),
    "lox-post": (lox.LoXPost, {"k": 2}),
    "resta": (resta.RESTA, {"dare": "safety"}),
    "lssf": (lssf.LSSF, {}),
}
IN_ROWS = ("safelora", "safemerge", "asft-projector")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", PAIRS)
def test_strength_0_is_the_same_bytes_and_1_what_was_tried(
    root: Path, tmp_path: Path, case: str, method: str
) -> None:
    made, parameters = METHODS[method]
    edit = edited(job(root, *PAIRS[case]), method, **parameters)
    assert isinstance(edit.repair, made)
    before = effective(root / PAIRS[case][0])
    assert written(edit, tmp_path / "none", 0.0).share.changed == 0
    if output_kind(edit, "same") == "adapter" or not isinstance(edit.space.tuned, Adapter):
        assert contents(tmp_path / "none") == contents(root / PAIRS[case][0])
    else:
        close(effective(tmp_path / "none"), before, atol=1e-6)
    found = written(edit, tmp_path / "out", 1.0, "merged")
    expected = dict(before) | {name: edit.weight(name, 1.0) for name in edit.chosen}
    close(effective(tmp_path / "out"), expected, atol=1e-6)
    assert found.share == edit.share(1.0)
    assert found.share.changed > 0


@pytest.mark.parametrize("method", IN_ROWS)
@pytest.mark.parametrize(
    "case", ["adapter on aligned", "part adapter", "continued adapter", "unrelated adapters"]
)
def test_an_adapter_edited_in_place_is_the_merged_model_edited(
    root: Path, tmp_path: Path, case: str, method: str
) -> None:
    parameters = METHODS[method][1]
    rows = edited(job(root, *PAIRS[case]), method, **parameters)
    dense = edited(job(root, *PAIRS[case], dense_output=True), method, **parameters)
    assert isinstance(rows.space, RowSpace)
    assert isinstance(dense.space, DenseSpace)
    written(rows, tmp_path / "rows", 0.6)
    written(dense, tmp_path / "dense", 0.6, "merged")
    close(effective(tmp_path / "rows"), effective(tmp_path / "dense"), atol=5e-6)


@pytest.mark.parametrize("method", METHODS)
def test_an_untouched_model_stays_aligned_where_only_its_delta_is_edited(root: Path, method: str) -> None:
    """T = 0: what works on T has nothing to do; what adds D adds it."""
    spared = {"tau": 1.1} if method == "safemerge" else {}  # its rho is 1 where T is 0
    edit = edited(job(root, "aligned", "aligned"), method, **METHODS[method][1] | spared)
    aligned = effective(root / "aligned")
    moved = any(not torch.allclose(edit.weight(n, 1.0), aligned[n], atol=1e-6) for n in edit.chosen)
    assert moved is (method not in IN_ROWS)
