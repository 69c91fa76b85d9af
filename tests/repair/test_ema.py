"""EMA: the weights are the recursion's, and the file is the weighted sum of the checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch

from resafe.errors import UserError
from resafe.repairing.ema import average

from .world import adapter, edited, effective, job, moved, noise, written


@pytest.mark.parametrize("w0", [0.05, 0.5, 0.95])
def test_weights_are_those_of_the_recursion(w0: float) -> None:
    """Where every step was saved it is the recursion; where fewer were, each stands for those before it."""
    eta, mean = w0 ** (1 / 12), torch.eye(13)[0]
    for step in range(1, 13):
        mean = eta * mean + (1 - eta) * torch.eye(13)[step]
    torch.testing.assert_close(torch.tensor(average(range(1, 13), w0)), mean)
    few = torch.tensor(average([2, 6, 12], w0))
    torch.testing.assert_close(few, torch.stack([mean[0], mean[1:3].sum(), mean[3:7].sum(), mean[7:].sum()]))
    assert float(few[0]) == pytest.approx(w0)
    assert float(few.sum()) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def trainer(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    moved(folder / "checkpoint-5", root / "aligned", 0.02, 11)
    moved(folder / "checkpoint-20", root / "aligned", 0.04, 12, max_shard_size="5KB")
    (folder / "runs").mkdir()
    return folder


@pytest.mark.parametrize("form", ["folder", "list", "with the tuned model"])
def test_the_file_is_the_average(root: Path, tmp_path: Path, trainer: Path, form: str) -> None:
    given, steps = str(trainer), [5, 20, 35]
    if form == "list":
        given, steps = f"{trainer / 'checkpoint-5'}, {trainer / 'checkpoint-20'}", [1, 2, 3]
    if form == "with the tuned model":
        shutil.copytree(trainer, tmp_path / "all")
        shutil.copytree(root / "tuned", tmp_path / "all" / "checkpoint-30")
        given, steps = str(tmp_path / "all"), [5, 20, 30]
    edit = edited(job(root, "tuned", "aligned"), "ema", w0=0.3, checkpoints=given)
    written(edit, tmp_path / "out")
    folders = [root / "aligned", trainer / "checkpoint-5", trainer / "checkpoint-20", root / "tuned"]
    models = [effective(folder) for folder in folders]
    for name, after in effective(tmp_path / "out").items():
        expected = sum(w * model[name] for w, model in zip(average(steps, 0.3), models, strict=True))
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)
    assert edit.plan.details["weights"] == list(average(steps, 0.3))


def test_saved_adapters_and_their_place(root: Path, tmp_path: Path) -> None:
    """A Trainer saves its checkpoints inside the folder that the final adapter is saved to."""
    shutil.copytree(root / "fresh", tmp_path / "tuned")
    adapter(tmp_path / "tuned" / "checkpoint-10", root / "aligned", noise(21, 0.2))
    edit = edited(job(tmp_path, "tuned", str(root / "aligned"), None), "ema")
    written(edit, tmp_path / "out", 1.0, "merged")
    folders = (root / "aligned", tmp_path / "tuned" / "checkpoint-10", tmp_path / "tuned")
    models = [effective(folder) for folder in folders]
    for name, after in effective(tmp_path / "out").items():
        expected = sum(w * m[name] for w, m in zip(average([10, 20], 0.2), models, strict=True))
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def test_what_is_refused(root: Path, trainer: Path) -> None:
    work = job(root, "tuned", "aligned")
    for settings, reason in (
        ({}, "holds no checkpoint-N folder"),
        ({"checkpoints": "/nowhere"}, "holds no checkpoint-N folder"),
        ({"checkpoints": f"{trainer / 'checkpoint-5'},{trainer / 'runs'}"}, "is empty"),
        ({"w0": 1.0}, "w0 must lie"),
    ):
        with pytest.raises(UserError, match=reason):
            edited(work, "ema", **settings)
